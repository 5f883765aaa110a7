"""Peak memory and bytes on the disk at the papers' sizes: a data set like CelebA-64, 50 000 samples of 15 groups.

    python benchmarks/memory.py [--examples 162770] [--images 50000] [FOLDER]

Each stage is a process of its own, whose largest resident set the system reports; what is mapped from files counts with it,
as far as it was touched. The images are noise, the networks tiny and hardly trained, since neither matters for memory: the
shapes are CelebA-64's (3 x 64 x 64 pixels; groups of 8x8, 16x16 and 32x32, 20 latent channels). FOLDER is gone on with.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from datasets.registry import DATASETS, DatasetSpec  # noqa: E402
from metrics.features import OwnClassifier  # noqa: E402
from runtime.arrays import Blocks  # noqa: E402

SHAPE, CLASSES, AT_ONCE = (3, 64, 64), 10, 2048
NAME = "made"


def noise(count: int, seed: int):
    """Blocks of images of noise."""
    stream = torch.Generator().manual_seed(seed)
    for first in range(0, count, AT_ONCE):
        yield torch.randint(256, (min(AT_ONCE, count - first), *SHAPE), dtype=torch.uint8, generator=stream)


def register(examples: int) -> None:
    """Add the made data set to those that there are."""

    def prepare(raw: Path) -> dict[str, Tensor | Blocks]:  # noqa: ARG001
        sizes, found = {"train": examples, "validation": 2000, "test": 19_962}, dict[str, Tensor | Blocks]()
        for seed, (split, count) in enumerate(sizes.items()):
            found[split] = Blocks((count, *SHAPE), torch.uint8, noise(count, seed))
            found[f"{split}-labels"] = torch.arange(count) % CLASSES
        return found

    DATASETS[NAME] = DatasetSpec(SHAPE, "binary-images", "none needed", "made here", prepare)


def experiment(images: int) -> dict:
    """The model, its prior and what is done with them, at the least budget."""
    return {
        "dataset": NAME,
        "seeds": [0],
        "model": {
            "name": "residual-hvae",
            "groups_per_scale": [5, 5, 5],
            "latent_channels": 20,
            "width": 8,
            "halvings": 1,
            "likelihood": "bernoulli",
        },
        "train": {"steps": 30, "batch": 64, "learning_rate": 0.001, "precision": "fp32"},
        "priors": {
            "normal": {"method": "normal", "samplers": []},
            "ncp": {
                "method": "ncp",
                "steps": 5,
                "batch": 32,
                "held_out": 64,
                "network": {"width": 4, "depth": 1},
                "samplers": ["sir-5"],
            },
        },
        "samplers": {"sir-5": {"method": "sir", "proposals": 5}},
        "sample": {"images": images, "batch": 100, "decoding": "mean"},
        "evaluate": {
            "likelihood": {"samples": [1, 4], "normaliser": [5], "proposals": [5], "resamples": 2, "pool": 1000},
            "examples": 8,
            "batch": 4,
            "features": "own",
        },
    }


def measured(folder: Path, stage: str, examples: int) -> tuple[float, float]:
    """Run a stage in a process of its own: seconds, and the largest resident set in GiB."""
    started, process = time.monotonic(), os.fork()
    if process == 0:
        from pipelines.fanout import Machine
        from pipelines.stages import Pipeline

        os.chdir(folder)
        register(examples)
        OwnClassifier.steps = 20
        getattr(Pipeline(folder, Machine(workers=1)), stage)(NAME)
        os._exit(0)
    _, status, usage = os.wait4(process, 0)
    if status:
        sys.exit(f"{stage} ended with status {status}")
    return time.monotonic() - started, usage.ru_maxrss / 2**20


def on_disk(folder: Path) -> float:
    """GB under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def written() -> float:
    """GB that this process's ended children have written to files so far, as the kernel counts them."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"]) / 1e9


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--examples", type=int, default=162_770)
    arguments.add_argument("--images", type=int, default=50_000)
    arguments.add_argument("folder", type=Path, nargs="?")
    chosen = arguments.parse_args()
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="priorhole-memory-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlruns.db")
    print(f"{chosen.examples} images of {SHAPE}, {folder}")
    print(f"{'stage':>12} {'samples':>8} {'seconds':>8} {'peak GiB':>9} {'disk GB':>8} {'written GB':>11}")
    for images in (chosen.images // 10, chosen.images):
        (folder / "params.yaml").write_text(yaml.safe_dump({"run": [], "experiments": {NAME: experiment(images)}}))
        kept = {
            "fetch": folder / "data",
            "train_vae": folder / "artifacts" / NAME / "vae",
            "train_prior": folder / "artifacts" / NAME / "priors",
            "sample": folder / "artifacts" / NAME / "samples",
            "evaluate": folder / "artifacts" / NAME / "measured",
        }
        for stage, place in kept.items():
            before = written()
            seconds, peak = measured(folder, stage, chosen.examples)
            wrote = written() - before
            print(f"{stage:>12} {images:8d} {seconds:8.0f} {peak:9.2f} {on_disk(place):8.2f} {wrote:11.2f}", flush=True)


if __name__ == "__main__":
    main()
