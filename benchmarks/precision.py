"""Stage 1 of the hierarchical model on this machine: images per second in bf16 autocast and in fp32.

And, where data/mnist-nvae-lite.safetensors is here (priorhole fetch mnist-nvae-lite), what the precision does to the
trained model's likelihood, which the pipeline always measures in fp32.
"""

from pathlib import Path

import torch
from timing import compare, processor

from metrics.likelihood import LikelihoodOptions, log_likelihoods, mean_and_error
from models.nvae import NVAE
from models.trainer import OPTIMIZERS, evidence
from pipelines.config import read
from pipelines.recipe import Recipe
from pipelines.results import BASELINE
from pipelines.stored import Stored
from runtime import hardware
from runtime.randomness import Noise

BATCH = 128
EXPERIMENT, IMAGES, SAMPLES = "mnist-nvae-lite", 500, 50


def main() -> None:
    """The shape of mnist-nvae-lite, a step of forward, backward and Adamax; then its likelihood."""
    device = hardware.device()
    hardware.keep_freed_memory()
    print(f"{processor()}, {torch.get_num_threads()} threads; auto is {hardware.used('auto', device.type)}")
    options = NVAE.Options(
        groups_per_scale=[10], latent_channels=1, width=48, patch=4, halvings=1, outer_cells=2, cells=1, expansion=3
    )
    x = (torch.rand(BATCH, 1, 28, 28, device=device) < 0.2).float()
    noise = [Noise(0, "benchmark", k, device=device) for k in range(10)]

    def step_in(kind: str):
        vae = NVAE(options, (1, 28, 28)).to(device)
        optimizer = OPTIMIZERS["adamax"](vae.parameters(), lr=1e-4)

        def run() -> None:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=kind == "bf16"):
                loss = -evidence(vae, x, noise).elbo.mean()
            loss.backward()
            optimizer.step()

        return run

    medians = compare({f"{BATCH} images, {kind}": step_in(kind) for kind in ("fp32", "bf16")}, rounds=7)
    print(", ".join(f"{name.split()[-1]}: {BATCH / seconds:.0f} images/s" for name, seconds in medians.items()))
    stored = Stored(Recipe(read(Path("params.yaml")), EXPERIMENT, 0, Path.cwd()))
    if stored.recipe.workspace.prepared(stored.recipe.experiment.dataset).exists():
        _likelihoods(stored)


def _likelihoods(stored: Stored) -> None:
    """The trained model's log-likelihood in both precisions, from the same posterior noise."""
    device, prior = hardware.device(), stored.prior(BASELINE)
    settings = LikelihoodOptions(samples=[SAMPLES], normaliser=[1], proposals=[1])
    found: dict[str, list[torch.Tensor]] = {"fp32": [], "bf16": []}
    for row, x in enumerate(stored.dataset.examples("test", slice(IMAGES))[:, None].to(device)):
        for kind, values in found.items():
            with torch.autocast(device.type, torch.bfloat16, enabled=kind == "bf16"):
                measured = log_likelihoods(stored.vae, {BASELINE: prior}, {}, x, [row], 0, settings)
            values.append(measured[f"{BASELINE}/{SAMPLES}"].float())
    fp32, bf16 = (torch.cat(values) for values in found.values())
    value, error, _ = mean_and_error(fp32)
    difference, paired, _ = mean_and_error(bf16 - fp32)
    print(f"log-likelihood of {IMAGES} test images with {SAMPLES} importance samples: fp32 {value:.3f} ± {error:.3f} nats")
    print(f"bf16 differs by {difference:+.4f} ± {paired:.4f} nats (standard errors)")


if __name__ == "__main__":
    main()
