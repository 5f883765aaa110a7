"""Priors over one group whose distribution is known exactly."""

import math

import torch
from scipy import stats

from models.distributions import DiagonalNormal


class Known:
    """p = N(0, 1) and an exact ratio: r = q / p."""

    exact = False
    proposes = False

    def __init__(self, log_q, dtype=torch.float64):
        self.log_q, self.dtype = log_q, dtype

    def base(self, k, context):
        zeros = torch.zeros(len(context), 1, dtype=self.dtype)
        return DiagonalNormal(zeros, torch.ones_like(zeros))

    def proposal(self, k, context):
        return self.base(k, context)

    def log_ratio(self, k, z, context):
        return self.log_q(z[..., 0]) - self.base(k, context).log_prob(z)

    def prepare(self, k, context):
        return context

    def prepared_log_ratio(self, k, z, prepared):
        return self.log_ratio(k, z, prepared)

    def footprint(self, k):
        return 1


def two_modes(z):
    parts = torch.stack([math.log(0.3) - (z + 1) ** 2 / (2 * 0.3**2), math.log(0.7) - (z - 1) ** 2 / (2 * 0.5**2)])
    return torch.logsumexp(parts - torch.tensor([0.3, 0.5]).log().view(-1, *[1] * z.dim()), 0) - math.log(2 * math.pi) / 2


def cdf(z):
    return 0.3 * stats.norm.cdf(z, -1, 0.3) + 0.7 * stats.norm.cdf(z, 1, 0.5)
