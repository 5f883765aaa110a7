"""Stage 2: with the VAE frozen, learn the priors of any subset of its groups from shared passes.

One pass of the frozen VAE over a batch yields, for every group, its context, a posterior sample and a base sample, and
each group's draws have a stream of their own. So a group learns the same whether it is trained alone, with some of the
others, or with all of them, and the VAE is run once per step however many groups there are.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from datasets.dataset import Dataset
from models.distributions import Distribution
from models.protocol import HierarchicalVAE, posterior_pass
from priors.protocol import FittedPrior, GroupPrior, Pair, Prior, TrainedPrior
from runtime import checkpoints
from runtime.hardware import autocast, clock
from runtime.identity import Identity
from runtime.progress import Report, silent
from runtime.randomness import Noise
from runtime.training import Plateau, Terms, Trainee, cosine, train


class _LastGroupError(Exception):
    """A pass has seen the last group that it is wanted for."""


@torch.no_grad()
def pairs(
    below: Prior, x: Tensor | Sequence[Tensor], seed: int, purpose: str, step: int = 0, last: int | None = None
) -> list[Pair]:
    """Posterior and base samples of every group, in the contexts that a posterior pass over x goes through.

    Args:
        below: the base to draw from, and the frozen model.
        x: (batch, *data shape), or its features.
        seed, purpose, step: name the draws, together with the group.
        last: the group behind which the pass stops; none if absent.
    """
    device, found = below.device, list[Pair]()

    def noise(name: str, k: int) -> Noise:
        return Noise(seed, f"{purpose}-{name}", k, step, device=device)

    def visit(k: int, context: Tensor, posterior: Distribution, z: Tensor) -> None:  # noqa: ARG001
        base = below.base(k, context)
        normal, uniform = noise("normal", k).normal((), tuple(z.shape)), noise("uniform", k).uniform((), (len(z),))
        found.append(Pair(z, base.draw(noise("base", k)), context, base, normal, uniform))
        if k == last:
            raise _LastGroupError

    with suppress(_LastGroupError):
        posterior_pass(below.model, x, partial(noise, "posterior"), visit)
    return found


class TrainingBatches:
    """Training batches as a posterior pass takes them: images, or the features that the frozen encoder made of them.

    Those of a flat model are a few numbers an image, and kept: past the first epochs, neither data nor encoder are needed. A
    batch is encoded as a whole until all that it shows has been seen, so that no image is ever encoded in a smaller one,
    where a kernel may sum in another order.

    Args:
        model: the frozen VAE, in eval mode.
        dataset: whose training split.
        size: of a batch.
        seed: of its shuffling.

    Attributes:
        keeps: whether it keeps features; of images whose features are too large it says so until the first is encoded.
    """

    KEPT_BYTES = 2**28
    """At most, for the features of all training images; more are not kept."""

    def __init__(self, model: HierarchicalVAE, dataset: Dataset, size: int, seed: int):
        self._model, self._dataset, self._size, self._seed = model, dataset, size, seed
        self._device = next(model.parameters()).device
        self.keeps = dataset.views > 0
        self._seen = torch.zeros(dataset.views, dtype=torch.bool)
        self._kept: list[Tensor] = []

    @torch.no_grad()
    def of(self, step: int) -> Tensor | list[Tensor]:
        """The batch of a step, on the model's device."""
        if not self.keeps:
            return self._images(step)
        views = self._dataset.train_views(self._size, self._seed, step)
        if not self._seen[views].all():
            features = self._model.encode(self._images(step))
            if not self._kept:
                nbytes = sum(feature[0].nbytes for feature in features) * len(self._seen)
                self.keeps = nbytes <= self.KEPT_BYTES
                if not self.keeps:
                    return list(features)
                self._kept = [feature.new_empty(len(self._seen), *feature.shape[1:]) for feature in features]
            for kept, feature in zip(self._kept, features, strict=True):
                kept[views.to(self._device)] = feature
            self._seen[views] = True
        return [kept[views.to(self._device)] for kept in self._kept]

    def _images(self, step: int) -> Tensor:
        return self._dataset.train_batch(self._size, self._seed, step).to(self._device)


@dataclass
class Slot:
    """One group to learn: its index, its prior (on the model's device), where it is kept and what it is made from."""

    k: int
    prior: GroupPrior
    path: Path
    identity: Identity


def learn(below: Prior, slots: Sequence[Slot], dataset: Dataset, report: Report = silent) -> None:
    """Learn some groups of one prior, each to its finished checkpoint; what is finished already is kept.

    Args:
        below: the base that the prior corrects, with the frozen model in eval mode.
        slots: the groups to learn, of one seed; those that are trained at all are of one method with the same options.
        dataset: examples come from its training split.
        report: told of the progress.

    Raises:
        NonFiniteLossError: naming the group and the term that broke.
        UserError: a checkpoint could not be written.
    """
    trained = {slot.k: slot.prior.options for slot in slots if isinstance(slot.prior, TrainedPrior)}
    if trained:
        own = [slot for slot in slots if slot.k in trained]
        _train(below, own, trained[own[0].k], dataset, report)
    _fit(below, [slot for slot in slots if slot.k not in trained], dataset, report)


def _train(below: Prior, slots: Sequence[Slot], options: TrainedPrior.Options, dataset: Dataset, report: Report) -> None:
    device, seed = below.device, slots[0].identity.seed
    rate, plateau = cosine(options.learning_rate, options.final_learning_rate, options.steps), None
    if options.schedule == "plateau":
        rate, plateau = lambda _: options.learning_rate, Plateau(options.patience)
    slot_of, last = {f"group {slot.k}": slot for slot in slots}, max(slot.k for slot in slots)
    trainees = [
        Trainee(
            name,
            slot.prior,
            _adam(slot.prior),
            rate,
            slot.path,
            slot.identity,
            plateau=plateau,
            keep_best=options.keep == "best",
        )
        for name, slot in slot_of.items()
    ]

    batches = TrainingBatches(below.model, dataset, options.batch, seed)

    def losses(step: int, active: Sequence[Trainee]) -> Iterator[Terms]:
        with autocast(options.precision, device.type):
            found = pairs(below, batches.of(step), seed, "prior", step, last)
        for trainee in active:  # each one's graph is gone before the next one's is made
            with autocast(options.precision, device.type):
                terms = _loss(slot_of[trainee.name], found, step)
            yield terms
            del terms

    validation = dataset.examples("validation", slice(options.held_out))

    @torch.no_grad()
    def held_out(active: Sequence[Trainee]) -> list[float]:
        """The loss on validation examples, with the same draws at every check."""
        totals = [0.0] * len(active)
        for trainee in active:
            trainee.module.eval()
        for part, x in enumerate(validation.split(options.batch)):
            with autocast(options.precision, device.type):
                found = pairs(below, x.to(device), seed, "held-out", part, last)
                parts = [_held_out_loss(slot_of[trainee.name], found, trainee.step) for trainee in active]
            values = iter(torch.stack([term.double() for terms in parts for term in terms.values()]).tolist())
            for index, terms in enumerate(parts):
                totals[index] += sum(next(values) for _ in terms) * len(x)
        for trainee in active:
            trainee.module.train()
        return [total / len(validation) for total in totals]

    for slot in slots:
        slot.prior.train()
    train(trainees, options.steps, losses, report, held_out, min(options.checks, options.steps))
    for trainee in trainees:
        if trainee.finished is None:
            trainee.finish()
        trainee.module.eval()


def _adam(prior: GroupPrior) -> torch.optim.Optimizer:
    assert isinstance(prior, TrainedPrior)
    decay = prior.options.weight_decay
    return torch.optim.AdamW(prior.parameter_groups(), betas=prior.betas, weight_decay=decay, fused=True)


def _loss(slot: Slot, found: Sequence[Pair], step: int) -> Terms:
    assert isinstance(slot.prior, TrainedPrior)
    return slot.prior.loss(found[slot.k], step)


def _held_out_loss(slot: Slot, found: Sequence[Pair], step: int) -> Terms:
    assert isinstance(slot.prior, TrainedPrior)
    return slot.prior.held_out_loss(found[slot.k], step)


def _fit(below: Prior, slots: Sequence[Slot], dataset: Dataset, report: Report) -> None:
    for done, slot in enumerate(slots):
        stored = checkpoints.load_current(slot.path, slot.identity)
        if stored is not None:
            checkpoints.restore(slot.prior, stored[0], slot.path)
            continue
        started = clock()
        if isinstance(slot.prior, FittedPrior):
            codes = _codes(below, slot.k, slot.prior.options, dataset, slot.identity.seed)
            slot.prior.fit(codes, slot.identity.seed)
        checkpoints.save(slot.path, slot.prior.state_dict(), slot.identity, step=0, seconds=clock() - started, history=[])
        report(done + 1, len(slots), "fitted")


@torch.no_grad()
def _codes(below: Prior, k: int, options: FittedPrior.Options, dataset: Dataset, seed: int) -> Tensor:
    """Posterior samples or means of group k, (codes, *latent), a batch of training examples at a time."""
    parts: list[Tensor] = []

    def visit(group: int, context: Tensor, posterior: Distribution, z: Tensor) -> None:  # noqa: ARG001
        if group == k:
            parts.append(posterior.mean if options.codes_of == "mean" else z)
            raise _LastGroupError

    for step in range(-(-options.codes // options.batch)):
        x = dataset.train_batch(options.batch, seed, step).to(below.device)
        with suppress(_LastGroupError):
            posterior_pass(below.model, x, partial(_code_noise, seed, step, below.device), visit)
    return torch.cat(parts)[: options.codes]


def _code_noise(seed: int, step: int, device: torch.device, k: int) -> Noise:
    return Noise(seed, "codes-posterior", k, step, device=device)
