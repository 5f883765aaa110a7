"""Layers that models and learned priors share."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate computed from the channels' means. (n, width, h, w) to the same."""

    def __init__(self, width: int):
        super().__init__()
        hidden = max(width // 16, 4)
        self.gate = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the gate."""
        return x * self.gate(x.mean((2, 3)))[:, :, None, None]


class NormalisedConv2d(nn.Conv2d):
    """A convolution whose filters have a learned norm: w = exp(g) v / (|v| + 1e-5) (Salimans and Kingma 2016; NVAE's ε)."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.log_norm = nn.Parameter((norms(self.weight.detach()) + 1e-2).log())

    @property
    def effective_weight(self) -> Tensor:
        """The filters that are applied, shape of ``weight``."""
        return self._normalised(self.weight)

    def _normalised(self, filters: Tensor) -> Tensor:
        return filters * (self.log_norm.exp() / (norms(filters) + 1e-5))[:, None, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        return functional.conv2d(x, self.effective_weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def norms(filters: Tensor) -> Tensor:
    """Of filters (out, in, kernel, kernel): (out,)."""
    return torch.linalg.vector_norm(filters, dim=(1, 2, 3))


class DepthwiseConv2d(nn.Conv2d):
    """One filter per channel, side preserved. On a CPU always in fp32: there, bf16 makes the filters' gradient slower."""

    def __init__(self, width: int, kernel: int):
        super().__init__(width, width, kernel, padding=kernel // 2, groups=width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, in the type of ``x``."""
        if x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)
