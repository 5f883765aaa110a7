"""A flat VAE of multilayer perceptrons: one group of latents, a fixed N(0, I) base prior."""

import itertools
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from models.distributions import DiagonalNormal, soft_clamp
from models.likelihoods import LikelihoodName, likelihood
from models.protocol import HierarchicalVAE, Likelihood
from runtime import options


def perceptron(inputs: int, outputs: int, width: int, depth: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """``depth`` linear layers of ``width`` units with activations between them."""
    sizes = [inputs, *[width] * (depth - 1), outputs]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


class MLPVAE(HierarchicalVAE):
    """q(z | x) and p(x | z) are perceptrons; data of any shape is flattened. The context is empty: (batch, 0)."""

    convolutional = False

    class Options(options.Options):
        """Settings of the flat VAE."""

        latents: Annotated[int, Field(ge=1)]
        width: Annotated[int, Field(ge=1)] = 256
        depth: Annotated[int, Field(ge=2)] = 4
        likelihood: LikelihoodName = "normal"
        initial_std: Annotated[float, Field(gt=0)] = 1.0

    def __init__(self, options: Options, data_shape: tuple[int, ...]):
        super().__init__()
        size = torch.Size(data_shape).numel()
        self.groups = 1
        self.latents = options.latents
        self.likelihood = likelihood(options.likelihood, options.initial_std)
        self.output_shape = (self.likelihood.outputs(data_shape[0]), *data_shape[1:])
        outputs = torch.Size(self.output_shape).numel()
        self.encoder = perceptron(size, 2 * options.latents, options.width, options.depth)
        self.decoder = perceptron(options.latents, outputs, options.width, options.depth)

    def encode(self, x: Tensor) -> Sequence[Tensor]:
        """Mean and log-sigma of the posterior, one tensor (batch, 2 x latents)."""
        return [self.encoder(x.flatten(1))]

    def start(self, batch: int) -> Tensor:
        """The empty context, (batch, 0)."""
        return self._any.new_zeros(batch, 0)

    def prior(self, k: int, context: Tensor) -> DiagonalNormal:  # noqa: ARG002
        """N(0, I)."""
        zeros = context.new_zeros(len(context), self.latents)
        return DiagonalNormal(zeros, torch.ones_like(zeros))

    def posterior(self, k: int, context: Tensor, features: Sequence[Tensor]) -> DiagonalNormal:  # noqa: ARG002
        """The encoder's Normal."""
        mean, log_std = features[0].float().chunk(2, dim=1)
        return DiagonalNormal(mean, soft_clamp(log_std).exp())

    def advance(self, k: int, context: Tensor, z: Tensor) -> Tensor:  # noqa: ARG002
        """z itself: it is all that the decoder sees."""
        return z

    def decode(self, context: Tensor) -> Likelihood:
        """p(x | z)."""
        return self.likelihood(self.decoder(context).float().unflatten(1, self.output_shape))

    @property
    def _any(self) -> Tensor:
        return next(self.parameters())
