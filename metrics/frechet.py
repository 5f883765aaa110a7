"""Fréchet distance between Gaussians fitted to features: the FID, for whichever network the features come from.

d² = |μ_a − μ_b|² + Tr(Σ_a + Σ_b − 2 (Σ_a^½ Σ_b Σ_a^½)^½)      (Dowson and Landau 1982; Heusel et al. 2017)
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.errors import UserError
from runtime.randomness import generator

RESAMPLES = 20


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

    @property
    def mean(self) -> Tensor:
        """(d,)."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased, (d, d). Raises UserError for fewer than two vectors."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, not {self.count}; draw more")
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def _root(symmetric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance, in float64.

    The trace of the root of Σ_a Σ_b is taken from the eigenvalues of the symmetric Σ_a^½ Σ_b Σ_a^½: real by construction,
    where a general matrix root of the product returns complex rounding errors.
    """
    root = _root(a.covariance)
    shared = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    traces = a.covariance.diagonal().sum() + b.covariance.diagonal().sum()
    return (((a.mean - b.mean) ** 2).sum() + traces - 2 * shared).item()


def fid(features: Tensor, reference: Tensor, seed: int) -> tuple[float, float]:
    """Fréchet distance of features (n, d) to a reference (m, d), and its standard error.

    The error is the standard deviation over RESAMPLES bootstrap resamples of both, as the reference is a sample too. The
    distance itself is biased upwards, the more the fewer the rows: compare equal n alone.

    Raises:
        UserError: fewer than two rows.
    """
    if len(features) <= features.shape[1]:
        warnings.warn(
            f"FID of {len(features)} images with {features.shape[1]} features: the covariance is singular", stacklevel=2
        )
    moments = Moments.of(reference)
    value = frechet_distance(Moments.of(features), moments)
    stream = generator(seed, "fid-bootstrap")

    def resampled(rows: Tensor) -> Moments:
        return Moments.of(rows[torch.randint(len(rows), (len(rows),), generator=stream)])

    replicas = torch.tensor([frechet_distance(resampled(features), resampled(reference)) for _ in range(RESAMPLES)])
    return value, replicas.std().item()
