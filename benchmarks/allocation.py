"""Importance samples of the hierarchical VAE on a CPU: rows per batch, and whether freed memory is kept."""

import torch
from timing import compare

from metrics.likelihood import LikelihoodOptions, log_likelihoods
from models.nvae import NVAE
from priors.protocol import GroupPrior, Prior
from runtime import hardware

SAMPLES = 1000


def main() -> None:
    """The shape of mnist-nvae-lite: 1 000 samples of each of 8 images, in batches of 8 images or of one."""
    torch.set_num_threads(1)
    options = NVAE.Options(
        groups_per_scale=[10], latent_channels=1, width=48, patch=4, halvings=1, outer_cells=2, cells=1, expansion=3
    )
    vae = NVAE(options, (1, 28, 28)).eval().requires_grad_(False)
    prior = Prior(vae, [GroupPrior(GroupPrior.Options(), group) for group in vae.layout()])
    x = (torch.rand(8, 1, 28, 28) < 0.2).float()
    settings = LikelihoodOptions(samples=SAMPLES, normaliser=[1], proposals=[1])

    def measure(batch: int, keep: bool):
        def run() -> None:
            hardware.keep_freed_memory(keep)
            for first in range(0, len(x), batch):
                rows = range(first, first + batch)
                log_likelihoods(vae, {"normal": prior}, {}, x[first : first + batch], rows, 0, settings)

        return run

    compare(
        {
            "8 images a batch, freed memory given back": measure(8, keep=False),
            "8 images a batch, freed memory kept": measure(8, keep=True),
            "1 image a batch, freed memory given back": measure(1, keep=False),
            "1 image a batch, freed memory kept": measure(1, keep=True),
        },
        rounds=3,
    )


if __name__ == "__main__":
    main()
