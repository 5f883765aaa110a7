"""One training loop for everything that is trained by gradient descent: VAEs, learned priors, feature networks.

It trains several *trainees* side by side from shared batches (the classifiers of all latent groups, say), each with its
own optimiser, checkpoint and position, so that any subset of them can be resumed from wherever it was.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime import checkpoints
from runtime.errors import UserError
from runtime.identity import Identity
from runtime.progress import Report, silent

SAVE_SECONDS = 20.0
HISTORY_POINTS = 100

Terms = dict[str, Tensor]
"""Named loss terms, scalars. The loss is their sum."""


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


@dataclass
class Trainee:
    """A module in training.

    Attributes:
        name: for messages.
        module: what is trained and saved.
        optimizer: over the module's parameters.
        rate: learning rate as a function of the step.
        path: the finished checkpoint; a rolling one is kept beside it until then.
        identity: what it is made from.
        clip: largest gradient norm, or None.
        ema: decay of the weights' exponential moving average, which is what is saved in the end; None for none.
    """

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]
    path: Path
    identity: Identity
    clip: float | None = None
    ema: float | None = None
    step: int = 0
    seconds: float = 0.0
    history: list[list[float]] = field(default_factory=list)  # [step, loss]
    finished: dict[str, Any] | None = None  # the metadata of the finished checkpoint
    average: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rolling(self) -> Path:
        """Where the unfinished state is kept."""
        return self.path.with_name(self.path.stem + ".partial.safetensors")

    def resume(self) -> None:
        """Take up the finished or the rolling checkpoint where one of this very identity exists; else start afresh."""
        done = checkpoints.load_current(self.path, self.identity)
        if done is not None:
            checkpoints.restore(self.module, done[0], self.path)
            self.finished = done[1]
            return
        self.path.unlink(missing_ok=True)
        if self.ema is not None:
            self.average = {name: tensor.clone() for name, tensor in self.module.state_dict().items()}
        partial = checkpoints.load_current(self.rolling, self.identity)
        if partial is None:
            self.rolling.unlink(missing_ok=True)
            return
        tensors, document = partial
        checkpoints.restore(self.module, _under("module.", tensors), self.rolling)
        for name, tensor in _under("average.", tensors).items():
            self.average[name].copy_(tensor)
        self._restore_optimizer(_under("optimizer.", tensors))
        self.step, self.seconds, self.history = document["step"], document["seconds"], document["history"]

    def save_rolling(self) -> None:
        """Write everything that continuing to the same numbers takes."""
        tensors = {f"module.{name}": tensor for name, tensor in self.module.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        progress = {"step": self.step, "seconds": self.seconds, "history": self.history}
        checkpoints.save(self.rolling, tensors, self.identity, **progress)

    def finish(self, **metadata: Any) -> None:
        """Write the finished checkpoint (the averaged weights, if there are any) and drop the rolling one."""
        if self.average:
            self.module.load_state_dict(self.average)
        self.module.eval()
        progress = {"step": self.step, "seconds": self.seconds, "history": self.history}
        checkpoints.save(self.path, self.module.state_dict(), self.identity, **progress, **metadata)
        self.rolling.unlink(missing_ok=True)

    def update(self, terms: Terms, steps: int) -> float:
        """One optimiser step on the sum of the terms. Raises NonFiniteLossError. Returns the loss."""
        loss = torch.stack([term.float() for term in terms.values()]).sum()
        value = loss.item()
        if not math.isfinite(value):
            broken = ", ".join(name for name, term in terms.items() if not torch.isfinite(term)) or "the sum"
            raise NonFiniteLossError(
                f"{self.name}: the loss term {broken} is not finite at step {self.step}; "
                "lower the learning rate or the gradient clip in params.yaml"
            )
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()
        self._average()
        if self.step % max(1, steps // HISTORY_POINTS) == 0:
            self.history.append([self.step, value])
        self.step += 1
        return value

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema is None:
            return
        # An average over few steps would remember the initial weights: ramp the decay up, as is customary.
        decay = min(self.ema, (1 + self.step) / (10 + self.step))
        for name, tensor in self.module.state_dict().items():
            if tensor.is_floating_point():
                self.average[name].lerp_(tensor, 1 - decay)
            else:
                self.average[name].copy_(tensor)

    def _restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def train(
    trainees: Sequence[Trainee],
    steps: int,
    losses: Callable[[int, Sequence[Trainee]], Sequence[Terms]],
    report: Report = silent,
) -> None:
    """Train until every trainee that is not finished has made ``steps`` steps.

    Args:
        trainees: resumed by this call; finished ones are skipped, and :meth:`Trainee.finish` is left to the caller.
        steps: number of optimiser steps of each.
        losses: maps (step, the trainees that take this step) to their loss terms, in their order. Its draws must depend
            on the step alone, so that a resumed run repeats the undisturbed one.
        report: told of the progress.

    Raises:
        NonFiniteLossError: naming the term that broke.
        UserError: a checkpoint could not be written.
    """
    for trainee in trainees:
        trainee.resume()
    waiting = [trainee for trainee in trainees if trainee.finished is None]
    saved = time.monotonic()
    for step in range(min((trainee.step for trainee in waiting), default=steps), steps):
        active = [trainee for trainee in waiting if trainee.step == step]
        started = time.monotonic()
        terms = losses(step, active)
        shared = (time.monotonic() - started) / len(active)
        values = []
        for trainee, own in zip(active, terms, strict=True):
            before = time.monotonic()
            values.append(trainee.update(own, steps))
            trainee.seconds += shared + time.monotonic() - before
        report(step + 1, steps, f"loss {sum(values) / len(values):.4f}")
        if time.monotonic() - saved > SAVE_SECONDS:
            for trainee in active:
                trainee.save_rolling()
            saved = time.monotonic()
