"""Networks that score a latent variable in its context.

The part of the first layer that sees the context is computed once per image and added to every proposal's part, so a
thousand proposals in one context pay for the context once.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from models.protocol import Group
from runtime.options import Options


class NetworkOptions(Options):
    """``width``: units or channels. ``depth``: hidden layers of a perceptron, or residual blocks of a convolutional net."""

    width: Annotated[int, Field(ge=1)] = 128
    depth: Annotated[int, Field(ge=1)] = 3


def scorer(options: NetworkOptions, group: Group) -> nn.Module:
    """The network for a group: convolutional where the latent variable is a map, a perceptron where it is a vector."""
    return MapScorer(options, group) if len(group.latent) == 3 else VectorScorer(options, group)


class _Scorer(nn.Module):
    """score(z, context): (*lead, batch, *latent) and (batch, *context) to (*lead, batch)."""

    see_z: nn.Module
    see_context: nn.Module | None
    judge: nn.Module

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        """Score z in its context."""
        event = context.dim() - 1
        lead = z.shape[: z.dim() - event]
        hidden = self.see_z(z.flatten(0, len(lead) - 1)).unflatten(0, lead)
        if self.see_context is not None:
            hidden = hidden + self.see_context(context)
        return self.judge(hidden.flatten(0, len(lead) - 1)).reshape(lead)


class VectorScorer(_Scorer):
    """A perceptron with ReLU, for latent (d,) and context (e,), e possibly 0."""

    def __init__(self, options: NetworkOptions, group: Group):
        super().__init__()
        width = options.width
        self.see_z = nn.Linear(group.latent[0], width)
        self.see_context = nn.Linear(group.context[0], width, bias=False) if group.context[0] else None
        hidden = [layer for _ in range(options.depth - 1) for layer in (nn.Linear(width, width), nn.ReLU())]
        self.judge = nn.Sequential(nn.ReLU(), *hidden, nn.Linear(width, 1))


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate computed from the channels' means. (n, width, h, w) to the same."""

    def __init__(self, width: int):
        super().__init__()
        hidden = max(width // 16, 4)
        self.gate = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the gate."""
        return x * self.gate(x.mean((2, 3)))[:, :, None, None]


class Block(nn.Module):
    """x + SE(conv(swish(BN(conv(swish(BN(x))))))), the classifier's residual block."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            SqueezeExcitation(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return x + self.body(x)


class MapScorer(_Scorer):
    """Residual blocks, then the mean over positions, for latent (c, h, w) and context (e, h, w)."""

    def __init__(self, options: NetworkOptions, group: Group):
        super().__init__()
        width = options.width
        self.see_z = nn.Conv2d(group.latent[0], width, 3, padding=1)
        self.see_context = nn.Conv2d(group.context[0], width, 3, padding=1, bias=False)
        blocks = [Block(width) for _ in range(options.depth)]
        self.judge = nn.Sequential(
            *blocks, nn.BatchNorm2d(width), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1)
        )
