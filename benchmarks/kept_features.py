"""A step of stage 2 from what the frozen encoder made of an image before, against encoding it again.

At the sizes of ``cifar10-vae-lite`` and of ``celeba64-vae``, random weights and images, every image seen before; and whether
a prior that is trained so has the same weights, to the last bit.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from timing import compare, processor

from datasets.dataset import Dataset
from models.conv_vae import ConvVAE
from priors.evalp import EnergyPrior
from priors.flow import FlowOptions
from priors.ncp import NoiseContrastivePrior
from priors.networks import NetworkOptions
from priors.protocol import GroupPrior, Prior, TrainedPrior
from priors.trainer import Slot, TrainingBatches, learn, pairs
from runtime import hardware
from runtime.identity import Identity
from runtime.randomness import initialising

BATCH, IMAGES, STEPS = 128, 1280, 100
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "cifar10": (32, {"latents": 64, "widths": [32, 64, 128], "kernel": 4, "std": 0.19}),
    "celeba64": (64, {"latents": 64, "std": 0.368}),
}


def new_prior(method: str, below: Prior) -> TrainedPrior:
    """The classifier or the energy of the images' experiments."""
    group, common = below.model.layout()[0], {"steps": STEPS, "batch": BATCH, "held_out": 2, "checks": 1}
    with initialising(0, method):
        if method == "ncp":
            options = NoiseContrastivePrior.Options(**common, network=NetworkOptions(width=512, depth=2))
            return NoiseContrastivePrior(options, group)
        return EnergyPrior(EnergyPrior.Options(**common, flow=FlowOptions(transforms=2)), group)


def trained(method: str, below: Prior, data: Dataset) -> dict[str, torch.Tensor]:
    """The weights after ten epochs."""
    prior = new_prior(method, below).to(below.device)
    with tempfile.TemporaryDirectory() as folder:
        learn(below, [Slot(0, prior, Path(folder) / "k00.safetensors", Identity("", 0))], data)
    return prior.state_dict()


def main(name: str) -> None:
    """Print the ratios at the sizes of a data set's model, and whether the weights agree."""
    torch.set_num_threads(1)
    device = hardware.device()
    side, sizes = MODELS[name]
    levels = torch.randint(256, (IMAGES + 4, 3, side, side), dtype=torch.uint8)
    data = Dataset(name, dict(zip(("train", "validation", "test"), levels.split([IMAGES, 2, 2]), strict=True)), "")
    with initialising(0, name):
        vae = ConvVAE(ConvVAE.Options(**sizes), (3, side, side))
    vae = vae.to(device).eval().requires_grad_(False)
    below = Prior(vae, [GroupPrior(GroupPrior.Options(), group) for group in vae.layout()])
    kept = TrainingBatches(vae, data, BATCH, 0)
    for step in range(2 * IMAGES // BATCH):
        kept.of(step)
    print(f"{processor()}; {name}, batches of {BATCH}")
    for method in ("ncp", "evalp"):
        prior = new_prior(method, below).to(device)

        def step(x: Any, prior: TrainedPrior = prior) -> None:
            terms = prior.loss(pairs(below, x, 0, "benchmark")[0], 0)
            torch.stack(list(terms.values())).sum().backward()
            hardware.clock()  # waits for a GPU

        compare({
            f"{method}: encoded in every epoch": lambda: step(data.train_batch(BATCH, 0, 0).to(device)),
            f"{method}: kept": lambda: step(kept.of(0)),
        })  # fmt: skip
        with patch.object(TrainingBatches, "KEPT_BYTES", 0):
            plain = trained(method, below, data)
        agree = all(torch.equal(plain[name], value) for name, value in trained(method, below, data).items())
        print(f"{method}: the weights after {STEPS} steps {'agree' if agree else 'differ'}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cifar10")
