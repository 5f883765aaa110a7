"""NVAE, a deep hierarchical VAE (Vahdat and Kautz, NeurIPS 2020).

Bottom-up, residual cells shrink the image and leave one feature map per group. Top-down, a learned constant state passes,
group by group, through: prior head, posterior head (in the residual parameterisation), a combiner that takes in z_k, and
inverted-residual cells. Channels double whenever the side is halved. The structure is the published one to the last
constant, so that weights that were trained by the released code compute the same here.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import convert_conv2d_weight_memory_format

from models.distributions import DiagonalNormal, Distribution, soft_clamp
from models.layers import DepthwiseConv2d, NormalisedConv2d, SqueezeExcitation
from models.likelihoods import LikelihoodName, likelihood
from models.nvae_flow import ShiftedNormal, flow
from models.protocol import HierarchicalVAE, Likelihood
from runtime import options
from runtime.errors import UserError

Size = Annotated[int, Field(ge=1)]
Width = Annotated[int, Field(ge=2, multiple_of=2)]

RESIDUAL_SCALE = 0.1
SMALLEST_STD = 1e-2
PADDED = {28: 32}
"""Sides of images that are padded with zeros, however often they are halved: MNIST's, and so Omniglot's."""


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-5, momentum=0.05)


def _small(head: NormalisedConv2d) -> NormalisedConv2d:
    """With heads near zero the first KL is small; as published, where hundreds of epochs forget it, it is astronomical."""
    nn.init.constant_(head.log_norm, -3.0)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return head


class DownSkip(nn.Module):
    """Halve the side, double the channels: four 1x1 convolutions, each of one of the four pixels of every 2x2 square."""

    CORNERS = ((0, 0), (1, 1), (0, 1), (1, 0))  # (row, column) in the square, in the published order

    def __init__(self, width: int):
        super().__init__()
        self.parts = nn.ModuleList(NormalisedConv2d(width, width // 2, 1) for _ in self.CORNERS)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) to (n, 2 width, h / 2, w / 2)."""
        x = functional.silu(x)
        # Sliced, since on CPUs the gradient of a 1x1 convolution with stride 2 writes out of bounds for few channels.
        corners = [x[:, :, down::2, right::2] for down, right in self.CORNERS]
        return torch.cat([part(corner) for part, corner in zip(self.parts, corners, strict=True)], dim=1)


class UpSkip(nn.Module):
    """Double the side, halve the channels: bilinear, then a 1x1 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = NormalisedConv2d(width, width // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) to (n, width / 2, 2 h, 2 w)."""
        return self.mix(functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True))


class EncoderCell(nn.Module):
    """skip(x) + 0.1 SE(conv(swish(BN(conv(swish(BN(x))))))); ``down`` halves the side and doubles the channels."""

    def __init__(self, width: int, down: bool = False, gated: bool = True):
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
            SqueezeExcitation(out) if gated else nn.Identity(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the cell."""
        return self.skip(x) + RESIDUAL_SCALE * self.body(x)


class DecoderCell(nn.Module):
    """skip(x) + 0.1 F(x), F an inverted residual: BN, 1x1 to ``expansion`` times the channels, depthwise 5x5, 1x1, BN, SE.

    ``up`` doubles the side and halves the channels.
    """

    def __init__(self, width: int, expansion: int, up: bool = False, gated: bool = True):
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
            SqueezeExcitation(out) if gated else nn.Identity(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the cell."""
        return self.skip(x) + RESIDUAL_SCALE * self.body(x)


class NVAE(HierarchicalVAE):
    """K = sum(groups_per_scale) groups of latent maps; the first group's base prior is N(0, 1.01² I).

    One group alone has no cells of its own: z goes straight to the cells between the groups and the image.
    """

    class Options(options.Options):
        """Settings of the network.

        ``groups_per_scale``: number of groups on each scale, coarsest first, each scale twice the side of the one before.
        ``width``: channels before the side is first halved. ``patch``: side of the squares of pixels that the network
        sees as one position. ``halvings``: how often the side is then halved to reach the finest latent maps, with
        ``outer_cells`` cells each time. ``cells``: cells per group in each direction. ``decoder_width``,
        ``decoder_outer_cells``, ``decoder_cells``: those of the way down, where they differ. ``expansion``: of the inverted
        residuals of the groups (between the groups and the image it is 3). ``squeeze_excitation``: whether cells have it.
        ``base_prior``: whether the later groups' base prior is ``learned``, a Normal of the context, or ``fixed``, like the
        first group's. ``residual_posterior``: whether what the encoder says is added to the prior's parameters. ``flows``:
        pairs of autoregressive shifts that a posterior draw goes through. ``small_heads``: whether posterior and prior start
        close to each other. ``initial_std``: of the ``normal`` likelihood. ``bits``: of the data's levels, which the mixture
        is discretised to. ``released``: whether likelihood, mean and draws of an image are those of the released code.
        """

        groups_per_scale: Annotated[list[Size], Field(min_length=1)]
        latent_channels: Size
        width: Width
        patch: Size = 1
        halvings: Annotated[int, Field(ge=0)]
        outer_cells: Size = 2
        cells: Size = 2
        decoder_width: Annotated[Width | None, options.unless(None)] = None
        decoder_outer_cells: Annotated[Size | None, options.unless(None)] = None
        decoder_cells: Annotated[Size | None, options.unless(None)] = None
        expansion: Size = 6
        squeeze_excitation: Annotated[bool, options.unless(True)] = True
        base_prior: Literal["learned", "fixed"] = "learned"
        residual_posterior: Annotated[bool, options.unless(True)] = True
        flows: Annotated[int, Field(ge=0), options.unless(0)] = 0
        small_heads: Annotated[bool, options.unless(True)] = True
        likelihood: LikelihoodName = "bernoulli"
        initial_std: Annotated[float, Field(gt=0)] = 1.0
        bits: Annotated[Literal[5, 8], options.unless(8)] = 8
        released: Annotated[bool, options.unless(False)] = False

    def __init__(self, options: Options, data_shape: tuple[int, ...]):
        super().__init__()
        if len(data_shape) != 3 or data_shape[1] != data_shape[2]:
            raise UserError(f"nvae needs square images, not data of shape {data_shape}; use another model")
        channels, _, self.side = data_shape
        scales, self.patch, self.latent_channels = len(options.groups_per_scale), options.patch, options.latent_channels
        coarsest = options.patch * 2 ** (options.halvings + scales - 1)
        self.padded = -(-PADDED.get(self.side, self.side) // coarsest) * coarsest
        scale_of = [scale for scale, count in enumerate(options.groups_per_scale) for _ in range(count)]
        self.groups = len(scale_of)
        self.ends_scale = [k + 1 < self.groups and scale_of[k + 1] != scale_of[k] for k in range(self.groups)]
        self.residual = options.residual_posterior
        narrow, gated = options.decoder_width or options.width, options.squeeze_excitation
        finest, finest_down = options.width * 2**options.halvings, narrow * 2**options.halvings
        growth = [2 ** (scales - 1 - scale) for scale in scale_of]
        widths, widths_down = [finest * times for times in growth], [finest_down * times for times in growth]
        latent, squares, alone = 2 * options.latent_channels, options.patch**2, self.groups == 1
        cells_down = options.decoder_cells or options.cells
        outer_down = options.decoder_outer_cells or options.outer_cells

        def head(width: int, kernel: int) -> NormalisedConv2d:
            convolution = NormalisedConv2d(width, latent, kernel, padding=kernel // 2)
            return _small(convolution) if options.small_heads else convolution

        def down(width: int) -> list[nn.Module]:
            cells = [EncoderCell(width, gated=gated) for _ in range(options.outer_cells - 1)]
            return [*cells, EncoderCell(width, down=True, gated=gated)]

        def up(width: int) -> list[nn.Module]:
            cells = [DecoderCell(width // 2, 3, gated=gated) for _ in range(outer_down - 1)]
            return [DecoderCell(width, 3, up=True, gated=gated), *cells]

        self.stem = nn.Sequential(
            NormalisedConv2d(channels * squares, options.width, 3, padding=1),
            *(cell for i in range(options.halvings) for cell in down(options.width * 2**i)),
        )
        self.bottom_up = nn.ModuleList(
            nn.Sequential(
                *([EncoderCell(widths[k] // 2, down=True, gated=gated)] if self.ends_scale[k] else []),
                *(EncoderCell(widths[k], gated=gated) for _ in range(0 if alone else options.cells)),
            )
            for k in range(self.groups)
        )
        self.top = nn.Sequential(nn.ELU(), NormalisedConv2d(widths[0], widths[0], 1), nn.ELU())
        side = self.padded // coarsest
        self.initial = nn.Parameter(torch.rand(1, widths_down[0], side, side), requires_grad=not alone)
        self.merge = nn.ModuleList(NormalisedConv2d(widths_down[k], widths[k], 1) for k in range(1, self.groups))
        self.posterior_heads = nn.ModuleList(head(width, 3) for width in widths)
        learned = widths_down[1:] if options.base_prior == "learned" else []
        self.prior_heads = nn.ModuleList(nn.Sequential(nn.ELU(), head(width, 1)) for width in learned)
        self.flows = nn.ModuleList(
            flow(options.latent_channels, options.flows) for _ in range(self.groups if options.flows else 0)
        )
        self.combine = nn.ModuleList(
            NormalisedConv2d((0 if alone else width) + options.latent_channels, width, 1) for width in widths_down
        )
        self.top_down = nn.ModuleList(
            nn.Sequential(
                *([DecoderCell(2 * widths_down[k], options.expansion, True, gated)] if self.ends_scale[k - 1] else []),
                *(DecoderCell(widths_down[k], options.expansion, gated=gated) for _ in range(cells_down)),
            )
            for k in range(1, self.groups)
        )
        self.likelihood = likelihood(options.likelihood, options.initial_std, options.bits, options.released)
        self.output = nn.Sequential(
            *(cell for i in range(options.halvings) for cell in up(finest_down // 2**i)),
            nn.ELU(),
            NormalisedConv2d(narrow, self.likelihood.outputs(channels) * squares, 3, padding=1),
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
        """N(0, 1.01² I) for the first group, by default a learned Normal of the context for the others."""
        return _normal(*self._prior_parameters(k, context))

    def posterior(self, k: int, context: Tensor, features: Sequence[Tensor]) -> Distribution:
        """The prior's parameters moved by what the features say: N(mu + Δmu, exp(log sigma + Δ log sigma)) (NVAE, eq. 5).

        Where the model has flows, what they make of that Normal.
        """
        merged = features[k] if k == 0 else features[k] + self.merge[k - 1](context)
        mean, log_std = _full(self.posterior_heads[k](merged)).chunk(2, dim=1)
        if self.residual:
            prior_mean, prior_log_std = self._prior_parameters(k, context)
            mean, log_std = prior_mean + mean, prior_log_std + log_std
        normal = _normal(mean, log_std)
        return ShiftedNormal(normal, self.flows[k]) if self.flows else normal

    def advance(self, k: int, context: Tensor, z: Tensor) -> Tensor:
        """Take z in and, before another group, think and move to its scale."""
        z = z.to(context.dtype)
        state = self.combine[k](z if self.groups == 1 else torch.cat([context, z], dim=1))
        return self.top_down[k](state) if k + 1 < self.groups else state

    def decode(self, context: Tensor) -> Likelihood:
        """p(x | z) over images of the data's own size."""
        output = functional.pixel_shuffle(_full(self.output(context)), self.patch)
        before = (self.padded - self.side) // 2
        return self.likelihood(output[:, :, before : before + self.side, before : before + self.side])

    def _prior_parameters(self, k: int, context: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-sigma before they are clamped, (batch, *latent shape of k) each."""
        if k == 0 or not self.prior_heads:
            zeros = _full(context.new_zeros(len(context), self.latent_channels, *context.shape[2:]))
            return zeros, zeros
        mean, log_std = _full(self.prior_heads[k - 1](context)).chunk(2, dim=1)
        return mean, log_std


def _full(output: Tensor) -> Tensor:
    """What a network puts out, in single precision at least."""
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _normal(mean: Tensor, log_std: Tensor) -> DiagonalNormal:
    return DiagonalNormal(soft_clamp(mean), soft_clamp(log_std).exp() + SMALLEST_STD)
