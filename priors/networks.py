"""Networks that score a latent variable in its context.

The part of the first layer that sees the context is computed once per image and added to every proposal's part, so a
thousand proposals in one context pay for the context once.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from models.layers import SqueezeExcitation
from models.protocol import Group
from runtime.options import Options, unless


class NetworkOptions(Options):
    """``width``: units or channels. ``depth``: residual blocks.

    ``halvings``: of a convolutional net, how often a block with stride 2 follows that halves the side and doubles the
    channels, with ``depth`` more blocks after it. ``context``: whether the network sees the context at all. ``first``: units
    of a residual perceptron that scores the first group's latent map as a whole, since its context says nothing;
    convolutions there too if absent. ``standardise``: see z less its mean, over its standard deviation, each latent's or
    channel's, as a batch norm without parameters has them: for codes far from unit spread, which a network that starts from
    the usual weights cannot tell apart.
    """

    width: Annotated[int, Field(ge=1)] = 128
    depth: Annotated[int, Field(ge=1)] = 3
    halvings: Annotated[int, Field(ge=0)] = 0
    context: bool = True
    first: Annotated[int, Field(ge=1)] | None = None
    standardise: Annotated[bool, unless(False)] = False


def scorer(options: NetworkOptions, group: Group) -> "Scorer | FlattenedScorer":
    """The network for a group: convolutional where the latent variable is a map, a perceptron where it is a vector."""
    if len(group.latent) == 1:
        return VectorScorer(options, group)
    if group.k == 0 and options.first is not None:
        return FlattenedScorer(options, group)
    return MapScorer(options, group)


class Scorer(nn.Module):
    """score(z, prepare(context)): (*lead, batch, *latent) and (batch, *context) to (*lead, batch).

    Attributes:
        footprint: numbers that the widest layer holds for one z.
    """

    event: ClassVar[int]  # dimensions of one z
    see_z: nn.Module
    see_context: nn.Module | None
    judge: nn.Module
    footprint: int

    def prepare(self, context: Tensor) -> Tensor:
        """The first layer's part of the context (batch, …); nothing, (batch, 0), where the context is not looked at."""
        return context.new_zeros(len(context), 0) if self.see_context is None else self.see_context(context)

    def forward(self, z: Tensor, prepared: Tensor) -> Tensor:
        """Score z in a prepared context."""
        lead = z.shape[: z.dim() - self.event]
        hidden = self.see_z(z.flatten(0, len(lead) - 1)).unflatten(0, lead)
        if self.see_context is not None:
            hidden = hidden + prepared
        return self.judge(hidden.flatten(0, len(lead) - 1)).reshape(lead)


def _seeing(options: NetworkOptions, norm: type[nn.BatchNorm1d | nn.BatchNorm2d], first: nn.Linear | nn.Conv2d) -> nn.Module:
    """The layer that sees z, behind what standardises z if that is asked for."""
    if not options.standardise:
        return first
    seen = first.in_features if isinstance(first, nn.Linear) else first.in_channels
    return nn.Sequential(norm(seen, affine=False), first)


class Residual(nn.Module):
    """x + W swish(W swish(x))."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(n, width) to the same."""
        return x + self.body(x)


class VectorScorer(Scorer):
    """A residual perceptron with swish, for latent (d,) and context (e,), e possibly 0."""

    event = 1

    def __init__(self, options: NetworkOptions, group: Group):
        super().__init__()
        self.footprint = width = options.width
        self.see_z = _seeing(options, nn.BatchNorm1d, nn.Linear(group.latent[0], width))
        seen = group.context[0] if options.context else 0
        self.see_context = nn.Linear(seen, width, bias=False) if seen else None
        self.judge = nn.Sequential(*(Residual(width) for _ in range(options.depth)), nn.SiLU(), nn.Linear(width, 1))


class FlattenedScorer(nn.Module):
    """A residual perceptron over a latent map (c, h, w) as a vector; the context is not looked at."""

    def __init__(self, options: NetworkOptions, group: Group):
        super().__init__()
        flat = Group(group.k, (torch.Size(group.latent).numel(),), (0,))
        self.vector = VectorScorer(options.model_copy(update={"width": options.first}), flat)
        self.footprint = self.vector.footprint

    def prepare(self, context: Tensor) -> Tensor:
        """Nothing of the context: (batch, 0)."""
        return context.new_zeros(len(context), 0)

    def forward(self, z: Tensor, prepared: Tensor) -> Tensor:
        """z (*lead, batch, c, h, w) to (*lead, batch)."""
        return self.vector(z.flatten(-3), prepared)


class BlockA(nn.Module):
    """x + SE(conv(swish(BN(conv(swish(BN(x)))))))."""

    def __init__(self, width: int):
        super().__init__()
        self.body = _body(width, width, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) to the same."""
        return x + self.body(x)


class BlockB(nn.Module):
    """Block A with stride 2 and twice the channels; a 1x1 convolution of every second position for the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.skip = nn.Conv2d(width, 2 * width, 1)
        self.body = _body(width, 2 * width, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) to (n, 2 width, h / 2, w / 2), halves rounded up."""
        return self.skip(x[:, :, ::2, ::2]) + self.body(x)


def _body(width: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(width),
        nn.SiLU(),
        nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.SiLU(),
        nn.Conv2d(out, out, 3, padding=1),
        SqueezeExcitation(out),
    )


class MapScorer(Scorer):
    """Residual blocks, then the mean over positions, for latent (c, h, w) and context (e, h, w)."""

    event = 3

    def __init__(self, options: NetworkOptions, group: Group):
        super().__init__()
        width = options.width
        self.footprint = width * group.latent[1] * group.latent[2]
        self.see_z = _seeing(options, nn.BatchNorm2d, nn.Conv2d(group.latent[0], width, 3, padding=1))
        self.see_context = nn.Conv2d(group.context[0], width, 3, padding=1, bias=False) if options.context else None
        blocks: list[nn.Module] = [BlockA(width) for _ in range(options.depth)]
        for _ in range(options.halvings):
            blocks += [BlockB(width), *(BlockA(2 * width) for _ in range(options.depth))]
            width *= 2
        self.judge = nn.Sequential(
            *blocks, nn.BatchNorm2d(width), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1)
        )
        # The faster layout for convolutions, on CPUs and GPUs alike.
        convert_conv2d_weight_memory_format(self, torch.channels_last)
