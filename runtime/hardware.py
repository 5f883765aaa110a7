"""What the machine can do: device, threads, and the precision that pays on it."""

import ctypes
import os
import time
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["fp32", "auto"]


def device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them; counting them takes no memory of theirs."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(index) for index in range(count)])[:count]


def device_name() -> str:
    """The device as written in ``results.csv``: ``cpu`` or the GPU's name."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


@cache
def gains_from_bf16(kind: str) -> bool:
    """Whether bf16 is faster than fp32 on this device type: on GPUs with bf16 units, and some CPUs."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and cpu_gains_from_bf16(cpuinfo.read_text())


def cpu_gains_from_bf16(cpuinfo: str) -> bool:
    """Whether bf16 is faster than fp32 on a CPU, given Linux's description of it: with AMX, or with AMD's AVX-512 BF16.

    As measured, AMD's EPYC gains by it (``benchmarks/measured/sir.txt``), an Intel Xeon whose virtual machine hides AMX
    does not (``benchmarks/measured/precision.txt``).
    """
    words = set(cpuinfo.split())
    return "amx_bf16" in words or {"avx512_bf16", "AuthenticAMD"} <= words


def used(precision: Precision, kind: str) -> str:
    """What ``precision`` comes to on this device type of this machine: ``bf16`` or ``fp32``."""
    return "bf16" if precision == "auto" and gains_from_bf16(kind) else "fp32"


def autocast(precision: Precision, kind: str) -> AbstractContextManager:
    """bf16 autocast where ``precision`` is ``auto`` and the hardware gains from it; otherwise nothing."""
    return torch.autocast(kind, dtype=torch.bfloat16) if used(precision, kind) == "bf16" else nullcontext()


def elements_at_once(kind: str) -> int:
    """How many numbers of one layer's activations to have at a time when memory is streamed through.

    On a CPU a layer's output should still be in the core's own cache when the next layer reads it.
    """
    return 2**27 if kind == "cuda" else 2**19


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory(keep: bool = True) -> None:
    """Let the process keep what large tensors leave behind; where the C library is not glibc, do nothing.

    By default glibc gives large blocks back to the system at once, and every tensor of some megabytes pays for its pages
    anew. ``keep`` false restores the defaults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30 if keep else 2**17)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if keep else 2**17)


def clock() -> float:
    """Seconds; where a GPU is in use, read once it is idle, since its calls return before their work is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.monotonic()


def reproducible(threads: int) -> None:
    """Fix the thread count and forbid nondeterministic kernels: bitwise repeatability on a CPU needs both.

    What is called fp32 is computed so on a GPU too, where convolutions would round to TF32's 10 bits.
    """
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
