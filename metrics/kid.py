"""Kernel inception distance: the unbiased MMD² of features under a cubic kernel (Bińkowski et al. 2018)."""

import torch
from torch import Tensor

from metrics.mmd import ROWS, unbiased_mmd2
from runtime.randomness import generator


def cubic(a: Tensor, b: Tensor) -> Tensor:
    """(a·b/d + 1)³ for features (n, d) and (m, d): shape (n, m)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def kid(features: Tensor, reference: Tensor, seed: int) -> tuple[float, float]:
    """KID and its standard error.

    Args:
        features, reference: (n, d) and (m, d); equally many rows of each enter, chosen at random.
        seed: names the choice.
    """
    n = min(len(features), len(reference), ROWS)
    x, y = (
        rows[torch.randperm(len(rows), generator=generator(seed, f"kid-{name}"))[:n]].double()
        for name, rows in (("features", features), ("reference", reference))
    )
    return unbiased_mmd2(x, y, cubic)
