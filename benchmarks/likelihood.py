"""Importance samples of the hierarchical VAE on a CPU: samples a pass, batch norms folded, freed memory kept or not."""

from unittest import mock

import torch
from timing import compare, processor

from metrics import likelihood
from metrics.likelihood import LikelihoodOptions, log_likelihoods
from models.folding import folded
from models.nvae import NVAE
from models.protocol import HierarchicalVAE
from priors.protocol import GroupPrior, Prior
from runtime import hardware

SAMPLES = 1000


def main() -> None:
    """The shape of mnist-nvae-lite with random weights: 1 000 samples of an image."""
    torch.set_num_threads(1)
    options = NVAE.Options(
        groups_per_scale=[10], latent_channels=1, width=48, patch=4, halvings=1, outer_cells=2, cells=1, expansion=3
    )
    vae = NVAE(options, (1, 28, 28)).eval().requires_grad_(False)
    x = (torch.rand(1, 1, 28, 28) < 0.2).float()
    settings = LikelihoodOptions(samples=[SAMPLES], normaliser=[1], proposals=[1])

    def measure(model: HierarchicalVAE, at_once: int, keep: bool = True):
        prior = Prior(model, [GroupPrior(GroupPrior.Options(), group) for group in model.layout()])

        def run() -> None:
            hardware.keep_freed_memory(keep)
            with mock.patch.object(likelihood, "SAMPLES_AT_ONCE", at_once):
                log_likelihoods(model, {"normal": prior}, {}, x, [0], 0, settings)

        return run

    print(f"{processor()}, one thread")
    compare(
        {
            "1 000 a pass, freed memory given back": measure(vae, 1000, keep=False),
            "1 000 a pass": measure(vae, 1000),
            "100 a pass": measure(vae, 100),
            "100 a pass, batch norms folded": measure(folded(vae), 100),
            "30 a pass, batch norms folded": measure(folded(vae), 30),
        },
        rounds=7,
    )


if __name__ == "__main__":
    main()
