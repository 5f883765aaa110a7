"""A pretend accelerator: a second torch device that computes on the CPU, and refuses to be mixed with it as a GPU does.

Its tensors hold a tensor on the CPU each. Whatever torch makes "on" it becomes one; an operator whose tensors lie on both
raises, unless a GPU would take it: numbers without dimensions, and indices.
"""

from contextlib import contextmanager
from functools import cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "other"
HALF = ("conv1d", "conv2d", "conv_transpose2d", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm")
"""What autocast computes in half precision."""
WHOLE = ("exp", "log", "log1p", "logsumexp", "softplus", "_log_softmax", "sum", "norm", "pow", "cumsum", "prod")
"""What autocast computes in single precision, as far as it is met here."""

aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
TAKES_BOTH = INDEXING | {aten.copy_.default, aten._to_copy.default}


class MixedDevicesError(Exception):
    """An operator was given tensors of both devices."""


class PretendTensor(torch.Tensor):
    """A tensor on the pretend device, which a CPU tensor stands behind."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            dtype=held.dtype,
            device=f"{NAME}:0",
            storage_offset=held.storage_offset(),
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"PretendTensor({self.held})"

    def __deepcopy__(self, memo):
        copied = PretendTensor(self.held.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        return memo.setdefault(id(self), copied)

    def tolist(self):
        return self.detach().held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def _on_device(device):
    return device is not None and torch.device(device).type == NAME


def computed(func, args, kwargs):
    """The operator on the CPU tensors behind the arguments; its results on the device that a GPU's would be on."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = any(isinstance(tensor, PretendTensor) for tensor in tensors)
    beside = [t for t in tensors if not isinstance(t, PretendTensor) and t.dim() > 0 and t.device.type != "meta"]
    if here and beside and func not in TAKES_BOTH:
        raise MixedDevicesError(f"{func} was given tensors on {NAME} and on {beside[0].device}")
    if here and func in INDEXING and not isinstance(args[0], PretendTensor):
        raise MixedDevicesError(f"{func} indexes a tensor on the CPU by one on {NAME}")
    device = kwargs.get("device")
    there = _on_device(device) if device is not None else here
    if device is not None and _on_device(device):
        kwargs = kwargs | {"device": torch.device("cpu")}
    if func is aten.copy_.default:
        there = isinstance(args[0], PretendTensor)
    plain_args, plain_kwargs = tree_map_only(PretendTensor, lambda tensor: tensor.held, (args, kwargs))
    found = func(*plain_args, **plain_kwargs)
    if func is aten._local_scalar_dense.default or not there:
        return found
    found = tree_map_only(torch.Tensor, PretendTensor, found)
    return return_and_correct_aliasing(func, args, kwargs, found) if here else found


class _Factories(TorchDispatchMode):
    """Turns what is made on the device, or sent to it, into its tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _on_device(kwargs.get("device")) or any(isinstance(leaf, PretendTensor) for leaf in tree_leaves((args, kwargs))):
            return computed(func, args, kwargs)
        return func(*args, **kwargs)


class _Module:
    """What torch asks of a device's module."""

    @staticmethod
    def get_amp_supported_dtype():
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def is_initialized():
        return True

    @staticmethod
    def device_count():
        return 1

    @staticmethod
    def current_device():
        return 0

    @staticmethod
    def _is_in_bad_fork():
        return False

    @staticmethod
    def manual_seed_all(seed):
        pass


def _autocast_to(dtype, packet, overload):
    """An operator's kernel under autocast: tensors of the device are cast, and the operator is called again."""

    def kernel(*args, **kwargs):
        wanted = torch.get_autocast_dtype(NAME) if dtype is None else dtype

        def cast(tensor):
            known = tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type == NAME
            return tensor.to(wanted) if known else tensor

        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return getattr(packet, overload)(*tree_map_only(torch.Tensor, cast, args), **kwargs)

    return kernel


@cache
def _registered():
    """The device, known to torch for the rest of the process, and its autocast."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    for names, dtype in ((HALF, None), (WHOLE, torch.float32)):
        for packet in (getattr(aten, name) for name in names):
            for overload in packet.overloads():
                if overload != "out" and not overload.endswith("_out"):
                    schema = f"{packet.__name__}.{overload}" if overload != "default" else packet.__name__
                    library.impl(schema, _autocast_to(dtype, packet, overload), "AutocastPrivateUse1")
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    return library, others  # which forget their kernels when they go


@contextmanager
def accelerator():
    """The device that the block may use; :class:`MixedDevicesError` where it and the CPU are mixed."""
    _registered()
    with _Factories():
        yield torch.device(NAME)
