"""Parameters of the papers' models at full width, counted without memory for them."""

import torch

from models.nvae import NVAE

MODELS = {
    "MNIST, 10 groups of 4x4": ({"groups_per_scale": [10], "width": 32, "halvings": 3, "outer_cells": 3}, (1, 28, 28)),
    "CIFAR-10, 30 groups of 16x16": ({"groups_per_scale": [30], "width": 128, "halvings": 1}, (3, 32, 32)),
    "CelebA-64, 3 x 5 groups": ({"groups_per_scale": [5] * 3, "width": 48, "halvings": 1}, (3, 64, 64)),
    "CelebA-HQ-256, 5 x 4 groups": ({"groups_per_scale": [4] * 5, "width": 32, "halvings": 1}, (3, 256, 256)),
}


def main() -> None:
    """Print a line per model."""
    for name, (settings, shape) in MODELS.items():
        likelihood = "bernoulli" if shape[0] == 1 else "pixel-normal"
        with torch.device("meta"):
            vae = NVAE(NVAE.Options(latent_channels=20, likelihood=likelihood, **settings), shape)
        latents = sum(torch.Size(group.latent).numel() for group in vae.layout())
        count = sum(parameter.numel() for parameter in vae.parameters())
        print(f"{name:32s} {count / 1e6:7.1f} M parameters, {latents:7d} latent variables in {vae.groups} groups")


if __name__ == "__main__":
    main()
