"""RAE: a deterministic autoencoder whose decoder is regularised in place of a posterior's noise (Ghosh et al. 2020).

loss = |x − x̂|² + b ½ |z|² + λ R, with R one of

    l2                  Σ |W|² over the decoder's kernels
    gradient-penalty    mean over examples and latents of (∂ Σ x̂² / ∂z)²
    spectral-norm       none: every kernel of both networks is divided by its largest singular value (Miyato et al. 2018)

Sums are over pixels and channels, N of them. The published code divides the squared error by N and takes the mean of z² over
d latents, so its weights become b = 2 β N / d and λ N here.
"""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized

from models.conv_vae import FlatConvolutional
from models.distributions import Distribution, Point

STD = math.sqrt(0.5)
"""Of the decoder, with which −log p(x | z) is the squared error and a constant."""

KERNELS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)

SETTLING = 100
"""Power iterations after which a kernel's largest singular value is known to float32's last digits, or nearly."""


class RAE(FlatConvolutional):
    """Its posterior is a point, so it has no likelihood and no prior of its own: one is fitted to its codes afterwards."""

    stochastic: ClassVar[bool] = False

    class Options(FlatConvolutional.Options):
        """``code_penalty``: b. ``regulariser``, ``weight``: R and λ (spectral norms have none)."""

        code_penalty: Annotated[float, Field(ge=0)]
        regulariser: Literal["none", "l2", "gradient-penalty", "spectral-norm"] = "none"
        weight: Annotated[float, Field(ge=0)] = 0.0

    def __init__(self, options: Options, data_shape: tuple[int, ...]):
        super().__init__(options, data_shape, 1, STD)
        self.likelihood.requires_grad_(False)
        self.code_penalty, self.regulariser, self.weight = options.code_penalty, options.regulariser, options.weight
        if self.regulariser == "spectral-norm":
            for layer in (*self.encoder.modules(), *self.decoder.modules()):
                if isinstance(layer, KERNELS):
                    spectral_norm(layer)

    def posterior(self, k: int, context: Tensor, features: Sequence[Tensor]) -> Distribution:  # noqa: ARG002
        """The code."""
        return Point(features[0].float())

    def divergence(self, k: int, context: Tensor, posterior: Distribution, z: Tensor) -> Tensor:  # noqa: ARG002
        """b ½ |z|², in place of a KL, (batch,)."""
        return 0.5 * self.code_penalty * posterior.mean.square().sum(1)

    @torch.no_grad()
    def settle(self) -> None:
        """Find the kernels' singular vectors anew: those that were averaged have norms under 1, and scale kernels up."""
        normalised = [layer for layer in self.modules() if isinstance(layer, KERNELS) and is_parametrized(layer)]
        for layer in normalised:
            mode = layer.training
            layer.train()
            for _ in range(SETTLING):
                layer.weight  # noqa: B018  in training, to read it takes a step of power iteration
            layer.train(mode)

    def penalties(self, x: Tensor) -> dict[str, Tensor]:
        """λ R, where it is a term of the loss."""
        if self.regulariser == "l2":
            kernels = [layer.weight for layer in self.decoder.modules() if isinstance(layer, KERNELS)]
            return {"l2": self.weight * torch.stack([kernel.square().sum() for kernel in kernels]).sum()}
        if self.regulariser == "gradient-penalty":
            z = self.encode(x)[0]
            (slope,) = torch.autograd.grad(self.decoder(z).square().sum(), z, create_graph=True)
            return {"gradient-penalty": self.weight * slope.float().square().mean()}
        return {}
