"""A small hierarchical residual VAE for images, with the top-down shape of NVAE.

Bottom-up, residual cells shrink the image and leave one feature map per group, finest group first. Top-down, a learned
constant state passes, group by group, through: prior head, posterior head (in the residual parameterisation), a combiner
that takes in z_k, and residual cells. NVAE differs in its cells and sizes, not in this shape.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from models.distributions import DiagonalNormal, soft_clamp
from models.likelihoods import LikelihoodName, likelihood
from models.protocol import HierarchicalVAE, Likelihood
from runtime import options
from runtime.errors import UserError

Size = Annotated[int, Field(ge=1)]


def _small_(convolution: nn.Conv2d, scale: float) -> nn.Conv2d:
    """Scale down the initial weights. With heads near zero the first KL is small; without, it is astronomically large."""
    with torch.no_grad():
        convolution.weight.mul_(scale)
        if convolution.bias is not None:
            convolution.bias.zero_()
    return convolution


class Cell(nn.Module):
    """x + convolutions(x), the second convolution starting small. (batch, width, h, w) to the same."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            _small_(nn.Conv2d(width, width, 3, padding=1), 0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the cell."""
        return x + self.body(x)


def _down(width: int) -> nn.Module:
    return nn.Conv2d(width, width, 2, stride=2)


def _up(width: int) -> nn.Module:
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1))


class ResidualHVAE(HierarchicalVAE):
    """K = sum(groups_per_scale) groups of latent maps; the first group's base prior is N(0, I), the others' is learned."""

    class Options(options.Options):
        """Settings of the hierarchical VAE.

        ``halvings``: how often the image's side is halved to reach the finest latent maps. ``groups_per_scale``: number of
        groups on each scale, coarsest first, each scale twice the side of the one before. ``cells``: residual cells per
        group and per halving, in each direction.
        """

        groups_per_scale: Annotated[list[Size], Field(min_length=1)]
        latent_channels: Size
        width: Size
        halvings: Annotated[int, Field(ge=0)]
        cells: Size = 1
        likelihood: LikelihoodName = "bernoulli"
        initial_std: Annotated[float, Field(gt=0)] = 1.0

    def __init__(self, options: Options, data_shape: tuple[int, ...]):
        super().__init__()
        if len(data_shape) != 3 or data_shape[1] != data_shape[2]:
            raise UserError(f"residual-hvae needs square images, not data of shape {data_shape}; use another model")
        channels, _, self.side = data_shape
        width, scales = options.width, len(options.groups_per_scale)
        coarsest = 2 ** (options.halvings + scales - 1)
        self.padded = -(-self.side // coarsest) * coarsest  # 28 becomes 32 when the side must divide by 16
        self.scale_of = [scale for scale, count in enumerate(options.groups_per_scale) for _ in range(count)]
        self.groups = len(self.scale_of)
        self.latent_channels = options.latent_channels

        def cells() -> list[nn.Module]:
            return [Cell(width) for _ in range(options.cells)]

        def per_group(make):
            return nn.ModuleList(make(k) for k in range(self.groups))

        halvings = [layer for _ in range(options.halvings) for layer in (_down(width), *cells())]
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), *halvings)
        self.bottom_up = per_group(lambda _: nn.Sequential(*cells()))
        self.shrink = nn.ModuleList(_down(width) for _ in range(scales - 1))
        top = self.padded // coarsest
        self.initial = nn.Parameter(torch.rand(1, width, top, top))
        latent = 2 * options.latent_channels
        self.prior_heads = per_group(lambda _: nn.Sequential(nn.SiLU(), _small_(nn.Conv2d(width, latent, 1), 0.1)))
        self.prior_heads[0] = nn.Identity()  # the first group's base prior is fixed
        self.merge = per_group(lambda _: nn.Conv2d(width, width, 1))
        self.posterior_heads = per_group(
            lambda _: nn.Sequential(nn.SiLU(), _small_(nn.Conv2d(width, latent, 3, padding=1), 0.1))
        )
        self.combine = per_group(lambda _: nn.Conv2d(width + options.latent_channels, width, 1))
        self.top_down = per_group(lambda k: nn.Sequential(*cells(), *([_up(width)] if self._last_of_scale(k) else [])))
        doublings = [layer for _ in range(options.halvings) for layer in (_up(width), *cells())]
        self.likelihood = likelihood(options.likelihood, options.initial_std)
        outputs = self.likelihood.outputs(channels)
        self.output = nn.Sequential(*doublings, nn.SiLU(), nn.Conv2d(width, outputs, 3, padding=1))

    def _last_of_scale(self, k: int) -> bool:
        return k + 1 < self.groups and self.scale_of[k + 1] != self.scale_of[k]

    def encode(self, x: Tensor) -> Sequence[Tensor]:
        """Feature maps, one per group, each at its group's scale."""
        margin = self.padded - self.side
        before, after = margin // 2, margin - margin // 2
        state = self.stem(functional.pad(x, (before, after, before, after)))
        features: list[Tensor] = []
        for k in reversed(range(self.groups)):
            if self._last_of_scale(k):
                state = self.shrink[self.scale_of[k]](state)
            state = self.bottom_up[k](state)
            features.insert(0, state)
        return features

    def start(self, batch: int) -> Tensor:
        """The learned constant state, (batch, width, h, w) of the coarsest scale."""
        return self.initial.expand(batch, -1, -1, -1)

    def prior(self, k: int, context: Tensor) -> DiagonalNormal:
        """N(0, I) for the first group, a learned Normal of the context for the others."""
        mean, log_std = self._prior_parameters(k, context)
        return DiagonalNormal(soft_clamp(mean), soft_clamp(log_std).exp())

    def posterior(self, k: int, context: Tensor, features: Sequence[Tensor]) -> DiagonalNormal:
        """The prior's Normal moved by what the features say: N(mu + Δmu, exp(log sigma + Δ log sigma)) (NVAE, eq. 5)."""
        mean, log_std = self._prior_parameters(k, context)
        moved = self.posterior_heads[k](features[k] + self.merge[k](context)).float()
        mean_step, log_std_step = moved.chunk(2, dim=1)
        return DiagonalNormal(soft_clamp(mean + mean_step), soft_clamp(log_std + log_std_step).exp())

    def advance(self, k: int, context: Tensor, z: Tensor) -> Tensor:
        """Take z in, think, and move to the scale of the next group."""
        return self.top_down[k](self.combine[k](torch.cat([context, z.to(context.dtype)], dim=1)))

    def decode(self, context: Tensor) -> Likelihood:
        """p(x | z) over images of the data's own size."""
        output = self.output(context).float()
        before = (self.padded - self.side) // 2
        return self.likelihood(output[:, :, before : before + self.side, before : before + self.side])

    def _prior_parameters(self, k: int, context: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-sigma before they are clamped, so that a posterior that adds nothing to them is the prior itself."""
        if k == 0:
            zeros = context.new_zeros(len(context), self.latent_channels, *context.shape[2:], dtype=torch.float32)
            return zeros, zeros
        mean, log_std = self.prior_heads[k](context).float().chunk(2, dim=1)
        return mean, log_std
