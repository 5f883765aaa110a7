"""One training loop for everything that is trained by gradient descent: VAEs, learned priors, feature networks.

It trains several *trainees* side by side from shared batches (the classifiers of all latent groups, say), each with its
own optimiser, checkpoint and position, so that any subset of them can be resumed from wherever it was.
"""

import copy
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from runtime import checkpoints, parallel
from runtime.errors import UserError
from runtime.identity import Identity
from runtime.progress import Curves, Report, silent

SAVE_SECONDS = 20.0
SAVE_BYTES_A_SECOND = 10e6  # between rolling checkpoints, at most: some 3 % of what a disk takes, and 20 s up to 200 MB
HISTORY_POINTS = 100
OVERFITTING_NATS = 0.05
PROGRESS = ("step", "seconds", "history", "held_out", "best_step")

Terms = dict[str, Tensor]
"""Named loss terms, scalars. The loss is their sum."""


def total(terms: Terms) -> Tensor:
    """The loss."""
    return torch.stack([term.float() for term in terms.values()]).sum()


class NonFiniteLossError(UserError):
    """A loss term became NaN or infinite; the message names it, the step, and what usually helps."""


def cosine(peak: float, final: float, steps: int, warmup: int = 0) -> Callable[[int], float]:
    """Learning rate as a function of the step: linear warm-up, then a half cosine from ``peak`` to ``final``."""

    def rate(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return rate


@dataclass(frozen=True)
class Plateau:
    """A learning rate that is cut where held-out losses stop falling, and a training that ends where cuts no longer help.

    After ``patience`` checks without a new best by SMALLEST_GAIN, the rate is multiplied by CUT; after ``patience`` more at
    the rate of the last of CUTS such cuts, training is over. So a training that ended this way would not have gained from
    more steps, which a schedule that falls to zero on a given day cannot say.
    """

    patience: int

    CUT = 0.3
    CUTS = 3
    SMALLEST_GAIN = 1e-3
    """Nats: less than the tables' last digit."""

    def cuts(self, held_out: Sequence[Sequence[float]]) -> int:
        """How often the rate was cut by now; more than CUTS: training is over.

        Args:
            held_out: rows of :attr:`Trainee.held_out`.
        """
        best, waited, cuts = math.inf, 0, 0
        for _, loss, _ in held_out:
            better = math.isfinite(loss) and loss < best - self.SMALLEST_GAIN
            waited = 0 if better else waited + 1
            best = min(best, loss) if math.isfinite(loss) else best
            if waited == self.patience:
                waited, cuts = 0, cuts + 1
        return cuts

    def over(self, held_out: Sequence[Sequence[float]]) -> bool:
        """Whether more steps would not help."""
        return self.cuts(held_out) > self.CUTS

    def factor(self, held_out: Sequence[Sequence[float]]) -> float:
        """What the learning rate is multiplied by."""
        return self.CUT ** self.cuts(held_out)


@dataclass
class Trainee:
    """A module in training.

    Attributes:
        name: for messages.
        module: what is trained and saved.
        optimizer: over the module's parameters. A group of them may have a ``scale``: its learning rate over the others'.
        rate: learning rate as a function of the step.
        path: the finished checkpoint; a rolling one is kept beside it until then.
        identity: what it is made from.
        clip: largest gradient norm, or None.
        ema: decay of the weights' exponential moving average, which is what is saved in the end; None for none.
        companion: holds what the loss carries from step to step; kept while training, no part of the result.
        restarts: after so many steps, the averaged weights (if any) take the place of the weights and the optimiser starts
            afresh.
        plateau: cuts the rate, and ends the training, by held-out losses; None leaves both to ``rate`` and the budget.
        keep_best: whether the state with the best held-out loss is what is saved in the end, in place of the last.
        settle: called when averaged weights have taken the place of the module's, to mend what is no mean of its kind.
    """

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]
    path: Path
    identity: Identity
    clip: float | None = None
    ema: float | None = None
    companion: nn.Module | None = None
    restarts: Collection[int] = ()
    plateau: Plateau | None = None
    keep_best: bool = False
    settle: Callable[[], None] | None = None
    step: int = 0
    seconds: float = 0.0
    history: list[list[float]] = field(default_factory=list)  # [step, loss]
    held_out: list[list[float]] = field(default_factory=list)  # [steps made, held-out loss, mean training loss before]
    finished: dict[str, Any] | None = None  # the metadata of the finished checkpoint
    average: AveragedModel | None = None
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int | None = None
    recent: list[float] = field(default_factory=list)  # training losses since the last held-out one

    @property
    def rolling(self) -> Path:
        """Where the unfinished state is kept."""
        return self.path.with_name(self.path.stem + ".partial.safetensors")

    @property
    def over(self) -> bool:
        """Whether the held-out losses have reached their plateau."""
        return self.plateau is not None and self.plateau.over(self.held_out)

    def resume(self) -> None:
        """Take up the finished or the rolling checkpoint where one of this very identity exists; else start afresh."""
        self._resume()
        parallel.wait_for_all()  # all have read what the first of them will write anew

    def _resume(self) -> None:
        done = checkpoints.load_current(self.path, self.identity)
        if done is not None:
            checkpoints.restore(self.module, done[0], self.path)
            self.finished = done[1]
            return
        self.path.unlink(missing_ok=True)
        if self.ema is not None:
            self.average = AveragedModel(self.module, multi_avg_fn=_moving_average(self.ema), use_buffers=True)
        partial = checkpoints.load_unfinished(self.rolling, self.identity)
        if partial is None:
            self.rolling.unlink(missing_ok=True)
            return
        tensors, document = partial
        checkpoints.restore(self.module, _under("module.", tensors), self.rolling)
        if self.average is not None:
            checkpoints.restore(self.average, _under("average.", tensors), self.rolling)
        if self.companion is not None:
            checkpoints.restore(self.companion, _under("companion.", tensors), self.rolling)
        self._restore_optimizer(_under("optimizer.", tensors))
        self.best = _under("best.", tensors)
        self.recent = _under("recent.", tensors)["losses"].tolist()
        for name in PROGRESS:
            setattr(self, name, document[name])

    def state(self) -> dict[str, Tensor]:
        """With PROGRESS, everything that continuing to the same numbers takes; not copied."""
        tensors = {f"module.{name}": tensor for name, tensor in self.module.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        tensors["recent.losses"] = torch.tensor(self.recent, dtype=torch.float64)
        if self.companion is not None:
            tensors |= {f"companion.{name}": tensor for name, tensor in self.companion.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        return tensors

    def snapshot(self) -> Callable[[], None]:
        """Copy the state, and its progress, to the host. Returns what writes that copy as the rolling checkpoint."""
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.state().items()}
        progress = copy.deepcopy({name: getattr(self, name) for name in PROGRESS})
        return partial(checkpoints.save, self.rolling, tensors, self.identity, **progress)

    def save_rolling(self) -> None:
        """Write the rolling checkpoint, here and now."""
        self.snapshot()()

    def finish(self, **metadata: Any) -> None:
        """Write the finished checkpoint (the averaged or the best state, if there is such) and drop the rolling one.

        Its metadata say how training ``ended`` (by its ``budget`` or its ``plateau``) and after how many steps the state
        was ``kept``. Raises NonFiniteLossError if what would be kept was never seen to have a finite held-out loss.
        """
        judged = [loss for _, loss, _ in self.held_out]
        if judged and not (self.best if self.keep_best else math.isfinite(judged[-1])):
            raise NonFiniteLossError(
                f"{self.name}: the held-out loss is not finite at step {self.step}; lower the learning rate in params.yaml"
            )
        self._take_average()
        if self.best:
            self.module.load_state_dict(self.best)
        self.module.eval()
        progress = {name: getattr(self, name) for name in PROGRESS}
        end = {"ended": "plateau" if self.over else "budget", "kept": self.best_step if self.best else self.step}
        if parallel.rank() == 0:
            checkpoints.save(self.path, self.module.state_dict(), self.identity, **progress, **end, **metadata)
            self.rolling.unlink(missing_ok=True)

    def judge(self, loss: float) -> None:
        """Note a held-out loss, and keep the state if it is the best so far; one that is not finite never is."""
        best = min((earlier for _, earlier, _ in self.held_out if math.isfinite(earlier)), default=math.inf)
        if self.keep_best and math.isfinite(loss) and loss < best:
            self.best = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
            self.best_step = self.step
        self.held_out.append([self.step, loss, sum(self.recent) / len(self.recent)])
        self.recent = []

    def update(self, terms: Terms) -> Tensor:
        """One optimiser step on the sum of the terms, and on what gradients there are already.

        Returns the loss, which is to be :meth:`noted` before all else.
        """
        loss = total(terms)
        factor = 1.0 if self.plateau is None else self.plateau.factor(self.held_out)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.rate(self.step) * factor * parameters.get("scale", 1.0)
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.module)
        self.step += 1
        if self.step in self.restarts:
            self._take_average()
            self.optimizer.state.clear()
        return loss.detach()

    def _take_average(self) -> None:
        if self.average is not None:
            self.module.load_state_dict(self.average.module.state_dict())
            if self.settle is not None:
                self.settle()

    def noted(self, loss: float, terms: Terms, steps: int) -> None:
        """Take note of the last step's loss, of ``steps`` in all. Raises NonFiniteLossError, naming the term that broke."""
        step = self.step - 1
        if not math.isfinite(loss):
            broken = ", ".join(name for name, term in terms.items() if not torch.isfinite(term)) or "the sum"
            raise NonFiniteLossError(
                f"{self.name}: the loss term {broken} is not finite at step {step}; "
                "lower the learning rate or the gradient clip in params.yaml"
            )
        self.recent.append(loss)
        if step % max(1, steps // HISTORY_POINTS) == 0:
            self.history.append([step, loss])

    def _restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        # Fused optimisers walk through memory, so moments must lie there as their parameters do (channels-last, say).
        for parameter, moments in self.optimizer.state.items():
            for name, moment in moments.items():
                if moment.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(moment)


class _Saver:
    """Rolling checkpoints of trainees as time passes, written in the background.

    One is begun after SAVE_SECONDS, or as many more as their size asks for by SAVE_BYTES_A_SECOND,
    and not before the last one is written. The end of the block, for whatever reason, waits for that.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "rolling-checkpoints")
        self._writing: Future[None] | None = None
        self._saved = time.monotonic()
        self._size: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        if kind is None and self._writing is not None:
            self._writing.result()

    def save_if_due(self, trainees: Sequence[Trainee]) -> None:
        """To be called between steps. Raises UserError if the last one could not be written."""
        if self._writing is not None and self._writing.done():
            self._writing.result()
            self._writing = None
        passed = time.monotonic() - self._saved
        if self._writing is not None or passed <= SAVE_SECONDS:
            return
        if self._size is None:
            self._size = sum(tensor.nbytes for trainee in trainees for tensor in trainee.state().values())
        if passed > self._size / SAVE_BYTES_A_SECOND:
            self._writing = self._thread.submit(_call_all, [trainee.snapshot() for trainee in trainees])
            self._saved, self._size = time.monotonic(), None


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _moving_average(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], int | Tensor], None]:
    """AveragedModel's update by an exponential moving average."""

    @torch.no_grad()
    def update(averages: Sequence[Tensor], values: Sequence[Tensor], count: int | Tensor) -> None:
        # An average over few steps would remember the initial weights: ramp the decay up, as is customary.
        weight = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        for average, value in zip(averages, values, strict=True):
            average.lerp_(value, weight) if average.is_floating_point() else average.copy_(value)

    return update


def overfits(held_out: Sequence[Sequence[float]]) -> bool:
    """Whether held-out losses say that training memorises: no new best in the last three, and training losses well below.

    Args:
        held_out: rows of :attr:`Trainee.held_out`.
    """
    if len(held_out) < 4:
        return False
    *before, last = (loss for _, loss, _ in held_out[-4:])
    best = min(loss for _, loss, _ in held_out[:-3])
    return min(*before[1:], last) >= best and held_out[-1][2] < last - OVERFITTING_NATS


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _note(active: Sequence[Trainee], values: Sequence[float]) -> str:
    """For the progress: the mean loss, and who overfits."""
    memorising = [trainee.name for trainee in active if overfits(trainee.held_out)]
    warning = f"; overfitting: {', '.join(memorising)}" if memorising else ""
    return f"loss {sum(values) / len(values):.4f}{warning}"


def _curves(active: Sequence[Trainee], values: Sequence[float]) -> Curves:
    """Of every trainee its loss, its learning rate and its last held-out loss."""
    return {
        trainee.name: {"loss": value, "learning-rate": trainee.optimizer.param_groups[0]["lr"]}
        | ({"held-out": trainee.held_out[-1][1]} if trainee.held_out else {})
        for trainee, value in zip(active, values, strict=True)
    }


def train(
    trainees: Sequence[Trainee],
    steps: int,
    losses: Callable[[int, Sequence[Trainee]], Iterable[Terms]],
    report: Report = silent,
    held_out: Callable[[Sequence[Trainee]], Sequence[float]] | None = None,
    checks: int = 0,
) -> None:
    """Train until every trainee that is not finished has made ``steps`` steps, or reached its plateau.

    Args:
        trainees: resumed by this call; finished ones are skipped, and :meth:`Trainee.finish` is left to the caller.
        steps: number of optimiser steps of each.
        losses: maps (step, the trainees that take this step) to their loss terms, in their order, each of which is done
            with before the next is asked for. Its draws must depend on the step alone, so that a resumed run repeats the
            undisturbed one.
        report: told of the progress.
        held_out: maps the trainees to their losses on held-out examples; called ``checks`` times, evenly, the last time
            after the last step.

    Raises:
        NonFiniteLossError: naming the term that broke.
        UserError: a checkpoint could not be written.
    """
    due = {-(-steps * check // checks) for check in range(1, checks + 1)} if checks else set()
    for trainee in trainees:
        trainee.resume()
    waiting = [trainee for trainee in trainees if trainee.finished is None]
    with _Saver() as saver:
        for step in itertools.count(min((trainee.step for trainee in waiting), default=steps)):
            training = [trainee for trainee in waiting if trainee.step < steps and not trainee.over]
            if not training:
                break
            active = [trainee for trainee in training if trainee.step == step]
            if not active:  # the others were resumed from later steps
                continue
            started = time.monotonic()
            for trainee in active:
                trainee.optimizer.zero_grad(set_to_none=True)
            terms, made = [], []
            for trainee, own in zip(active, losses(step, active), strict=True):
                made.append(trainee.update(own))
                terms.append({name: term.detach() for name, term in own.items()})  # so that its graph is let go
            values = parallel.mean(torch.stack(made)).tolist()  # the one time in a step that a device is waited for
            shared = (time.monotonic() - started) / len(active)
            for trainee, own, value in zip(active, terms, values, strict=True):
                trainee.noted(value, own, steps)
                trainee.seconds += shared
            if held_out is not None and step + 1 in due:
                for trainee, loss in zip(active, held_out(active), strict=True):
                    trainee.judge(loss)
            report(step + 1, steps, _note(active, values), partial(_curves, active, values))
            if parallel.rank() == 0:
                saver.save_if_due(active)
    if any(trainee.over for trainee in waiting):
        report(steps, steps, "held-out losses have reached their plateau")
