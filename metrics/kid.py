"""Kernel inception distance: the unbiased MMD² of features under a cubic kernel (Bińkowski et al. 2018)."""

import math

import torch
from torch import Tensor

from metrics.frechet import require_finite
from metrics.mmd import ROWS, unbiased_mmd2
from runtime.randomness import generator


def cubic(a: Tensor, b: Tensor) -> Tensor:
    """(a·b/d + 1)³ for features (n, d) and (m, d): shape (n, m)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def kid(features: Tensor, reference: Tensor, seed: int) -> tuple[float, float]:
    """KID and its standard error: the mean over disjoint, hence independent, blocks of at most ROWS rows of either.

    Args:
        features, reference: (n, d) and (m, d); min(n, m) rows of each enter, in an order chosen at random.
        seed: names the order.

    Raises:
        UserError: fewer than two rows, or features that are not finite.
    """
    require_finite(features=features, reference=reference)
    n = min(len(features), len(reference))
    blocks = max(1, math.ceil(n / ROWS))
    x, y = (
        rows[torch.randperm(len(rows), generator=generator(seed, f"kid-{name}"))[:n]].tensor_split(blocks)
        for name, rows in (("features", features), ("reference", reference))
    )
    found = [unbiased_mmd2(a.double(), b.double(), cubic) for a, b in zip(x, y, strict=True)]
    return sum(value for value, _ in found) / blocks, math.hypot(*(error for _, error in found)) / blocks
