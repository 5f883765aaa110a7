"""Maximum mean discrepancy: how far two samples are apart, without a density of either.

MMD² = E k(x, x') + E k(y, y') − 2 E k(x, y)      (Gretton et al. 2012, unbiased U-statistic)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.errors import UserError

ROWS = 2_000
"""At most so many rows of either sample enter: the cost is quadratic."""

SCALES = (0.5, 1.0, 2.0)

Kernel = Callable[[Tensor, Tensor], Tensor]
"""kernel(a (n, d), b (m, d)) is (n, m)."""


@dataclass(frozen=True)
class MMD:
    """An estimate of MMD² with its standard error; ``bandwidths`` are those of its RBF kernels, data units."""

    value: float
    stderr: float
    bandwidths: list[float]


def unbiased_mmd2(x: Tensor, y: Tensor, kernel: Kernel) -> tuple[float, float]:
    """The unbiased estimate of MMD² from equally many rows, and its standard error.

    The estimate is the mean over i ≠ j of h_ij = k(x_i, x_j) + k(y_i, y_j) − k(x_i, y_j) − k(x_j, y_i). Its variance is
    4 ζ1/n + 2 ζ2/n² (Hoeffding 1948), ζ2 the variance of h and ζ1 that of its row means, less what ζ2 adds to them; the
    second term is what remains where the samples agree.

    Args:
        x, y: (n, d).

    Raises:
        UserError: fewer than two rows.
    """
    n = len(x)
    if n < 2:
        raise UserError(f"MMD needs at least 2 samples of each kind, not {n}; draw more")
    cross = kernel(x, y)
    h = kernel(x, x) + kernel(y, y) - cross - cross.T
    h = h - torch.diag(h.diag())
    row_means = h.sum(1) / (n - 1)
    value = row_means.mean()
    whole = ((h**2).sum() / (n * (n - 1)) - value**2).clamp(min=0)
    first_order = (row_means.var() - whole / (n - 1)).clamp(min=0)
    variance = 4 * first_order / n + 2 * whole / (n * (n - 1))
    return value.item(), math.sqrt(variance.item())


def median_distance(x: Tensor) -> float:
    """Median distance between different rows of x (n, d)."""
    return torch.pdist(x[:1_000]).median().item()


def _rbf(bandwidths: list[float]) -> Kernel:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squares = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        return sum((torch.exp(-squares / (2 * width**2)) for width in bandwidths), torch.zeros_like(squares)) / len(
            bandwidths
        )

    return kernel


def mmd(reference: Tensor, sample: Tensor, bandwidths: list[float] | None = None) -> MMD:
    """MMD² under the mean of RBF kernels around the median heuristic.

    Args:
        reference, sample: (n, …) and (m, …), flattened; the first min(n, m, ROWS) rows of each enter, so they should be in
            no particular order.
        bandwidths: of the kernels; by default SCALES times the reference's median distance. Only numbers with the same
            bandwidths can be compared, so they are part of the result.
    """
    n = min(len(reference), len(sample), ROWS)
    x, y = reference[:n].flatten(1).double(), sample[:n].flatten(1).double()
    chosen = bandwidths or [scale * median_distance(x) for scale in SCALES]
    return MMD(*unbiased_mmd2(x, y, _rbf(chosen)), chosen)
