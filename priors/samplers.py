"""How to draw from a learned prior: what a sampler is, and ancestral sampling.

A sampler sees a prior's base and log r, and nothing of the method behind them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from models.protocol import HierarchicalVAE, LearnedPrior, descend
from runtime import options
from runtime.randomness import Noise

Streams = Callable[[str], Noise]
"""streams(purpose) is a noise source for the rows at hand; each purpose has its own stream."""

ESS_FLOOR = 10.0
"""Proposals. Below so small an effective sample size, resampling hands out a few of its proposals again and again."""


@dataclass
class GroupDraw:
    """What a sampler drew for one group, with its diagnostics, one number per row.

    Attributes:
        z: (batch, *latent shape).
        ess: effective sample size as a fraction, in (0, 1]: of the weighed proposals, or of a chain's states; 1 for a draw
            from the distribution itself; (batch,).
        proposals: how many times r was evaluated, (batch,).
        acceptance: share of Metropolis proposals accepted, 1 where there is no such step; (batch,).
    """

    z: Tensor
    ess: Tensor
    proposals: Tensor
    acceptance: Tensor


class Sampler(ABC):
    """Draws z_k from a prior in a context."""

    corrects: ClassVar[bool] = True  # whether it does anything with the ratio r; else it draws from the base as it is
    weighs: ClassVar[bool] = False  # whether it keeps one of many weighed proposals, so that a small ESS is a collapse

    class Options(options.Options):
        """Settings of the sampler, as they stand in params.yaml."""

    def __init__(self, options: Options):
        self.options = options

    @property
    def accepts(self) -> bool:
        """Whether it accepts or refuses steps, so that an acceptance rate means something."""
        return False

    def refuses(self, exact: bool, smooth: bool) -> str | None:  # noqa: ARG002
        """Why this sampler cannot draw from a prior with these traits (``GroupPrior``), and what can; None if it can."""
        return None

    @abstractmethod
    def draw(self, prior: LearnedPrior, k: int, context: Tensor, streams: Streams) -> GroupDraw:
        """Draw group k in the contexts (batch, …)."""

    def top_down(
        self, model: HierarchicalVAE, prior: LearnedPrior, batch: int, streams: Callable[[int], Streams]
    ) -> tuple[Tensor, list[GroupDraw]]:
        """Draw all groups of ``batch`` images, one after the other; ``streams(k)`` are those of group k.

        Returns:
            The context to decode from, (batch, …), and what was drawn, group by group.
        """
        found: list[GroupDraw] = []

        def choose(k: int, context: Tensor) -> Tensor:
            found.append(self.draw(prior, k, context, streams(k)))
            return found[-1].z

        return descend(model, batch, choose), found


class Ancestral(Sampler):
    """z_k from the base itself: exact where the prior corrects nothing."""

    corrects = False

    def refuses(self, exact: bool, smooth: bool) -> str | None:  # noqa: ARG002
        """A prior that corrects its base has no direct sampler."""
        return None if exact else "ancestral sampling would ignore its ratio; use sir or langevin"

    def draw(self, prior: LearnedPrior, k: int, context: Tensor, streams: Streams) -> GroupDraw:
        """One draw from the base."""
        z = prior.base(k, context).draw(streams("base"))
        ones = z.new_ones(len(context))
        return GroupDraw(z, ones, torch.zeros_like(ones), ones)
