"""Parameters of the papers' models at full width, counted without memory for them."""

import torch
import yaml

from datasets.registry import spec
from models.nvae import NVAE
from runtime.identity import ROOT

NAMES = (
    "mnist-nvae",
    *(f"{data}-nvae{kind}" for data in ("cifar10", "celeba64", "celebahq256") for kind in ("", "-mixture")),
)


def main() -> None:
    """Print a line per model."""
    experiments = yaml.safe_load((ROOT / "params.yaml").read_text())["experiments"]
    for name in NAMES:
        settings = {key: value for key, value in experiments[name]["model"].items() if key != "name"}
        with torch.device("meta"):
            vae = NVAE(NVAE.Options(**settings), spec(experiments[name]["dataset"]).shape)
        latents = sum(torch.Size(group.latent).numel() for group in vae.layout())
        count = sum(parameter.numel() for parameter in vae.parameters())
        print(f"{name:24s} {count / 1e6:7.1f} M parameters, {latents:7d} latent variables in {vae.groups} groups")


if __name__ == "__main__":
    main()
