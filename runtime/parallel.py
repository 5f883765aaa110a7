"""One training by several processes: each takes a part of every batch, and all of them hold the same weights.

A process group of torch.distributed is what they are in; whoever starts the processes makes it. Without one, all of this is
what it is for one process. Statistics of a batch norm are those of the whole batch, so what is trained does not depend on
how many there are, but for the rounding of sums.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


def size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This process's position among them; the first one, 0, is the one that writes."""
    return distributed.get_rank() if size() > 1 else 0


def wait_for_all() -> None:
    """Return once every process has come this far."""
    if size() > 1:
        distributed.barrier()


def mean(values: Tensor) -> Tensor:
    """The mean over the processes of a tensor that each has, detached; of one process, the tensor itself."""
    if size() == 1:
        return values
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total / size()


def shared(module: nn.Module) -> nn.Module:
    """``module``, whose forward pass gives terms of a loss, such that gradients are their means over the processes."""
    if size() == 1:
        return module
    return DistributedDataParallel(module)


def kept_here(module: nn.Module) -> AbstractContextManager:
    """While gradients of a :func:`shared` module are made that others are yet to be added to, share none of them."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def synchronise_batch_norms(module: nn.Module) -> None:
    """Let the batch norms in a module normalise by the statistics of all processes' parts together."""
    if size() == 1:
        return
    if next(module.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(module)  # whose kernels are for GPUs alone
        return
    for layer in module.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = _SynchronisedBatchNorm2d


class _Sum(torch.autograd.Function):
    """The sum over the processes of a tensor that each has. Each one's loss depends on it, so gradients add up too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004
        """The sum."""
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        """The sum of the gradients."""
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total


def _sum(values: Tensor) -> Tensor:
    return cast(Tensor, _Sum.apply(values))


class _SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """A batch norm in training over the parts, all equally large, that the processes have of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) to the same."""
        if not self.training:
            return super().forward(x)
        whole = x.float()
        average = _sum(whole.mean((0, 2, 3))) / size()
        centred = whole - average[:, None, None]
        variance = _sum(centred.square().mean((0, 2, 3))) / size()
        with torch.no_grad():
            seen, momentum = size() * x.numel() // x.shape[1], cast(float, self.momentum)
            for running, of_batch in ((self.running_mean, average), (self.running_var, variance * (seen / (seen - 1)))):
                cast(Tensor, running).lerp_(of_batch, momentum)
            cast(Tensor, self.num_batches_tracked).add_(1)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)
