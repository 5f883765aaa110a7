"""Draw whole images: the top-down pass with a sampler in charge of every group."""

from typing import Literal

import torch
from torch import Tensor

from models.protocol import HierarchicalVAE, LearnedPrior, descend
from priors.samplers import Sampler
from runtime.randomness import Noise

Decoding = Literal["mean", "sample"]


@torch.no_grad()
def draw(
    model: HierarchicalVAE, prior: LearnedPrior, sampler: Sampler, rows: range, seed: int, decoding: Decoding
) -> dict[str, Tensor]:
    """Draw some examples of the generative model with a learned prior.

    Args:
        model: the VAE, frozen, in eval mode.
        prior, sampler: any of either.
        rows: indices of the examples; row i is the same whatever batch it is drawn in.
        seed: with the row's index, determines the draw.
        decoding: the decoder's ``mean``, or a ``sample`` of p(x | z).

    Returns:
        ``x`` (rows, *data shape), and for every group k ``z/k00``, ``ess/k00``, ``proposals/k00``, ``acceptance/k00``.
    """
    device = next(model.parameters()).device
    found: dict[str, Tensor] = {}

    def choose(k: int, context: Tensor) -> Tensor:
        drawn = sampler.draw(
            prior, k, context, lambda purpose: Noise(seed, f"sample-{purpose}", k, rows=rows, device=device)
        )
        for name, value in vars(drawn).items():
            found[f"{name}/k{k:02d}"] = value
        return drawn.z

    decoded = model.decode(descend(model, len(rows), choose))
    noise = Noise(seed, "sample-decoder", rows=rows, device=device)
    return {"x": decoded.mean if decoding == "mean" else decoded.draw(noise)} | found
