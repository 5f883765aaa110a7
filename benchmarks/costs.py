"""What the papers' full experiments cost: `priorhole plan` on paper, beside the GPU-days that were published.

A plan on a CPU counts in seconds of one core. Those are turned into operations by what the experiment's own training step
reaches on that core, and into days of a V100 at a third of its 15.7 TFLOP/s in fp32, which is what such networks reach at
best. Published days are of mixed precision, on several GPUs. Name the experiments, or all with published days are planned;
each takes some minutes.
"""

import json
import subprocess
import sys
from pathlib import Path

from timing import processor

from pipelines.config import read
from pipelines.fanout import Machine
from pipelines.plan import _Measuring
from pipelines.recipe import Recipe
from runtime import hardware

V100 = 15.7e12 / 3
PUBLISHED = {
    "mnist-nvae": {"train-vae": "1.75"},
    "cifar10-nvae": {"train-vae": "18.3"},
    "celeba64-nvae": {"train-vae": "30.7 of the 30-group model", "train-prior": "8.1: 13 hours a classifier"},
    "celebahq256-nvae": {"train-vae": "94"},
}
"""GPU-days on V100s: NVAE's README (hours times GPUs) and NCP-VAE's section on costs. VDVAE's training took 560."""


def main() -> None:
    """Print a row of a Markdown table for each stage of each experiment, as soon as it is known."""
    hardware.reproducible(1)
    print(f"{processor()}, 1 thread")
    print(
        "| experiment | stage | core-days here, at GFLOP/s | V100-days on paper | published GPU-days |\n"
        "| --- | --- | --- | --- | --- |"
    )
    params = read(Path("params.yaml"))
    for experiment in sys.argv[1:] or PUBLISHED:
        command = ["priorhole", "plan", experiment, "--workers", "1", "--json"]
        plan = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        recipe = Recipe(params, experiment, params["experiments"][experiment]["seeds"][0], Path())
        train = recipe.experiment.train
        training = next(stage for stage in plan["stages"] if stage["stage"] == "train-vae")
        operations = _Measuring(recipe, Machine())._of_a_step(train.batch)[0] * train.steps * training["tasks"]
        rate = operations / training["seconds"]
        for stage in plan["stages"]:
            days = stage["seconds"] / 86400
            published = PUBLISHED.get(experiment, {}).get(stage["stage"], "")
            row = [experiment, stage["stage"], f"{days:.3g} at {rate / 1e9:.0f}", f"{days * rate / V100:.3g}", published]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
