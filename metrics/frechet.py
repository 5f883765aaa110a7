"""Fréchet distance between Gaussians fitted to features: the FID, for whichever network the features come from.

d² = |μ_a − μ_b|² + Tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½)      (Dowson and Landau 1982; Heusel et al. 2017)
"""

import math
import warnings
from dataclasses import dataclass
from functools import reduce

import torch
from scipy.linalg import lapack
from torch import Tensor

from runtime.errors import UserError
from runtime.randomness import generator

BLOCKS = 20
ROWS_AT_ONCE = 2**13
EIGEN_ROOT = 512
"""So many features take their root from eigenvectors: some milliseconds, and numbers on record keep their last bits."""


@dataclass(frozen=True)
class Moments:
    """Sums of feature vectors, in float64; two of them add up, so features can stream through.

    Attributes:
        count: number of vectors.
        total: their sum, (d,).
        outer: the sum of their outer products, (d, d).
    """

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Moments of features (n, d)."""
        features = features.double()
        return cls(len(features), features.sum(0), features.T @ features)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def __sub__(self, other: "Moments") -> "Moments":
        return Moments(self.count - other.count, self.total - other.total, self.outer - other.outer)

    @property
    def mean(self) -> Tensor:
        """(d,)."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased, (d, d). Raises UserError for fewer than two vectors."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, not {self.count}; draw more")
        of_means = torch.outer(self.mean, self.mean).mul_(self.count)
        return torch.sub(self.outer, of_means, out=of_means).div_(self.count - 1)  # in place: d² numbers are 34 MB at 2 048


def _root(symmetric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _factor(covariance: Tensor) -> Tensor | None:
    """A lower L with L Lᵀ = covariance (d, d), where it is positive definite."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    return None if failed else factor


def _product_root(a: Tensor, b: Tensor) -> Tensor:
    """Tr (Σ_a Σ_b)^½, of covariances (d, d): a scalar.

    With any F of F Fᵀ = Σ_a, Σ_a Σ_b has the eigenvalues of the symmetric Fᵀ Σ_b F: real by construction, where a general
    matrix root of the product returns complex rounding errors. A Cholesky factor is had for a tenth of the eigenvectors'
    price, which Σ_a^½ takes, and LAPACK's ``sygst`` forms its Fᵀ Σ_b F, of which it fills the lower half, in less than half
    the time of two products; what is singular, on either side, has no such factor.
    """
    if len(a) > EIGEN_ROOT:
        for first, second in ((a, b), (b, a)):
            factor = _factor(first)
            if factor is not None:
                product, _ = lapack.dsygst(second.numpy().T, factor.numpy(), itype=2, lower=1)
                return torch.linalg.eigvalsh(torch.from_numpy(product)).clamp(min=0).sqrt().sum()
    root = _root(a)
    return torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance, in float64."""
    first, second = a.covariance, b.covariance
    shared = _product_root(first, second)
    traces = first.diagonal().sum() + second.diagonal().sum()
    return (((a.mean - b.mean) ** 2).sum() + traces - 2 * shared).item()


def require_finite(**named: Tensor) -> None:
    """Refuse feature vectors, each argument (n, d), that are not finite: UserError with the argument's name and how many."""
    for name, rows in named.items():
        broken = sum(int((~part.isfinite()).any(1).sum()) for part in rows.split(ROWS_AT_ONCE))
        if broken:
            raise UserError(
                f"{name}: the features of {broken} of {len(rows)} images are not finite; look for NaN or infinite pixels in "
                "the images, whose model or sampler diverged"
            )


def fid(features: Tensor, reference: Tensor, seed: int) -> tuple[float, float]:
    """Fréchet distance of features (n, d) to a reference (m, d), and its standard error.

    The error is a delete-a-group jackknife over both samples at once, with groups of rows chosen by ``seed``, BLOCKS of them
    or as many as hold two rows each. Where the two distributions agree it is about √2 too large, as the jackknife of a
    quadratic without a linear part is; away from there it is right. (A bootstrap repeats rows, which lowers the rank of the
    covariances: it errs more where they agree, the more the larger d/n.) The distance itself is biased upwards, the more the
    fewer the rows: compare equal n alone.

    Rows may be a file, mapped: ROWS_AT_ONCE are held in float64, beside the moments, (2 BLOCKS + 8) d² numbers: 1.6 GB for
    2 048 features.

    Raises:
        UserError: fewer than four rows of either, or features that are not finite.
    """
    require_finite(features=features, reference=reference)
    fewest = min(len(features), len(reference))
    if fewest < 4:
        raise UserError(f"FID with a standard error needs at least 4 images of each kind, not {fewest}; draw more")
    if fewest <= features.shape[1]:
        warnings.warn(f"FID of {fewest} images with {features.shape[1]} features: a covariance is singular", stacklevel=2)
    blocks = min(BLOCKS, fewest // 2)
    a, b = _blocks(features, blocks, seed, "fid-features"), _blocks(reference, blocks, seed, "fid-reference")
    whole_a, whole_b = reduce(Moments.__add__, a), reduce(Moments.__add__, b)
    without = [frechet_distance(whole_a - x, whole_b - y) for x, y in zip(a, b, strict=True)]
    stderr = (blocks - 1) / math.sqrt(blocks) * torch.tensor(without, dtype=torch.float64).std().item()
    return frechet_distance(whole_a, whole_b), stderr


def _blocks(rows: Tensor, count: int, seed: int, purpose: str) -> list[Moments]:
    shuffled = torch.randperm(len(rows), generator=generator(seed, purpose))
    return [
        reduce(Moments.__add__, (Moments.of(rows[part]) for part in chosen.split(ROWS_AT_ONCE)))
        for chosen in shuffled.tensor_split(count)
    ]
