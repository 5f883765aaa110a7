"""Distributions that are drawn from with an explicit noise source.

They are torch's own, plus ``draw(noise, lead)``: torch's ``sample`` reads the global generator, which nothing here may.
"""

from typing import Protocol

import torch
from torch import Tensor, distributions

from runtime.randomness import Noise


class Distribution(Protocol):
    """A distribution over (batch, *event)."""

    @property
    def variance(self) -> Tensor:
        """Variance of every coordinate, shape (batch, *event)."""
        ...

    def log_prob(self, value: Tensor, /) -> Tensor:
        """Log density in nats of ``value`` (*lead, batch, *event): shape (*lead, batch)."""
        ...

    def draw(self, noise: Noise, lead: tuple[int, ...] = ()) -> Tensor:
        """Draws of shape (*lead, batch, *event), differentiable in the parameters where the family allows it."""
        ...


class DiagonalNormal(distributions.Independent):
    """Normal with independent coordinates; ``mean`` and ``std`` have shape (batch, *event)."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__(distributions.Normal(mean, std, validate_args=False), mean.dim() - 1, validate_args=False)

    def draw(self, noise: Noise, lead: tuple[int, ...] = ()) -> Tensor:
        """Reparameterised draws, shape (*lead, batch, *event)."""
        return self.base_dist.loc + self.base_dist.scale * noise.normal(lead, tuple(self.base_dist.loc.shape))


class Bernoulli(distributions.Independent):
    """Independent binary pixels; ``logits`` has shape (batch, *event)."""

    def __init__(self, logits: Tensor):
        super().__init__(distributions.Bernoulli(logits=logits, validate_args=False), logits.dim() - 1, False)

    def draw(self, noise: Noise, lead: tuple[int, ...] = ()) -> Tensor:
        """Draws in {0, 1}, shape (*lead, batch, *event)."""
        uniform = noise.uniform(lead, tuple(self.base_dist.logits.shape))
        return (uniform < self.base_dist.probs).to(self.base_dist.logits.dtype)


def soft_clamp(value: Tensor, bound: float = 5.0) -> Tensor:
    """Squash smoothly into (-bound, bound), as NVAE does to its means and log-sigmas."""
    return bound * torch.tanh(value / bound)


def kl_divergence(q: DiagonalNormal, p: DiagonalNormal) -> Tensor:
    """KL(q || p) in nats, shape (batch,)."""
    return distributions.kl_divergence(q, p)
