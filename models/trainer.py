"""Stage 1: train a VAE on the evidence lower bound."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from datasets.dataset import Dataset
from models.distributions import Distribution
from models.protocol import Group, HierarchicalVAE, posterior_pass
from models.spectral import SpectralNorms, batch_norm_scales
from runtime import parallel
from runtime.errors import UserError
from runtime.hardware import Precision, autocast
from runtime.identity import Identity
from runtime.options import Options, unless
from runtime.progress import Curves, Report, silent
from runtime.randomness import Noise
from runtime.training import Terms, Trainee, cosine, total, train

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, fused=True),
    "adamax": partial(torch.optim.Adamax, eps=1e-3, weight_decay=3e-4),
}


class TrainOptions(Options):
    """Settings of stage 1. Learning rate: linear warm-up, then a cosine from ``learning_rate`` to a hundredth of it.

    ``restarts``: maps the steps at which warm-up and cosine begin anew to the rate they then rise to (SGDR, Loshchilov and
    Hutter 2017); a cycle goes on from the (averaged) weights of the one before, with a fresh optimiser. ``kl_warmup``:
    fraction of the first cycle's steps over which the KL's weight grows from 0 to 1, after ``kl_delay`` of them; it is never
    under ``kl_floor`` (NVAE as released has 1e-4 of both). ``kl_balance``: while it grows, weigh the groups so that none
    collapses (NVAE). ``spectral``: weight of the spectral norms and of the batch norms' scales in the loss (NVAE's λ),
    coming log-linearly from ``spectral_start`` (if given) as the KL's weight grows. ``ema``: decay of the averaged weights
    that are kept, 0 for the last ones; ``clip``: largest norm of a gradient, null for any. (NVAE as released does neither:
    it takes hundreds of epochs, and short trainings gain from both.) ``precision``: ``auto`` is bf16 autocast where the
    hardware gains from it. The optimiser adamax has NVAE's ε = 1e-3 and weight decay 3e-4. ``accumulate``: so many parts of
    a batch go through the network one after the other and their gradients are added up, where memory is short; batch norms
    then see a part at a time. ``sync_batch_norm``: where several processes share a batch, batch norms see all of their parts
    (as NVAE's do), so that it does not matter how many there are; if not, each process normalises by its own.
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
    accumulate: Annotated[int, Field(ge=1), unless(1)] = 1
    sync_batch_norm: Annotated[bool, unless(True)] = True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.spectral_start is not None and not self.spectral:
            raise ValueError("spectral_start does nothing without spectral; give spectral, or leave spectral_start out")
        if list(self.restarts) != sorted(self.restarts) or any(start >= self.steps for start in self.restarts):
            raise ValueError("restarts must come in the order of their steps, all before the last step")
        return self

    def parts(self, processes: int, rank: int) -> list[range]:
        """The rows of a batch that one of so many processes takes, one part after the other.

        Raises:
            UserError: they do not come out even.
        """
        count = processes * self.accumulate
        if self.batch % count:
            raise UserError(
                f"a batch of {self.batch} cannot be shared equally by {processes} processes, {self.accumulate} parts each; "
                "change --processes, or batch or accumulate in params.yaml"
            )
        rows = self.batch // count
        return [
            range(first * rows, (first + 1) * rows) for first in range(rank * self.accumulate, (rank + 1) * self.accumulate)
        ]

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
        divergences: K tensors (batch,), nats; of this process's part, where several share a batch.
        layout: the K groups.
    """
    positions = [max(1, torch.Size(group.latent[1:]).numel()) for group in layout]
    alpha = torch.tensor([size / positions.count(size) for size in positions])
    kl = parallel.mean(torch.stack([divergence.detach().abs().mean() for divergence in divergences])).cpu() + 0.01
    weights = kl / (alpha / alpha.min()) * kl.sum()
    return weights / weights.mean()


def kl_weight(options: TrainOptions, step: int) -> float:
    """The KL's weight in the loss at a step."""
    steps = len(options.cycles()[0][0])
    passed, growing = step - options.kl_delay * steps, round(options.kl_warmup * steps)
    grown = passed / growing if growing else float(passed >= 0)
    return max(min(1.0, grown), options.kl_floor)


def spectral_weight(options: TrainOptions, kl_weight: float) -> float:
    """λ while the KL's weight is ``kl_weight``: log-linear from ``spectral_start`` to ``spectral``."""
    start = options.spectral if options.spectral_start is None else options.spectral_start
    return start ** (1 - kl_weight) * options.spectral**kl_weight


class _Loss(nn.Module):
    """The terms of the loss in one forward pass, over which processes that train together share gradients.

    Attributes:
        model: the VAE.
        norms: of its convolutions, where their spectral norms are a term.
        divergences: the groups' mean KLs of the last pass, (K,) in nats, detached.
    """

    def __init__(self, model: HierarchicalVAE, options: TrainOptions):
        super().__init__()
        self.model, self.options, self.layout = model, options, model.layout()
        self.norms = SpectralNorms(model).to(next(model.parameters()).device) if options.spectral else None
        self.divergences = torch.empty(0)

    def forward(self, x: Tensor, noise: Sequence[Noise], step: int) -> Terms:
        """The terms for x (batch, *data shape) at a step; noise[k] draws z_k."""
        options = self.options
        with autocast(options.precision, x.device.type):
            parts = evidence(self.model, x, noise)
            penalties = self.model.penalties(x)
        self.divergences = torch.stack([kl.detach().mean() for kl in parts.kl])
        weight = kl_weight(options, step)
        balanced = options.kl_balance and weight < 1
        gamma = balance(parts.kl, self.layout) if balanced else torch.ones(self.model.groups)
        terms = {f"kl/k{k:02d}": weight * gamma[k].item() * kl.mean() for k, kl in enumerate(parts.kl)}
        if self.norms is not None:
            strength = spectral_weight(options, weight)
            terms |= {"spectral": strength * self.norms(), "batch-norm": strength * batch_norm_scales(self.model)}
        return {"reconstruction": -parts.log_likelihood.mean(), **terms, **penalties}


def train_vae(
    model: HierarchicalVAE,
    dataset: Dataset,
    options: TrainOptions,
    path: Path,
    identity: Identity,
    report: Report = silent,
) -> dict[str, Any]:
    """Train to a finished checkpoint at ``path``, going on from a partial one where there is one.

    Called by every process of a group (:mod:`runtime.parallel`), it trains one VAE by all of them; the first one writes.

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
        UserError: the checkpoint could not be written, or the processes cannot share a batch equally.
    """
    device = next(model.parameters()).device
    optimizer = OPTIMIZERS[options.optimizer](model.parameters(), lr=options.learning_rate)
    loss = _Loss(model, options)
    if options.sync_batch_norm:
        parallel.synchronise_batch_norms(model)
    trainee = Trainee(
        "vae",
        model,
        optimizer,
        options.rate,
        path,
        identity,
        options.clip,
        options.ema or None,
        loss.norms,
        options.restarts,
        settle=model.settle,
    )
    seed, parts = identity.seed, options.parts(parallel.size(), parallel.rank())
    model.train()
    shared = parallel.shared(loss)
    divergences = torch.empty(0)

    def losses(step: int, active: Sequence[Trainee]) -> list[Terms]:  # noqa: ARG001
        nonlocal divergences
        x, found, seen = dataset.train_batch(options.batch, seed, step), Terms(), []
        for rows in parts:
            noise = [Noise(seed, "vae", k, step, device=device).cut(rows, len(x)) for k in range(model.groups)]
            last = rows is parts[-1]
            with nullcontext() if last else parallel.kept_here(shared):
                terms = shared(x[rows.start : rows.stop].to(device), noise, step)
                if len(parts) > 1:
                    terms = {name: term / len(parts) for name, term in terms.items()}
                if not last:
                    total(terms).backward()  # what the optimiser's step takes besides the last part's
            seen.append(loss.divergences)
            found = {name: term + found[name].detach() if found else term for name, term in terms.items()}
        divergences = parallel.mean(torch.stack(seen).mean(0))
        return [found]

    def with_divergences(done: int, steps: int, note: str, curves: Callable[[], Curves] | None = None, /) -> None:
        def found() -> Curves:
            return {
                name: own | {f"kl/k{k:02d}": kl for k, kl in enumerate(divergences.tolist())}
                for name, own in (curves() if curves else {}).items()
            }

        report(done, steps, note, found)

    train([trainee], options.steps, losses, with_divergences)
    if trainee.finished is None:
        trainee.finish()
    model.eval()
    return {"step": trainee.step, "seconds": trainee.seconds, "history": trainee.history} | (trainee.finished or {})
