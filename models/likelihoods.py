"""The decoder's output distributions: an axis of its own, since the same network scores very differently under each.

Each maps the decoder's output (batch, outputs(channels), …) to a distribution over (batch, channels, …).
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from models.distributions import (
    Bernoulli,
    DiagonalNormal,
    LogisticMixture,
    ReleasedLogisticMixture,
    ReleasedNormal,
    soft_clamp,
)

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

    def __init__(self, released: bool = False):
        super().__init__()
        self.family = ReleasedNormal if released else DiagonalNormal

    def outputs(self, channels: int) -> int:
        """Mean and log-sigma."""
        return 2 * channels

    def forward(self, output: Tensor) -> DiagonalNormal:
        """The likelihood for decoder outputs (batch, 2 channels, …)."""
        mean, log_std = output.chunk(2, dim=1)
        return self.family((soft_clamp(mean) + 1) / 2, (soft_clamp(log_std).exp() + 1e-2) / 2)


class BernoulliLikelihood(nn.Module):
    """Independent binary pixels with the decoder's output as logits."""

    def outputs(self, channels: int) -> int:
        """The logits."""
        return channels

    def forward(self, output: Tensor) -> Bernoulli:
        """The likelihood for decoder outputs (batch, *data shape)."""
        return Bernoulli(output)


class LogisticMixtureLikelihood(nn.Module):
    """PixelCNN++'s discretised logistic mixture over images of 8 bits or fewer, for one or three channels.

    Outputs, each of COMPONENTS channels: the weights; then, colour by colour, its means, its log-scales and, of three
    colours, a coefficient: green's dependence on red stands with red, blue's on red and on green with green and blue.
    """

    def __init__(self, bits: int = 8, released: bool = False):
        super().__init__()
        self.bits = bits
        self.family = ReleasedLogisticMixture if released else LogisticMixture

    def outputs(self, channels: int) -> int:
        """Weights; means and log-scales of every channel; and how later channels' means depend on earlier channels."""
        return COMPONENTS * (1 + 2 * channels + channels * (channels - 1) // 2)

    def forward(self, output: Tensor) -> LogisticMixture:
        """The likelihood for decoder outputs (batch, outputs(channels), h, w)."""
        parts = output.unflatten(1, (-1, COMPONENTS)).movedim(2, -1)
        weights, colours = parts[:, :1], parts[:, 1:]
        each = 3 if colours.shape[1] == 9 else 2  # a colour has no coefficient where it is alone
        return self.family(torch.cat([weights, *(colours[:, part::each] for part in range(each))], dim=1), self.bits)


LIKELIHOODS: dict[str, Any] = dict(
    zip(
        get_args(LikelihoodName),
        (NormalLikelihood, PixelNormalLikelihood, BernoulliLikelihood, LogisticMixtureLikelihood),
        strict=True,
    )
)


def likelihood(name: LikelihoodName, initial_std: float, bits: int = 8, released: bool = False) -> Any:
    """The likelihood module of that name.

    ``initial_std`` matters to the Normal with one standard deviation alone, ``bits`` to the mixture. ``released``: as NVAE's
    released code computes it, which differs for the Normal of pixels and the mixture.
    """
    settings: dict[str, dict[str, Any]] = {
        "normal": {"initial_std": initial_std},
        "pixel-normal": {"released": released},
        "bernoulli": {},
        "logistic-mixture": {"bits": bits, "released": released},
    }
    return LIKELIHOODS[name](**settings[name])
