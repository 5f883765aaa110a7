"""A flat convolutional VAE for images: the networks that RAE was published with (Ghosh et al. 2020, appendix).

The encoder halves the side with every convolution; the decoder starts from maps of 8x8 and doubles it until it is the
image's. Each layer but the first and last of the decoder is followed by batch norm and ReLU.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from models.distributions import DiagonalNormal, soft_clamp
from models.likelihoods import likelihood
from models.protocol import HierarchicalVAE, Likelihood
from runtime import options
from runtime.errors import UserError

FIRST_SIDE = 8
"""Of the decoder's first maps."""

Size = Annotated[int, Field(ge=1)]


def doublings(side: int, widths: Sequence[int]) -> int:
    """How often the decoder doubles maps of FIRST_SIDE for images of a side. Raises UserError if no number of them does."""
    times = (side // FIRST_SIDE).bit_length() - 1
    if side < FIRST_SIDE or FIRST_SIDE << times != side:
        raise UserError(f"images of side {side} are not 8, 16, 32 … pixels; this decoder starts from 8 and doubles")
    if times >= len(widths):
        raise UserError(f"widths: images of side {side} need {times + 1} of them at least, and there are {len(widths)}")
    if side >> len(widths) == 0:
        raise UserError(f"widths: {len(widths)} convolutions halve a side of {side} to nothing; give fewer")
    return times


def encoder(shape: tuple[int, ...], outputs: int, widths: Sequence[int], kernel: int) -> nn.Sequential:
    """Images (batch, *shape) to vectors (batch, outputs)."""
    layers: list[nn.Module] = []
    channels, side = shape[0], shape[1]
    for width in widths:
        convolution = nn.Conv2d(channels, width, kernel, stride=2, padding=(kernel - 1) // 2, bias=False)  # the norm has one
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        channels, side = width, side // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side**2, outputs))


class Decoder(nn.Module):
    """Vectors (batch, latents) to images in (0, 1), (batch, *shape)."""

    def __init__(self, latents: int, shape: tuple[int, ...], widths: Sequence[int], kernel: int):
        super().__init__()
        self.side = shape[1]
        channels, padding = widths[-1], (kernel - 1) // 2
        layers: list[nn.Module] = [nn.Linear(latents, channels * FIRST_SIDE**2)]
        layers.append(nn.Unflatten(1, (channels, FIRST_SIDE, FIRST_SIDE)))
        for width in list(reversed(widths))[1 : doublings(self.side, widths) + 1]:
            odd = kernel % 2
            up = nn.ConvTranspose2d(channels, width, kernel, stride=2, padding=padding, output_padding=odd, bias=False)
            layers += [up, nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.ConvTranspose2d(channels, shape[0], kernel, padding=padding))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """Apply it; an even kernel leaves one row and one column too many."""
        return self.layers(z)[..., : self.side, : self.side].float().sigmoid()


class FlatConvolutional(HierarchicalVAE):
    """One group of latent variables between an :func:`encoder` and a :class:`Decoder`; the context is empty: (batch, 0).

    Args:
        options: the networks' sizes.
        data_shape: of square images, (channels, side, side).
        outputs: numbers that the encoder gives for each latent variable.
        std: of the Normal decoder, data units.

    Raises:
        UserError: the images are not square, or of a side that these networks cannot have.
    """

    class Options(options.Options):
        """Sizes of the networks, RAE's for CelebA-64 if absent (for CIFAR-10 it has 128 latents and kernels of 4).

        ``widths``: of the encoder's convolutions, and in reverse of the decoder's.
        """

        latents: Size = 64
        widths: Annotated[list[Size], Field(min_length=1, max_length=10)] = Field(default=[128, 256, 512, 1024])
        kernel: Literal[3, 4, 5] = 5
        likelihood: Literal["normal"] = "normal"

    def __init__(self, options: Options, data_shape: tuple[int, ...], outputs: int, std: float):
        super().__init__()
        if len(data_shape) != 3 or data_shape[1] != data_shape[2]:
            raise UserError(f"it needs square images, and the data are of shape {data_shape}")
        doublings(data_shape[1], options.widths)
        self.groups, self.latents = 1, options.latents
        self.encoder = encoder(data_shape, outputs * options.latents, options.widths, options.kernel)
        self.decoder = Decoder(options.latents, data_shape, options.widths, options.kernel)
        self.likelihood = likelihood(options.likelihood, std)

    def encode(self, x: Tensor) -> Sequence[Tensor]:
        """One tensor (batch, outputs x latents)."""
        return [self.encoder(x)]

    def start(self, batch: int) -> Tensor:
        """The empty context, (batch, 0)."""
        return next(self.parameters()).new_zeros(batch, 0)

    def prior(self, k: int, context: Tensor) -> DiagonalNormal:  # noqa: ARG002
        """N(0, I)."""
        zeros = context.new_zeros(len(context), self.latents)
        return DiagonalNormal(zeros, torch.ones_like(zeros))

    def advance(self, k: int, context: Tensor, z: Tensor) -> Tensor:  # noqa: ARG002
        """z itself: it is all that the decoder sees."""
        return z

    def decode(self, context: Tensor) -> Likelihood:
        """p(x | z)."""
        return self.likelihood(self.decoder(context))


class ConvVAE(FlatConvolutional):
    """q(z | x) is a Normal with independent coordinates; p(x | z) one with a single standard deviation, fixed or learned.

    RAE's VAE minimises the squared error, summed over pixels and averaged over C channels, plus β KL: that is this model
    with a fixed ``std`` of √(C β / 2), 0.368 on CelebA-64 and 0.190 on CIFAR-10. The density is of the levels as they are,
    in [0, 1], without dequantisation.
    """

    class Options(FlatConvolutional.Options):
        """``std``: of the decoder, data units; ``learned_std``: it is trained, from there."""

        std: Annotated[float, Field(gt=0)] = 1.0
        learned_std: bool = False

    def __init__(self, options: Options, data_shape: tuple[int, ...]):
        super().__init__(options, data_shape, 2, options.std)
        self.likelihood.requires_grad_(options.learned_std)

    def posterior(self, k: int, context: Tensor, features: Sequence[Tensor]) -> DiagonalNormal:  # noqa: ARG002
        """The encoder's Normal."""
        mean, log_std = features[0].float().chunk(2, dim=1)
        return DiagonalNormal(mean, soft_clamp(log_std).exp())
