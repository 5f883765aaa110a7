"""Smoothness of a convolutional network as a loss: spectral norms of its filters, scales of its batch norms (NVAE, 3.2)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.layers import NormalisedConv2d

ITERATIONS = 4
ITERATIONS_AT_START = 40


def filters(layer: nn.Conv2d) -> Tensor:
    """The filters that a convolution applies, as a matrix (out, in x kernel)."""
    weight = layer.effective_weight if isinstance(layer, NormalisedConv2d) else layer.weight
    return weight.flatten(1)


class SpectralNorms(nn.Module):
    """Σ over the convolutions of a network of the largest singular value of their filter matrix.

    Power iteration, batched over layers of equal shape; the singular vectors are kept from step to step, since weights
    move little. They are buffers of this module, the network is not a part of it.
    """

    steps: Tensor

    def __init__(self, network: nn.Module):
        super().__init__()
        self._layers: dict[str, list[nn.Conv2d]] = {}
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                self._layers.setdefault("x".join(map(str, filters(layer).shape)), []).append(layer)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        for shape, layers in self._layers.items():
            matrix = filters(layers[0])
            # A fixed start: power iteration forgets it, and nothing random is drawn.
            self.register_buffer(f"right_{shape}", matrix.new_ones(len(layers), matrix.shape[1], 1) / matrix.shape[1] ** 0.5)

    def forward(self) -> Tensor:
        """The sum, a scalar, differentiable in the weights."""
        iterations = ITERATIONS_AT_START if self.steps == 0 else ITERATIONS
        self.steps += 1
        found = []
        for shape, layers in self._layers.items():
            matrices, right = torch.stack([filters(layer) for layer in layers]), getattr(self, f"right_{shape}")
            with torch.no_grad():
                for _ in range(iterations):
                    left = functional.normalize(matrices @ right, dim=1, eps=1e-3)
                    right.copy_(functional.normalize(matrices.mT @ left, dim=1, eps=1e-3))
            found.append((left.mT @ matrices @ right).sum())
        return torch.stack(found).sum()


def batch_norm_scales(network: nn.Module) -> Tensor:
    """Σ over the batch norms of a network of the largest |scale|, a scalar; 0 where there are none."""
    scales = [layer.weight.abs().max() for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    return torch.stack(scales).sum() if scales else next(network.parameters()).new_zeros(())
