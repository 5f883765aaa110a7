"""One step of stage 2 for all ten groups: a shared pass of the frozen VAE, against one job per group with its own pass."""

import torch
from timing import compare

from models.nvae import NVAE
from priors.ncp import NoiseContrastivePrior
from priors.networks import NetworkOptions
from priors.protocol import GroupPrior, Pair, Prior
from priors.trainer import pairs
from runtime import hardware
from runtime.hardware import autocast

BATCH = 128


def main() -> None:
    """The shapes of mnist-nvae-lite and of its classifiers, random weights, in the precision that pays here."""
    torch.set_num_threads(1)
    device = hardware.device()
    options = NVAE.Options(
        groups_per_scale=[10], latent_channels=1, width=48, patch=4, halvings=1, outer_cells=2, cells=1, expansion=3
    )
    vae = NVAE(options, (1, 28, 28)).to(device).eval().requires_grad_(False)
    below = Prior(vae, [GroupPrior(GroupPrior.Options(), group) for group in vae.layout()])
    settings = NoiseContrastivePrior.Options(steps=1, batch=BATCH, network=NetworkOptions(width=32, depth=2))
    priors = [NoiseContrastivePrior(settings, group).to(device) for group in vae.layout()]
    optimizers = [torch.optim.Adam(prior.parameters(), fused=True) for prior in priors]
    x = (torch.rand(BATCH, 1, 28, 28, device=device) < 0.2).float()

    def learn(k: int, pair: Pair) -> None:
        terms = priors[k].loss(pair, 0)
        optimizers[k].zero_grad()
        sum(terms.values()).backward()
        optimizers[k].step()

    def fused() -> None:
        with autocast("auto", device.type):
            found = pairs(below, x, 0, "benchmark")
            for k, pair in enumerate(found):
                learn(k, pair)

    def one_job_per_group() -> None:
        with autocast("auto", device.type):
            for k in range(vae.groups):
                learn(k, pairs(below, x, 0, "benchmark")[k])

    def classifiers_alone() -> None:
        with autocast("auto", device.type):
            for k, pair in enumerate(kept):
                learn(k, pair)

    with autocast("auto", device.type):
        kept = pairs(below, x, 0, "benchmark")
    compare(
        {
            "ten jobs, a step each": one_job_per_group,
            "fused, a step of all ten": fused,
            "the classifiers' part of it": classifiers_alone,
        }
    )


if __name__ == "__main__":
    main()
