"""NVAE's posterior flows: a few volume-preserving autoregressive shifts of what a Normal draws (Kingma et al. 2016)."""

import torch
from torch import Tensor, nn

from models.distributions import DiagonalNormal
from models.layers import NormalisedConv2d, norms
from runtime.randomness import Noise

EXPANSION = 6


class MaskedConv2d(NormalisedConv2d):
    """A normalised convolution of which every filter sees what its mask leaves of it.

    Positions above, and to the left in the same row, are seen in all channels; ``centre``, (out, in per group), says which
    channels are at the position itself. ``flipped`` turns above and left into below and right.
    """

    mask: Tensor

    def __init__(
        self, width: int, out: int, kernel: int, centre: Tensor, flipped: bool, groups: int = 1, bias: bool = False
    ):
        super().__init__(width, out, kernel, padding=kernel // 2, groups=groups, bias=bias)
        mask, middle = torch.zeros_like(self.weight), kernel // 2
        mask[:, :, :middle] = 1
        mask[:, :, middle, :middle] = 1
        mask[:, :, middle, middle] = centre.to(mask)
        self.register_buffer("mask", mask.flip(2, 3) if flipped else mask, persistent=False)
        with torch.no_grad():
            self.log_norm.copy_((norms(self.weight * self.mask) + 1e-2).log())

    @property
    def effective_weight(self) -> Tensor:
        """The filters that are applied, shape of ``weight``: what the mask leaves is normalised."""
        return self._normalised(self.weight * self.mask)


class Shift(nn.Module):
    """z − f(z), (n, channels, h, w) to the same: f sees earlier positions, and at a position itself earlier channels."""

    def __init__(self, channels: int, flipped: bool):
        super().__init__()
        wide = EXPANSION * channels
        latent, owner = torch.arange(channels), torch.arange(wide) // EXPANSION
        self.body = nn.Sequential(
            MaskedConv2d(channels, wide, 3, latent[None] < owner[:, None], flipped),
            nn.ELU(),
            MaskedConv2d(wide, wide, 5, torch.ones(wide, 1), flipped, groups=wide),
            nn.ELU(),
            nn.ELU(),  # as published
            MaskedConv2d(wide, channels, 1, owner[None] <= latent[:, None], flipped, bias=True),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Shift."""
        return z - self.body(z)


def flow(channels: int, pairs: int) -> nn.Sequential:
    """Shifts in pairs, the second of each in the opposite direction through the map; their log-determinants are 0."""
    return nn.Sequential(*(Shift(channels, flipped) for _ in range(pairs) for flipped in (False, True)))


class ShiftedNormal:
    """What a flow of log-determinant 0 makes of a Normal over maps, (batch, channels, h, w).

    The density of z is the Normal's of what became z. To find that for any z the flow would have to be inverted position by
    position, so it is known where it is wanted, at what was drawn last, and nowhere else.
    """

    def __init__(self, normal: DiagonalNormal, shifts: nn.Module):
        self._normal, self._shifts = normal, shifts
        self._start = self._drawn = normal.base_dist.loc

    @property
    def mean(self) -> Tensor:
        """What the flow makes of the Normal's mean, (batch, channels, h, w): a centre; the mean has no formula."""
        return self._shifts(self._normal.mean)

    @property
    def variance(self) -> Tensor:
        """The Normal's, (batch, channels, h, w): the flow moves volume without changing it."""
        return self._normal.variance

    def log_prob(self, value: Tensor, /) -> Tensor:
        """Log density in nats of what was drawn last (*lead, batch, channels, h, w): shape (*lead, batch).

        Raises:
            ValueError: ``value`` is something else.
        """
        if value is not self._drawn:
            raise ValueError("a flow's density is known at its own last draw alone")
        return self._normal.log_prob(self._start)

    def draw(self, noise: Noise, lead: tuple[int, ...] = ()) -> Tensor:
        """Reparameterised draws, shape (*lead, batch, channels, h, w)."""
        self._start = self._normal.draw(noise, lead)
        self._drawn = self._shifts(self._start.flatten(0, len(lead))).view_as(self._start)
        return self._drawn
