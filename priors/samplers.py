"""How to draw from a learned prior, group by group: what a sampler is; ancestral and Langevin (SIR: ``priors/sir.py``).

A sampler sees a prior's base and log r, and nothing of the method behind them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from models.protocol import LearnedPrior
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

    weighs: ClassVar[bool] = False  # whether it keeps one of many weighed proposals, so that a small ESS is a collapse

    class Options(options.Options):
        """Settings of the sampler, as they stand in params.yaml."""

    def __init__(self, options: Options):
        self.options = options

    @property
    def accepts(self) -> bool:
        """Whether it accepts or refuses steps, so that an acceptance rate means something."""
        return False

    def refuses(self, exact: bool) -> str | None:  # noqa: ARG002
        """Why this sampler cannot draw from a prior that is exact or not, and what can; None if it can."""
        return None

    @abstractmethod
    def draw(self, prior: LearnedPrior, k: int, context: Tensor, streams: Streams) -> GroupDraw:
        """Draw group k in the contexts (batch, …)."""


class Ancestral(Sampler):
    """z_k from the base itself: exact where the prior corrects nothing."""

    def refuses(self, exact: bool) -> str | None:
        """A prior that corrects its base has no direct sampler."""
        return None if exact else "ancestral sampling would ignore its ratio; use sir or langevin"

    def draw(self, prior: LearnedPrior, k: int, context: Tensor, streams: Streams) -> GroupDraw:
        """One draw from the base."""
        z = prior.base(k, context).draw(streams("base"))
        ones = z.new_ones(len(context))
        return GroupDraw(z, ones, torch.zeros_like(ones), ones)


class Langevin(Sampler):
    """z ← z − (ε/2) V ∇E + (ε V)^½ η with E = −log r − log base, started from the base.

    V is the variance of the base, coordinate by coordinate, so that ε means the same in a sharp conditional prior as in
    N(0, I). With ``metropolis`` each step is accepted or refused (MALA), and the chain's stationary law is exact.
    """

    class Options(Sampler.Options):
        """``steps``; ``step_size``: ε, in units of the base's variance; ``metropolis``: correct each step."""

        steps: Annotated[int, Field(ge=1)]
        step_size: Annotated[float, Field(gt=0)]
        metropolis: bool = False

    options: Options

    @property
    def accepts(self) -> bool:
        """With the Metropolis correction."""
        return self.options.metropolis

    def draw(self, prior: LearnedPrior, k: int, context: Tensor, streams: Streams) -> GroupDraw:
        """Run one chain per row; its last state is the draw."""
        step, base = self.options.step_size, prior.base(k, context)
        variance, moving, judging = base.variance, streams("langevin"), streams("metropolis")

        def forward_mean(z: Tensor) -> tuple[Tensor, Tensor]:
            """log density up to a constant, and the mean of the next state."""
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                log_density = prior.log_ratio(k, z, context).float() + base.log_prob(z)
                (gradient,) = torch.autograd.grad(log_density.sum(), z)
            return log_density.detach(), z.detach() + step / 2 * variance * gradient

        def log_transition(to: Tensor, mean: Tensor) -> Tensor:
            return -((to - mean) ** 2 / (2 * step * variance)).flatten(1).sum(1)

        z = base.draw(streams("base")).detach()
        log_density, mean = forward_mean(z)
        accepted, trace = torch.zeros_like(log_density), []
        for _ in range(self.options.steps):
            proposal = mean + (step * variance).sqrt() * moving.normal((), tuple(z.shape))
            new_log_density, new_mean = forward_mean(proposal)
            accept = torch.ones_like(log_density, dtype=torch.bool)
            if self.options.metropolis:
                odds = new_log_density - log_density + log_transition(z, new_mean) - log_transition(proposal, mean)
                accept = judging.uniform((), (len(z),)).log() < odds
            wide = accept.view(-1, *[1] * (z.dim() - 1))
            z, mean = torch.where(wide, proposal, z), torch.where(wide, new_mean, mean)
            log_density = torch.where(accept, new_log_density, log_density)
            accepted += accept
            trace.append(log_density)
        evaluations = torch.full_like(accepted, self.options.steps + 1)
        return GroupDraw(z, chain_ess_fraction(torch.stack(trace)), evaluations, accepted / self.options.steps)


def chain_ess_fraction(trace: Tensor) -> Tensor:
    """Effective sample size of Markov chains as a fraction of their states, from a scalar followed along them.

    One over the integrated autocorrelation time, whose sum stops at the first lag without positive correlation.

    Args:
        trace: (states, chains).

    Returns:
        Shape (chains,), in (0, 1]; one state's worth for a chain that never moved.
    """
    states = len(trace)
    spectrum = torch.fft.rfft(trace - trace.mean(0), 2 * states, dim=0)
    covariance = torch.fft.irfft(spectrum.abs() ** 2, dim=0)[:states]
    moved = covariance[0] > 0
    correlation = covariance / torch.where(moved, covariance[0], 1)
    positive = (correlation > 0).cumprod(0)
    time = 1 + 2 * (correlation * positive)[1:].sum(0)
    return torch.where(moved, 1 / time, 1 / states)
