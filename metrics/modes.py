"""Where samples fall when the true modes are known."""

import math

import torch
from torch import Tensor

RADIUS = 4.0
"""In standard deviations of a mode. The truth itself puts exp(−8) = 0.03 % of its points farther out, in two dimensions."""


def _near(x: Tensor, means: Tensor, sigma: float) -> Tensor:
    return torch.cdist(x.double(), means.double()) <= RADIUS * sigma


def off_mode_share(x: Tensor, means: Tensor, sigma: float) -> tuple[float, float]:
    """Share of samples (n, d) farther than RADIUS·sigma from every mean (modes, d), and its binomial standard error."""
    share = 1 - _near(x, means, sigma).any(1).double().mean().item()
    return share, math.sqrt(max(0.0, share * (1 - share)) / len(x))


def modes_hit(x: Tensor, means: Tensor, sigma: float) -> int:
    """Number of modes with at least one sample within RADIUS·sigma."""
    return int(_near(x, means, sigma).any(0).sum())
