"""NVAE, a deep hierarchical VAE (Vahdat and Kautz, NeurIPS 2020).

Bottom-up, residual cells shrink the image and leave one feature map per group. Top-down, a learned constant state passes,
group by group, through: prior head, posterior head (in the residual parameterisation), a combiner that takes in z_k, and
inverted-residual cells. Channels double whenever the side is halved.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import convert_conv2d_weight_memory_format

from models.distributions import DiagonalNormal, soft_clamp
from models.layers import DepthwiseConv2d, NormalisedConv2d, SqueezeExcitation
from models.likelihoods import LikelihoodName, likelihood
from models.protocol import HierarchicalVAE, Likelihood
from runtime import options
from runtime.errors import UserError

Size = Annotated[int, Field(ge=1)]

RESIDUAL_SCALE = 0.1
SMALLEST_STD = 1e-2


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-5, momentum=0.05)


def _small(head: NormalisedConv2d) -> NormalisedConv2d:
    """With heads near zero the first KL is small; without, it is astronomically large."""
    nn.init.constant_(head.log_norm, -3.0)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return head


class DownSkip(nn.Module):
    """Halve the side, double the channels: four 1x1 convolutions, each of one of the four pixels of every 2x2 square."""

    def __init__(self, width: int):
        super().__init__()
        self.parts = nn.ModuleList(nn.Conv2d(width, width // 2, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) to (n, 2 width, h / 2, w / 2)."""
        x = functional.silu(x)
        # Sliced, since on CPUs the gradient of a 1x1 convolution with stride 2 writes out of bounds for few channels.
        corners = [x[:, :, down::2, right::2] for down in range(2) for right in range(2)]
        return torch.cat([part(corner) for part, corner in zip(self.parts, corners, strict=True)], dim=1)


class UpSkip(nn.Module):
    """Double the side, halve the channels: bilinear, then a 1x1 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = NormalisedConv2d(width, width // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) to (n, width / 2, 2 h, 2 w)."""
        return self.mix(functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True))


class EncoderCell(nn.Module):
    """skip(x) + 0.1 SE(conv(swish(BN(conv(swish(BN(x))))))); ``down`` halves the side and doubles the channels."""

    def __init__(self, width: int, down: bool = False):
        super().__init__()
        stride, out = (2, 2 * width) if down else (1, width)
        self.skip = DownSkip(width) if down else nn.Identity()
        self.body = nn.Sequential(
            _norm(width),
            nn.SiLU(),
            NormalisedConv2d(width, out, 3, stride=stride, padding=1),
            _norm(out),
            nn.SiLU(),
            NormalisedConv2d(out, out, 3, padding=1),
            SqueezeExcitation(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the cell."""
        return self.skip(x) + RESIDUAL_SCALE * self.body(x)


class DecoderCell(nn.Module):
    """skip(x) + 0.1 F(x), F an inverted residual: BN, 1x1 to ``expansion`` times the channels, depthwise 5x5, 1x1, BN, SE.

    ``up`` doubles the side and halves the channels.
    """

    def __init__(self, width: int, expansion: int, up: bool = False):
        super().__init__()
        wide, out = expansion * width, width // 2 if up else width
        self.skip = UpSkip(width) if up else nn.Identity()
        self.body = nn.Sequential(
            nn.Upsample(scale_factor=2.0) if up else nn.Identity(),
            _norm(width),
            nn.Conv2d(width, wide, 1, bias=False),
            _norm(wide),
            nn.SiLU(),
            DepthwiseConv2d(wide, 5),
            _norm(wide),
            nn.SiLU(),
            nn.Conv2d(wide, out, 1, bias=False),
            _norm(out),
            SqueezeExcitation(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the cell."""
        return self.skip(x) + RESIDUAL_SCALE * self.body(x)


class NVAE(HierarchicalVAE):
    """K = sum(groups_per_scale) groups of latent maps; the first group's base prior is N(0, I)."""

    class Options(options.Options):
        """Settings of the network.

        ``groups_per_scale``: number of groups on each scale, coarsest first, each scale twice the side of the one before.
        ``width``: channels before the side is first halved. ``patch``: side of the squares of pixels that the network
        sees as one position. ``halvings``: how often the side is then halved to reach the finest latent maps, with
        ``outer_cells`` cells each time. ``cells``: cells per group in each direction. ``expansion``: of the inverted
        residuals of the groups (between the groups and the image it is 3). ``base_prior``: whether the later groups' base
        prior is ``learned``, a Normal of the context, or ``fixed`` to N(0, I) like the first group's.
        """

        groups_per_scale: Annotated[list[Size], Field(min_length=1)]
        latent_channels: Size
        width: Annotated[int, Field(ge=2, multiple_of=2)]
        patch: Size = 1
        halvings: Annotated[int, Field(ge=0)]
        outer_cells: Size = 2
        cells: Size = 2
        expansion: Size = 6
        base_prior: Literal["learned", "fixed"] = "learned"
        likelihood: LikelihoodName = "bernoulli"
        initial_std: Annotated[float, Field(gt=0)] = 1.0

    def __init__(self, options: Options, data_shape: tuple[int, ...]):
        super().__init__()
        if len(data_shape) != 3 or data_shape[1] != data_shape[2]:
            raise UserError(f"nvae needs square images, not data of shape {data_shape}; use another model")
        channels, _, self.side = data_shape
        scales, self.patch, self.latent_channels = len(options.groups_per_scale), options.patch, options.latent_channels
        coarsest = options.patch * 2 ** (options.halvings + scales - 1)
        self.padded = -(-self.side // coarsest) * coarsest  # 28 becomes 32 when the side must divide by 16
        scale_of = [scale for scale, count in enumerate(options.groups_per_scale) for _ in range(count)]
        self.groups = len(scale_of)
        self.ends_scale = [k + 1 < self.groups and scale_of[k + 1] != scale_of[k] for k in range(self.groups)]
        finest = options.width * 2**options.halvings
        widths = [finest * 2 ** (scales - 1 - scale) for scale in scale_of]  # of each group's state
        latent, squares = 2 * options.latent_channels, options.patch**2

        def outer(make, widths: Sequence[int]) -> list[nn.Module]:
            """For every halving or doubling, cells of which the last or first changes the side."""
            return [cell for width in widths for cell in make(width)]

        def down(width: int) -> list[nn.Module]:
            return [*(EncoderCell(width) for _ in range(options.outer_cells - 1)), EncoderCell(width, down=True)]

        def up(width: int) -> list[nn.Module]:
            return [
                DecoderCell(width, 3, up=True),
                *(DecoderCell(width // 2, 3) for _ in range(options.outer_cells - 1)),
            ]

        self.stem = nn.Sequential(
            NormalisedConv2d(channels * squares, options.width, 3, padding=1),
            *outer(down, [options.width * 2**i for i in range(options.halvings)]),
        )
        self.bottom_up = nn.ModuleList(
            nn.Sequential(
                *([EncoderCell(widths[k] // 2, down=True)] if self.ends_scale[k] else []),
                *(EncoderCell(widths[k]) for _ in range(options.cells)),
            )
            for k in range(self.groups)
        )
        self.top = nn.Sequential(nn.ELU(), NormalisedConv2d(widths[0], widths[0], 1), nn.ELU())
        self.initial = nn.Parameter(torch.rand(1, widths[0], self.padded // coarsest, self.padded // coarsest))
        self.merge = nn.ModuleList(NormalisedConv2d(width, width, 1) for width in widths[1:])
        self.posterior_heads = nn.ModuleList(_small(NormalisedConv2d(width, latent, 3, padding=1)) for width in widths)
        learned = widths[1:] if options.base_prior == "learned" else []
        self.prior_heads = nn.ModuleList(
            nn.Sequential(nn.ELU(), _small(NormalisedConv2d(width, latent, 1))) for width in learned
        )
        self.combine = nn.ModuleList(NormalisedConv2d(width + options.latent_channels, width, 1) for width in widths)
        self.top_down = nn.ModuleList(
            nn.Sequential(
                *([DecoderCell(widths[k - 1], options.expansion, up=True)] if self.ends_scale[k - 1] else []),
                *(DecoderCell(widths[k], options.expansion) for _ in range(options.cells)),
            )
            for k in range(1, self.groups)
        )
        self.likelihood = likelihood(options.likelihood, options.initial_std)
        self.output = nn.Sequential(
            *outer(up, [finest // 2**i for i in range(options.halvings)]),
            nn.ELU(),
            NormalisedConv2d(options.width, self.likelihood.outputs(channels) * squares, 3, padding=1),
        )
        convert_conv2d_weight_memory_format(
            self, torch.channels_last
        )  # the faster layout for convolutions, on CPUs and GPUs alike

    def encode(self, x: Tensor) -> Sequence[Tensor]:
        """Feature maps, one per group, each at its group's scale."""
        margin = self.padded - self.side
        before, after = margin // 2, margin - margin // 2
        state = functional.pad(2 * x - 1, (before, after, before, after), value=-1.0)
        state = self.stem(functional.pixel_unshuffle(state, self.patch))
        features: list[Tensor] = []
        for cells in reversed(self.bottom_up):
            state = cells(state)
            features.insert(0, state)
        features[0] = self.top(features[0])
        return features

    def start(self, batch: int) -> Tensor:
        """The learned constant state, (batch, channels, h, w) of the coarsest scale."""
        return self.initial.expand(batch, -1, -1, -1)

    def prior(self, k: int, context: Tensor) -> DiagonalNormal:
        """N(0, I) for the first group, by default a learned Normal of the context for the others."""
        if self._fixed(k):
            mean = context.new_zeros(len(context), self.latent_channels, *context.shape[2:], dtype=torch.float32)
            return DiagonalNormal(mean, torch.ones_like(mean))
        return _normal(*self._prior_parameters(k, context))

    def posterior(self, k: int, context: Tensor, features: Sequence[Tensor]) -> DiagonalNormal:
        """The prior's parameters moved by what the features say: N(mu + Δmu, exp(log sigma + Δ log sigma)) (NVAE, eq. 5)."""
        merged = features[k] if k == 0 else features[k] + self.merge[k - 1](context)
        mean, log_std = self.posterior_heads[k](merged).float().chunk(2, dim=1)
        if self._fixed(k):
            return _normal(mean, log_std)
        prior_mean, prior_log_std = self._prior_parameters(k, context)
        return _normal(prior_mean + mean, prior_log_std + log_std)

    def advance(self, k: int, context: Tensor, z: Tensor) -> Tensor:
        """Take z in and, before another group, think and move to its scale."""
        state = self.combine[k](torch.cat([context, z.to(context.dtype)], dim=1))
        return self.top_down[k](state) if k + 1 < self.groups else state

    def decode(self, context: Tensor) -> Likelihood:
        """p(x | z) over images of the data's own size."""
        output = functional.pixel_shuffle(self.output(context).float(), self.patch)
        before = (self.padded - self.side) // 2
        return self.likelihood(output[:, :, before : before + self.side, before : before + self.side])

    def _fixed(self, k: int) -> bool:
        return k == 0 or not self.prior_heads

    def _prior_parameters(self, k: int, context: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.prior_heads[k - 1](context).float().chunk(2, dim=1)
        return mean, log_std


def _normal(mean: Tensor, log_std: Tensor) -> DiagonalNormal:
    return DiagonalNormal(soft_clamp(mean), soft_clamp(log_std).exp() + SMALLEST_STD)
