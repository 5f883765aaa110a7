"""Stage 1: train a VAE on the evidence lower bound."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from datasets.dataset import Dataset
from models.distributions import Distribution
from models.protocol import Group, HierarchicalVAE, posterior_pass
from models.spectral import SpectralNorms, batch_norm_scales
from runtime.hardware import Precision, autocast
from runtime.identity import Identity
from runtime.options import Options, unless
from runtime.progress import Curves, Report, silent
from runtime.randomness import Noise
from runtime.training import Terms, Trainee, cosine, train

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, fused=True),
    "adamax": partial(torch.optim.Adamax, eps=1e-3, weight_decay=3e-4),
}


class TrainOptions(Options):
    """Settings of stage 1. Learning rate: linear warm-up, then a cosine from ``learning_rate`` to a hundredth of it.

    ``restarts``: maps the steps at which warm-up and cosine begin anew to the rate they then rise to (SGDR, Loshchilov and
    Hutter 2017); a cycle goes on from the averaged weights of the one before, with a fresh optimiser. ``kl_warmup``:
    fraction of the first cycle's steps over which the KL's weight grows from 0 to 1, after ``kl_delay`` of them; it is never
    under ``kl_floor`` (NVAE as released has 1e-4 of both). ``kl_balance``: while it grows, weigh the groups so that none
    collapses (NVAE). ``spectral``: weight of the spectral norms and of the batch norms' scales in the loss (NVAE's λ),
    coming log-linearly from ``spectral_start`` (if given) as the KL's weight grows. ``ema``: decay of the averaged weights
    that are kept, 0 for the last ones; ``clip``: largest norm of a gradient, null for any. (NVAE as released does neither:
    it takes hundreds of epochs, and short trainings gain from both.) ``precision``: ``auto`` is bf16 autocast where the
    hardware gains from it. The optimiser adamax has NVAE's ε = 1e-3 and weight decay 3e-4.
    """

    steps: Annotated[int, Field(ge=1)]
    batch: Annotated[int, Field(ge=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    optimizer: Literal["adam", "adamax"] = "adam"
    warmup: Annotated[int, Field(ge=0)] = 100
    restarts: dict[Annotated[int, Field(ge=1)], Annotated[float, Field(gt=0)]] = Field(default={})
    kl_warmup: Annotated[float, Field(ge=0, le=1)] = 0.3
    kl_delay: Annotated[float, Field(ge=0, lt=1), unless(0)] = 0.0
    kl_floor: Annotated[float, Field(ge=0, lt=1), unless(0)] = 0.0
    kl_balance: bool = True
    spectral: Annotated[float, Field(ge=0)] = 0.0
    spectral_start: Annotated[float, Field(gt=0)] | None = None
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    clip: Annotated[float, Field(gt=0)] | None = 100.0
    precision: Precision = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.spectral_start is not None and not self.spectral:
            raise ValueError("spectral_start does nothing without spectral; give spectral, or leave spectral_start out")
        if list(self.restarts) != sorted(self.restarts) or any(start >= self.steps for start in self.restarts):
            raise ValueError("restarts must come in the order of their steps, all before the last step")
        return self

    def cycles(self) -> list[tuple[range, float]]:
        """The learning rate's cycles: the steps of each, and the rate it rises to."""
        starts, ends = [0, *self.restarts], [*self.restarts, self.steps]
        peaks = [self.learning_rate, *self.restarts.values()]
        return [(range(start, end), peak) for start, end, peak in zip(starts, ends, peaks, strict=True)]

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        steps, peak = next(cycle for cycle in self.cycles() if step in cycle[0])
        return cosine(peak, peak / 100, len(steps), self.warmup)(step - steps.start)


@dataclass
class Evidence:
    """The parts of −ELBO for a batch: ``log_likelihood`` (batch,), ``kl`` one (batch,) per group; nats per example."""

    log_likelihood: Tensor
    kl: list[Tensor]

    @property
    def elbo(self) -> Tensor:
        """The evidence lower bound of each example in nats, shape (batch,)."""
        return self.log_likelihood - torch.stack(self.kl).sum(0)


def evidence(model: HierarchicalVAE, x: Tensor, noise: Sequence[Noise]) -> Evidence:
    """One posterior pass over x (batch, *data shape); noise[k] draws z_k. A group's KL is its model's ``divergence``."""
    divergences: list[Tensor] = []

    def visit(k: int, context: Tensor, posterior: Distribution, z: Tensor) -> None:
        divergences.append(model.divergence(k, context, posterior, z))

    decoded = model.decode(posterior_pass(model, x, noise.__getitem__, visit))
    return Evidence(decoded.log_prob(x), divergences)


def balance(divergences: Sequence[Tensor], layout: Sequence[Group]) -> Tensor:
    """Weights of the groups' KL terms during warm-up, mean 1, detached (NVAE, appendix A).

    A group's weight grows with its own KL, so that cheap groups are not pushed to zero first, and falls with the size of
    its maps relative to the number of groups that share the scale.

    Args:
        divergences: K tensors (batch,), nats.
        layout: the K groups.
    """
    positions = [max(1, torch.Size(group.latent[1:]).numel()) for group in layout]
    alpha = torch.tensor([size / positions.count(size) for size in positions])
    kl = torch.stack([divergence.detach().abs().mean() for divergence in divergences]).cpu() + 0.01
    weights = kl / (alpha / alpha.min()) * kl.sum()
    return weights / weights.mean()


def kl_weight(options: TrainOptions, step: int) -> float:
    """The KL's weight in the loss at a step."""
    steps = len(options.cycles()[0][0])
    return max(min(1.0, (step - options.kl_delay * steps) / max(1, round(options.kl_warmup * steps))), options.kl_floor)


def spectral_weight(options: TrainOptions, kl_weight: float) -> float:
    """λ while the KL's weight is ``kl_weight``: log-linear from ``spectral_start`` to ``spectral``."""
    start = options.spectral if options.spectral_start is None else options.spectral_start
    return start ** (1 - kl_weight) * options.spectral**kl_weight


def train_vae(
    model: HierarchicalVAE,
    dataset: Dataset,
    options: TrainOptions,
    path: Path,
    identity: Identity,
    report: Report = silent,
) -> dict[str, Any]:
    """Train to a finished checkpoint at ``path``, going on from a partial one where there is one.

    Args:
        model: on its device; it holds the averaged weights afterwards, in eval mode.
        dataset: batches come from its training split.
        options: see :class:`TrainOptions`.
        path: the checkpoint.
        identity: what it is made from; every draw derives from its seed.
        report: told of the progress.

    Returns:
        The checkpoint's metadata: step, seconds, history.

    Raises:
        NonFiniteLossError: naming the term that broke.
        UserError: the checkpoint could not be written.
    """
    device = next(model.parameters()).device
    optimizer = OPTIMIZERS[options.optimizer](model.parameters(), lr=options.learning_rate)
    norms = SpectralNorms(model).to(device) if options.spectral else None
    trainee = Trainee(
        "vae", model, optimizer, options.rate, path, identity, options.clip, options.ema, norms, options.restarts
    )
    layout, seed = model.layout(), identity.seed

    divergences: list[Tensor] = []

    def losses(step: int, active: Sequence[Trainee]) -> list[Terms]:  # noqa: ARG001
        x = dataset.train_batch(options.batch, seed, step).to(device)
        noise = [Noise(seed, "vae", k, step, device=device) for k in range(model.groups)]
        with autocast(options.precision, device.type):
            parts = evidence(model, x, noise)
            penalties = model.penalties(x)
        divergences[:] = [kl.detach() for kl in parts.kl]
        weight = kl_weight(options, step)
        balanced = options.kl_balance and weight < 1
        gamma = balance(parts.kl, layout) if balanced else torch.ones(model.groups)
        terms = {f"kl/k{k:02d}": weight * gamma[k].item() * kl.mean() for k, kl in enumerate(parts.kl)}
        if norms is not None:
            strength = spectral_weight(options, weight)
            terms |= {"spectral": strength * norms(), "batch-norm": strength * batch_norm_scales(model)}
        return [{"reconstruction": -parts.log_likelihood.mean(), **terms, **penalties}]

    def with_divergences(done: int, total: int, note: str, curves: Callable[[], Curves] | None = None, /) -> None:
        def found() -> Curves:
            return {
                name: own | {f"kl/k{k:02d}": kl.mean().item() for k, kl in enumerate(divergences)}
                for name, own in (curves() if curves else {}).items()
            }

        report(done, total, note, found)

    model.train()
    train([trainee], options.steps, losses, with_divergences)
    if trainee.finished is None:
        trainee.finish()
    model.eval()
    return {"step": trainee.step, "seconds": trainee.seconds, "history": trainee.history} | (trainee.finished or {})
