"""25 Gaussians on a grid: the debugging benchmark whose true density is known."""

import math
from pathlib import Path

import torch
from torch import Generator, Tensor

from runtime.randomness import generator

SIGMA = 0.05
MEANS = torch.cartesian_prod(torch.arange(-2.0, 3.0), torch.arange(-2.0, 3.0))  # (25, 2)

CEILING = -(math.log(25) + 1 + math.log(2 * math.pi) + 2 * math.log(SIGMA))
"""Expected log-likelihood of the truth itself, nats; no model does better. (The modes' overlap, e^-200, is neglected.)"""


def fresh(count: int, stream: Generator) -> Tensor:
    """New points, shape (count, 2)."""
    chosen = torch.randint(len(MEANS), (count,), generator=stream)
    return MEANS[chosen] + SIGMA * torch.randn(count, 2, generator=stream)


def log_density(x: Tensor) -> Tensor:
    """The true log density in nats of points (n, 2): shape (n,)."""
    squares = ((x[:, None] - MEANS.to(x)) ** 2).sum(2)
    return (-squares / (2 * SIGMA**2)).logsumexp(1) - math.log(len(MEANS) * 2 * math.pi * SIGMA**2)


def prepare(raw: Path) -> dict[str, Tensor]:  # noqa: ARG001 (nothing is downloaded)
    """The fixed validation and test points; training points are drawn fresh."""
    sizes = {"train": 10_000, "validation": 2_000, "test": 10_000}
    return {split: fresh(size, generator(0, f"gaussians25-{split}")) for split, size in sizes.items()}
