"""Draw whole images: the top-down pass with a sampler in charge of every group."""

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from models.protocol import HierarchicalVAE, LearnedPrior
from priors.samplers import Sampler, Streams
from runtime.randomness import Noise

Decoding = Literal["mean", "sample"]


@torch.no_grad()
def draw(
    model: HierarchicalVAE,
    prior: LearnedPrior,
    sampler: Sampler,
    rows: range,
    seed: int,
    decoding: Decoding,
    purpose: str = "sample",
) -> dict[str, Tensor]:
    """Draw some examples of the generative model with a learned prior.

    Args:
        model: the VAE, frozen, in eval mode.
        prior, sampler: any of either.
        rows: indices of the examples; row i is the same whatever batch it is drawn in.
        seed: with the row's index, determines the draw.
        decoding: the decoder's ``mean``, or a ``sample`` of p(x | z).
        purpose: names the draws too.

    Returns:
        ``x`` (rows, *data shape), and for every group k ``z/k00``, ``ess/k00``, ``proposals/k00``, ``acceptance/k00``.
    """
    device = next(model.parameters()).device

    def streams(k: int) -> Streams:
        return lambda stream: Noise(seed, f"{purpose}-{stream}", k, rows=rows, device=device)

    context, groups = sampler.top_down(model, prior, len(rows), streams)
    found = {f"{name}/k{k:02d}": value for k, drawn in enumerate(groups) for name, value in vars(drawn).items()}
    noise = Noise(seed, f"{purpose}-decoder", rows=rows, device=device)
    return {"x": decoded(model, context, noise, decoding)} | found


def decoded(model: HierarchicalVAE, context: Tensor, noise: Noise, decoding: Decoding) -> Tensor:
    """The data (batch, *data shape) of a context behind the last group: p(x | z)'s ``mean``, or a ``sample`` of it."""
    likelihood = model.decode(context)
    return likelihood.mean if decoding == "mean" else likelihood.draw(noise)


def readjusted(
    model: HierarchicalVAE,
    prior: Callable[[HierarchicalVAE], LearnedPrior],
    sampler: Sampler,
    passes: int,
    batch: int,
    seed: int,
) -> HierarchicalVAE:
    """A copy of a model whose batch-norm statistics are those of its own samples (NVAE, section 4).

    Statistics were gathered while reconstructing. At a low temperature samples differ from that, and the statistics with
    them.

    Args:
        model: the VAE, frozen, in eval mode.
        prior: makes the prior for a model.
        sampler: draws the samples.
        passes, batch: how many batches are drawn, and how many images each.
        seed: names the draws.
    """
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
    for step in range(passes):
        draw(model, prior(model), sampler, range(step * batch, (step + 1) * batch), seed, "mean", "readjust")
    return model.eval()
