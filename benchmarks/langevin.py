"""Langevin dynamics on mnist-nvae-lite's published prior: acceptance and effective samples a second, by step size."""

from pathlib import Path

import torch
from torch.utils import benchmark

from pipelines.config import read
from pipelines.recipe import Recipe
from pipelines.stored import Stored
from priors.langevin import JointLangevin, Langevin
from priors.sampling import draw
from runtime import hardware

STEPS, IMAGES = 50, 50


def main() -> None:
    """Group by group, and all groups in one chain; ``groups`` are those with the least and the most acceptance."""
    torch.set_num_threads(1)
    hardware.keep_freed_memory()
    stored = Stored(Recipe(read(Path("params.yaml")), "mnist-nvae-lite", 0, Path.cwd()))
    prior, groups = stored.prior("ncp"), range(stored.vae.groups)
    for method in (Langevin, JointLangevin):
        for size in (0.05, 0.1, 0.2, 0.5, 1.0):
            sampler = method(method.Options(steps=STEPS, step_size=size, metropolis=True))
            started = benchmark.timer()
            drawn = draw(stored.vae, prior, sampler, range(IMAGES), 0, "mean")
            seconds = benchmark.timer() - started
            accepted = [drawn[f"acceptance/k{k:02d}"].mean().item() for k in groups]
            ess = min(drawn[f"ess/k{k:02d}"].mean().item() for k in groups) * STEPS
            print(
                f"{method.__name__:14s} step {size:4.2f}: acceptance {min(accepted):.2f} to {max(accepted):.2f}, at least "
                f"{ess:5.1f} of {STEPS} states' worth, {IMAGES * ess / seconds:7.1f} a second"
            )


if __name__ == "__main__":
    main()
