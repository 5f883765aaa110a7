"""The decoder's output distributions: an axis of its own, since the same network scores very differently under each."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from models.distributions import Bernoulli, DiagonalNormal

LikelihoodName = Literal["normal", "bernoulli"]


class NormalLikelihood(nn.Module):
    """Normal around the decoder's output, with one learned standard deviation for all coordinates (data units)."""

    def __init__(self, initial_std: float):
        super().__init__()
        self.log_std = nn.Parameter(torch.tensor(math.log(initial_std)))

    def forward(self, output: Tensor) -> DiagonalNormal:
        """The likelihood for decoder outputs (batch, *data shape)."""
        return DiagonalNormal(output, self.log_std.exp().expand_as(output))


class BernoulliLikelihood(nn.Module):
    """Independent binary pixels with the decoder's output as logits."""

    def forward(self, output: Tensor) -> Bernoulli:
        """The likelihood for decoder outputs (batch, *data shape)."""
        return Bernoulli(output)


def likelihood(name: LikelihoodName, initial_std: float) -> nn.Module:
    """The likelihood module of that name; ``initial_std`` matters to the Normal alone."""
    return NormalLikelihood(initial_std) if name == "normal" else BernoulliLikelihood()
