"""The decoder's output distributions: an axis of its own, since the same network scores very differently under each.

Each maps the decoder's output (batch, outputs(channels), …) to a distribution over (batch, channels, …).
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from models.distributions import Bernoulli, DiagonalNormal, LogisticMixture, soft_clamp

LikelihoodName = Literal["normal", "pixel-normal", "bernoulli", "logistic-mixture"]

COMPONENTS = 10


class NormalLikelihood(nn.Module):
    """Normal around the decoder's output, with one learned standard deviation for all coordinates (data units)."""

    def __init__(self, initial_std: float):
        super().__init__()
        self.log_std = nn.Parameter(torch.tensor(math.log(initial_std)))

    def outputs(self, channels: int) -> int:
        """The mean."""
        return channels

    def forward(self, output: Tensor) -> DiagonalNormal:
        """The likelihood for decoder outputs (batch, *data shape)."""
        return DiagonalNormal(output, self.log_std.exp().expand_as(output))


class PixelNormalLikelihood(nn.Module):
    """NVAE's Normal decoder: mean and log-sigma of every coordinate, soft-clamped as if data in [0, 1] were in [-1, 1]."""

    def outputs(self, channels: int) -> int:
        """Mean and log-sigma."""
        return 2 * channels

    def forward(self, output: Tensor) -> DiagonalNormal:
        """The likelihood for decoder outputs (batch, 2 channels, …)."""
        mean, log_std = output.chunk(2, dim=1)
        return DiagonalNormal((soft_clamp(mean) + 1) / 2, (soft_clamp(log_std).exp() + 1e-2) / 2)


class BernoulliLikelihood(nn.Module):
    """Independent binary pixels with the decoder's output as logits."""

    def outputs(self, channels: int) -> int:
        """The logits."""
        return channels

    def forward(self, output: Tensor) -> Bernoulli:
        """The likelihood for decoder outputs (batch, *data shape)."""
        return Bernoulli(output)


class LogisticMixtureLikelihood(nn.Module):
    """PixelCNN++'s discretised logistic mixture over 8-bit images, for one or three channels."""

    def outputs(self, channels: int) -> int:
        """Weights; means and log-scales of every channel; and how later channels' means depend on earlier channels."""
        return COMPONENTS * (1 + 2 * channels + channels * (channels - 1) // 2)

    def forward(self, output: Tensor) -> LogisticMixture:
        """The likelihood for decoder outputs (batch, outputs(channels), h, w)."""
        return LogisticMixture(output.unflatten(1, (COMPONENTS, -1)).movedim(1, -1))


LIKELIHOODS: dict[str, Any] = dict(
    zip(
        get_args(LikelihoodName),
        (NormalLikelihood, PixelNormalLikelihood, BernoulliLikelihood, LogisticMixtureLikelihood),
        strict=True,
    )
)


def likelihood(name: LikelihoodName, initial_std: float) -> Any:
    """The likelihood module of that name; ``initial_std`` matters to the Normal with one standard deviation alone."""
    return LIKELIHOODS[name](initial_std) if name == "normal" else LIKELIHOODS[name]()
