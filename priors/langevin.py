"""Langevin dynamics on a learned prior p ∝ base·r, group by group, from the base or from SIR, or jointly over all groups.

    z ← z + (ε/2) V ∇ log p(z) + (ε V)^½ η,   η ~ N(0, I)

With ``metropolis`` each step is accepted or refused (MALA, Roberts & Tweedie 1996), and the chain's stationary law is exact.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from models.protocol import HierarchicalVAE, LearnedPrior, descend
from priors.samplers import GroupDraw, Sampler, Streams
from priors.sir import SIR
from runtime.randomness import Noise


class Langevin(Sampler):
    """A chain for each group, started from the base, in the context that the groups before it ended in.

    V is the variance of the base, coordinate by coordinate, so that ε means the same in a sharp conditional prior as in
    N(0, I).
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
        return self.chain(prior, k, context, prior.base(k, context).draw(streams("base")), streams)

    def chain(self, prior: LearnedPrior, k: int, context: Tensor, start: Tensor, streams: Streams) -> GroupDraw:
        """Run one chain per row of ``start``, (batch, *latent shape)."""
        base = prior.base(k, context)

        def log_density(z: Tensor) -> Tensor:
            return prior.log_ratio(k, z, context).float() + base.log_prob(z)

        return run(start, log_density, base.variance, self.options, streams)


class ResampledLangevin(Langevin):
    """Chains that start from what SIR keeps of a few proposals, rather than from the base.

    SIR finds the region, which a chain of small steps takes long to reach; where few of M proposals carry the weight the
    chain then moves within it for less than more proposals cost. With ``metropolis`` the steps leave p ∝ base·r as it is, so
    they bring SIR's draw nearer to it, however many they are. Neither paper has this sampler.
    """

    class Options(Langevin.Options, SIR.Options):
        """Those of ``langevin`` and of ``sir``, whose ``precision`` is that of the proposals' scores alone."""

    options: Options

    def draw(self, prior: LearnedPrior, k: int, context: Tensor, streams: Streams) -> GroupDraw:
        """Resample, then run one chain per row; ``ess`` is that of the chain."""
        resampled = SIR(self.options).draw(prior, k, context, streams)
        chain = self.chain(prior, k, context, resampled.z, streams)
        return replace(chain, proposals=chain.proposals + resampled.proposals)


class JointLangevin(Langevin):
    """One chain for all groups together, in the space of the noise that the base is drawn from.

    z_k = base_k(ε_k; c_k) with ε ~ N(0, I) turns base·r into N(ε; 0, I) Π_k r_k(z_k(ε), c_k(ε)): groups move together, and a
    later group can correct an earlier one. V = 1. Every step is a top-down pass of the model and its gradient.
    """

    def refuses(self, exact: bool, smooth: bool) -> str | None:  # noqa: ARG002
        """Gradients go through the draw of the base."""
        return None if smooth else "a mixture is not drawn smoothly from Normal noise; use sir or langevin"

    def draw(self, prior: LearnedPrior, k: int, context: Tensor, streams: Streams) -> GroupDraw:
        """Not group by group. Raises NotImplementedError; see :meth:`top_down`."""
        raise NotImplementedError

    def top_down(
        self, model: HierarchicalVAE, prior: LearnedPrior, batch: int, streams: Callable[[int], Streams]
    ) -> tuple[Tensor, list[GroupDraw]]:
        """Run one chain per row over the noise of all groups."""
        shapes = [group.latent for group in model.layout()]
        sizes = [torch.Size(shape).numel() for shape in shapes]

        def decoded(noise: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
            """The context to decode from, the sum of log r, and every z."""
            given = [part.unflatten(1, shape) for part, shape in zip(noise.split(sizes, 1), shapes, strict=True)]
            total, codes = noise.new_zeros(batch), []

            def choose(k: int, context: Tensor) -> Tensor:
                nonlocal total
                codes.append(prior.base(k, context).draw(_Given(given[k])))
                total = total + prior.log_ratio(k, codes[-1], context).float()
                return codes[-1]

            return descend(model, batch, choose), total, codes

        start = torch.cat([streams(k)("base").normal((), (batch, *shape)).flatten(1) for k, shape in enumerate(shapes)], 1)
        chain = run(
            start,
            lambda noise: decoded(noise)[1] - (noise**2).sum(1) / 2,
            torch.ones_like(start),
            self.options,
            streams(0),
        )
        context, _, codes = decoded(chain.z)
        return context, [GroupDraw(z, chain.ess, chain.proposals, chain.acceptance) for z in codes]


class _Given(Noise):
    """Stands in for a source of noise: the Normal numbers that a base is drawn from are given."""

    def __init__(self, numbers: Tensor):
        self.numbers = numbers

    def normal(self, lead: tuple[int, ...], batch: tuple[int, ...]) -> Tensor:
        """The given numbers."""
        return self.numbers.view(*lead, *batch)


def run(
    start: Tensor, log_density: Callable[[Tensor], Tensor], variance: Tensor, options: Langevin.Options, streams: Streams
) -> GroupDraw:
    """One chain per row of ``start`` (batch, …), with preconditioner ``variance`` of the same shape.

    ``log_density`` maps states to (batch,), nats, up to a constant.
    """
    step, moving, judging = options.step_size, streams("langevin"), streams("metropolis")

    def forward_mean(z: Tensor) -> tuple[Tensor, Tensor]:
        """log density, and the mean of the next state."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = log_density(z)
            (gradient,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), z.detach() + step / 2 * variance * gradient

    def log_transition(to: Tensor, mean: Tensor) -> Tensor:
        return -((to - mean) ** 2 / (2 * step * variance)).flatten(1).sum(1)

    z = start.detach()
    value, mean = forward_mean(z)
    accepted, trace = torch.zeros_like(value), []
    for _ in range(options.steps):
        proposal = mean + (step * variance).sqrt() * moving.normal((), tuple(z.shape))
        new_value, new_mean = forward_mean(proposal)
        accept = torch.ones_like(value, dtype=torch.bool)
        if options.metropolis:
            odds = new_value - value + log_transition(z, new_mean) - log_transition(proposal, mean)
            accept = judging.uniform((), (len(z),)).log() < odds
        wide = accept.view(-1, *[1] * (z.dim() - 1))
        z, mean = torch.where(wide, proposal, z), torch.where(wide, new_mean, mean)
        value = torch.where(accept, new_value, value)
        accepted += accept
        trace.append(value)
    evaluations = torch.full_like(accepted, options.steps + 1)
    return GroupDraw(z, chain_ess_fraction(torch.stack(trace)), evaluations, accepted / options.steps)


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
