"""Draw groups by SIR with M = 5 000: the engine against the reference (``reference.py``), and against the machine's peak.

Stacks of random classifiers of the shapes of mnist-nvae-lite (10 groups of 4x4) and of the CelebA-64 model (15 groups, 20
channels at 8, 16 and 32 pixels). A stack's groups of one shape cost the same, so one of each shape is timed and counted as
often as it occurs. Prints seconds per image, the ratio, and achieved FLOP/s next to a matrix product's.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from reference import Concatenating, sir
from timing import processor

from models.distributions import DiagonalNormal
from models.folding import folded
from models.protocol import Group
from priors.ncp import NoiseContrastivePrior
from priors.networks import MapScorer, NetworkOptions
from priors.protocol import GroupPrior
from priors.sir import BLOCK, SIR
from runtime import hardware
from runtime.hardware import Precision
from runtime.randomness import Noise


@dataclass
class Shape:
    """Groups of one shape: how many of them, channels and side of the latent map, channels of the context; the network."""

    count: int
    channels: int
    side: int
    context: int
    network: NetworkOptions

    def classifier(self) -> NoiseContrastivePrior:
        """With random weights."""
        group = Group(1, (self.channels, self.side, self.side), (self.context, self.side, self.side))
        options = NoiseContrastivePrior.Options(steps=1, batch=2, network=self.network)
        return NoiseContrastivePrior(options, group).to(hardware.device()).eval().requires_grad_(False)

    def flop(self) -> float:
        """Of the engine's convolutions, for one proposal: additions and multiplications."""
        width, depth, side = self.network.width, self.network.depth, self.side
        total = 9 * side**2 * (self.channels * width + 2 * depth * width**2)
        for _ in range(self.network.halvings):
            width, side = 2 * width, side // 2
            total += 9 * side**2 * (width**2 // 2 + width**2 + 2 * depth * width**2) + side**2 * width**2 // 2
        return 2 * total


LABELS = (
    "engine, fp32",
    "engine, auto",
    "engine, fp32, norms not folded",
    "convolutions alone, fp32",
    "convolutions alone, auto",
    "reference",
)
DEEP = NetworkOptions(width=64, depth=2, halvings=1)
STACKS = {
    "mnist-nvae-lite": [Shape(10, 1, 4, 48, NetworkOptions(width=32, depth=2))],
    "CelebA-64": [Shape(5, 20, 8, 384, DEEP), Shape(5, 20, 16, 192, DEEP), Shape(5, 20, 32, 96, DEEP)],
}


def convolutions(run: Callable[[], object], classifier: torch.nn.Module, precision: Precision) -> Callable[[], None]:
    """What the classifier's convolutions do in ``run``, and nothing else: no engine over the same kernels is faster."""
    calls: list[tuple[torch.nn.Module, torch.Tensor]] = []
    layers = [module for module in classifier.modules() if isinstance(module, torch.nn.Conv2d)]
    hooks = [layer.register_forward_pre_hook(lambda layer, seen: calls.append((layer, *seen))) for layer in layers]
    run()
    for hook in hooks:
        hook.remove()

    def again() -> None:
        with hardware.autocast(precision, hardware.device().type):
            for layer, seen in calls:
                layer(seen)

    return again


class OneGroup:
    """A prior of one group over N(0, I), as samplers see it."""

    exact = False
    proposes = False

    def __init__(self, group: GroupPrior):
        self.group = group

    def base(self, k: int, context: torch.Tensor) -> DiagonalNormal:  # noqa: ARG002
        """N(0, I) for each of the batch."""
        zeros = context.new_zeros(len(context), *self.group.group.latent)
        return DiagonalNormal(zeros, torch.ones_like(zeros))

    def proposal(self, k: int, context: torch.Tensor) -> DiagonalNormal:
        """The base."""
        return self.base(k, context)

    def log_ratio(self, k: int, z: torch.Tensor, context: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """The group's."""
        return self.group.log_ratio(z, context)

    def prepare(self, k: int, context: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """The group's."""
        return self.group.prepare(context)

    def prepared_log_ratio(self, k: int, z: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """The group's."""
        return self.group.prepared_log_ratio(z, prepared)

    def footprint(self, k: int) -> int:  # noqa: ARG002
        """The group's."""
        return self.group.footprint


def timed(run: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak(dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product of 2 048."""
    a = torch.randn(2048, 2048, device=hardware.device()).to(dtype)
    a @ a
    return 2 * 2048**3 / statistics.median(timed(lambda: a @ a) for _ in range(9))


@torch.no_grad()
def measure(name: str, stack: list[Shape], images: int, proposals: int, rounds: int, with_reference: bool) -> None:
    """Print a stack's table."""
    device, totals = hardware.device(), dict.fromkeys(LABELS, 0.0)
    print(f"\n{name}, M = {proposals}, {images} images at a time")
    for shape in stack:
        trained = shape.classifier()
        classifier = folded(trained)
        prior, context = OneGroup(classifier), torch.randn(images, shape.context, shape.side, shape.side, device=device)
        assert isinstance(trained.classifier, MapScorer)
        plain = Concatenating(trained.classifier).to(device)
        engines = {
            f"engine, {precision}": SIR(SIR.Options(proposals=proposals, precision=precision))
            for precision in (("fp32", "auto") if hardware.gains_from_bf16(device.type) else ("fp32",))
        }

        def engine(sampler: SIR, prior: OneGroup = prior) -> None:
            sampler.draw(prior, 0, context, lambda purpose: Noise(0, purpose, rows=range(images), device=device))  # noqa: B023

        runs: dict[str, tuple[Callable[[], object], float]] = {
            label: (lambda sampler=sampler: engine(sampler), images) for label, sampler in engines.items()
        }
        runs["engine, fp32, norms not folded"] = (lambda: engine(engines["engine, fp32"], OneGroup(trained)), images)  # noqa: B023
        for label, sampler in engines.items():
            precision = sampler.options.precision
            few = SIR(SIR.Options(proposals=BLOCK, precision=precision))
            alone = convolutions(lambda few=few: engine(few), classifier, precision)
            runs[label.replace("engine", "convolutions alone")] = alone, images * BLOCK / proposals
        if with_reference:
            runs["reference"] = (lambda: sir(plain, prior.base(0, context[:1]), context[:1], proposals), 1)  # noqa: B023
        seconds: dict[str, list[float]] = {label: [] for label in runs}
        for _ in range(rounds):
            for label, (run, drawn) in runs.items():
                hardware.keep_freed_memory(label != "reference")  # it has a process's defaults, the engine the pipeline's
                seconds[label].append(timed(run) / drawn)
        for label, found in seconds.items():
            median = statistics.median(found)
            totals[label] += shape.count * median
            rate = shape.flop() * proposals / median / 1e9
            print(f"  {shape.count} groups of {shape.channels}x{shape.side}x{shape.side:<3d} {label:30s} "
                  f"{shape.count * median:9.3f} s an image   {rate:8.0f} GFLOP/s")  # fmt: skip
    for label, total in totals.items():
        if total:
            print(f"  all groups {label:30s} {total:9.3f} s an image   {totals['reference'] / total:6.2f} x")


def memory(proposals: int) -> int:
    """Peak resident memory, KiB, of a process that draws a group of the small stack with M proposals."""
    code = (
        "import sir as b, torch\n"
        "torch.set_num_threads(1)\n"
        "torch.set_grad_enabled(False)\n"
        "shape = b.STACKS['mnist-nvae-lite'][0]\n"
        "prior, context = b.OneGroup(b.folded(shape.classifier())), torch.randn(4, shape.context, shape.side, shape.side)\n"
        f"sampler = b.SIR(b.SIR.Options(proposals={proposals}))\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # the peak so far: the parent's and the imports'
        "sampler.draw(prior, 0, context, lambda purpose: b.Noise(0, purpose, rows=range(4)))\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=sys.path[0])
    return int(found.stdout)


def main() -> None:
    """Both stacks, then the memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--proposals", type=int, default=5000)
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stack", choices=list(STACKS), action="append")
    parser.add_argument("--engine-only", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{processor()}, one thread: a matrix product of 2 048 makes "
          f"{peak(torch.float32) / 1e9:.0f} GFLOP/s in fp32, {peak(torch.bfloat16) / 1e9:.0f} in bf16")  # fmt: skip
    for name in chosen.stack or STACKS:
        measure(name, STACKS[name], chosen.images, chosen.proposals, chosen.rounds, not chosen.engine_only)
    if not torch.cuda.is_available():
        few, many = memory(500), memory(50_000)
        print(f"\npeak memory of a process: M = 500 {few} KiB, M = 50 000 {many} KiB, {many / few:.3f} times as much")


if __name__ == "__main__":
    main()
