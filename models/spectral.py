"""Smoothness of a convolutional network as a loss: spectral norms of its filters, scales of its batch norms (NVAE, 3.2)."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm  # of every kind: processes that share a batch have one of their own

from models.layers import NormalisedConv2d
from runtime.randomness import generator

ITERATIONS = 4
ITERATIONS_AT_START = 40


def filters(layer: nn.Conv2d) -> Tensor:
    """The filters that a convolution applies, as a matrix (out, in x kernel)."""
    weight = layer.effective_weight if isinstance(layer, NormalisedConv2d) else layer.weight
    return weight.flatten(1)


class SpectralNorms(nn.Module):
    """Σ over the convolutions of a network of the largest singular value of their filter matrix.

    Power iteration, batched over layers of equal shape; the left singular vectors are kept from step to step, since weights
    move little. They are buffers of this module, the network is not a part of it. (NVAE's released code does not keep them
    in its checkpoints, and begins anew where it resumes.)
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
            # The same start in every training: power iteration forgets it.
            start = torch.randn(len(layers), matrix.shape[0], 1, generator=generator(0, f"spectral {shape}"), device="cpu")
            self.register_buffer(f"left_{shape}", _unit(start).to(matrix))

    def forward(self) -> Tensor:
        """The sum, a scalar, differentiable in the weights."""
        iterations = ITERATIONS_AT_START if self.steps == 0 else ITERATIONS
        self.steps += 1
        found = []
        for shape, layers in self._layers.items():
            matrices, left = torch.stack([filters(layer) for layer in layers]), getattr(self, f"left_{shape}")
            new, right = singular_vectors(matrices.detach(), left, iterations)
            left.copy_(new)
            found.append((new.mT @ matrices @ right).sum())
        return torch.stack(found).sum()


def singular_vectors(matrices: Tensor, left: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The first left and right ones of matrices (layers, out, in), by power iteration from ``left`` (layers, out, 1)."""
    for _ in range(iterations):
        right = _unit(matrices.mT @ left)
        left = _unit(matrices @ right)
    return left, right


def _unit(vectors: Tensor) -> Tensor:
    """Columns (layers, size, 1) of norm 1, unless they are nearly nothing."""
    return functional.normalize(vectors, dim=1, eps=1e-3)


def batch_norm_scales(network: nn.Module) -> Tensor:
    """Σ over the batch norms of a network of the largest |scale|, a scalar; 0 where there are none."""
    scales = [layer.weight.abs().max() for layer in network.modules() if isinstance(layer, _BatchNorm)]
    return torch.stack(scales).sum() if scales else next(network.parameters()).new_zeros(())
