"""One stage-1 step of NVAE, operator by operator: time, and FLOP/s beside what a plain convolution reaches here.

On the shapes of `celeba64-nvae` and `cifar10-nvae-lite`, forward and backward and the optimiser's part, in the precision
that the pipeline takes. Operators are timed one by one as they reach the device, each waited for.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import processor
from torch.utils._python_dispatch import TorchDispatchMode

from datasets.registry import spec
from models.trainer import OPTIMIZERS, _Loss
from pipelines.config import read
from pipelines.recipe import Recipe
from pipelines.stored import Stored
from runtime import hardware
from runtime.randomness import Noise
from runtime.training import total

STEPS = {"cifar10-nvae-lite": 128, "celeba64-nvae": 4}
"""Images of the step of each experiment: as many as it trains with, or as give a CPU its work."""

CONVOLUTIONS = ("convolution", "convolution_backward")
KINDS = {
    "normalisation": ("batch_norm",),
    "activations": ("silu", "elu", "sigmoid", "softplus", "tanh"),
    "matrix products": ("mm", "addmm", "bmm", "mv"),
    "casts and copies": ("_to_copy", "copy_", "clone", "cat", "_foreach_copy_"),
    "optimiser and spectral norms": ("_foreach", "_fused", "linalg", "norm"),
}


class ByKind(TorchDispatchMode):
    """Seconds and FLOP of every operator that runs inside, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.flop: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, wait for it, and put it down."""
        started = hardware.clock()
        found = func(*args, **(kwargs or {}))
        seconds, name = hardware.clock() - started, func.overloadpacket.__name__
        kind, flop = _described(name, args, found)
        self.seconds[kind] += seconds
        self.flop[kind] += flop
        return found


def _described(name: str, args: Any, found: Any) -> tuple[str, int]:
    """The kind of an operator, and its FLOP where it is a convolution or a product."""
    if name in CONVOLUTIONS:
        backward = name != "convolution"
        weight, out = (args[2], args[0]) if backward else (args[1], found)
        groups, side = args[9 if backward else 8], f"{weight.shape[2]}x{weight.shape[3]}"
        flop = 2 * weight.numel() * len(out) * out.shape[2:].numel()
        passes = sum(args[10][:2]) if backward else 1
        return f"{'depthwise' if groups > 1 else 'dense'} {side}{', backward' * backward}", passes * flop
    if name in KINDS["matrix products"]:
        left, right = args[-2:]
        return "matrix products", 2 * left.numel() * (right.shape[-1] if right.dim() > 1 else 1)
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "the rest"), 0


def _peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a dense 3x3 convolution of 256 channels."""
    layer = torch.nn.Conv2d(256, 256, 3, padding=1).to(device, dtype).requires_grad_(False)
    x = torch.randn(16, 256, 32, 32, device=device, dtype=dtype)
    layer(x)  # the first call makes ready
    with ByKind() as seen:
        for _ in range(5):
            layer(x)
    return sum(seen.flop.values()) / sum(seen.seconds.values())


def _step_of(stored: Stored, images: int, device: torch.device) -> Callable[[], None]:
    """A training step of an experiment's VAE, from its first weights."""
    options, vae = stored.recipe.experiment.train, stored.new_vae().to(device).train()
    loss, optimizer = _Loss(vae, options), OPTIMIZERS[options.optimizer](vae.parameters(), lr=1e-4)
    x = torch.rand(images, *spec(stored.recipe.experiment.dataset).shape, device=device)
    noise = [Noise(0, "benchmark", k, device=device) for k in range(vae.groups)]

    def step() -> None:
        optimizer.zero_grad()
        total(loss(x, noise, 1)).backward()
        optimizer.step()

    return step


def main() -> None:
    """A table of kinds for each experiment: share of the time, GFLOP/s, share of the convolution's rate."""
    torch.set_num_threads(1)
    hardware.keep_freed_memory()
    device = hardware.device()
    half = hardware.gains_from_bf16(device.type)
    rate = _peak(torch.bfloat16 if half else torch.float32, device)
    print(f"{processor()}, {torch.get_num_threads()} thread; a dense convolution in {'bf16' if half else 'fp32'}: ", end="")
    print(f"{rate / 1e9:.0f} GFLOP/s")
    for experiment, images in STEPS.items():
        step = _step_of(Stored(Recipe(read(Path("params.yaml")), experiment, 0, Path.cwd())), images, device)
        step()
        started = hardware.clock()
        step()
        whole = hardware.clock() - started
        with ByKind() as seen:
            step()
        seconds, flop = sum(seen.seconds.values()), sum(seen.flop.values())
        print(
            f"\n{experiment}: {images} images, {flop / images / 1e9:.2f} GFLOP each, {images / whole:.1f} images/s, ", end=""
        )
        print(f"{flop / whole / 1e9:.0f} GFLOP/s ({flop / whole / rate:.0%}); of the time, and of the rate:")
        for kind, own in sorted(seen.seconds.items(), key=lambda item: -item[1]):
            speed = seen.flop[kind] / own
            print(f"{kind:32s} {own / seconds:6.1%}" + (f" {speed / 1e9:8.0f} GFLOP/s {speed / rate:6.0%}" if speed else ""))


if __name__ == "__main__":
    main()
