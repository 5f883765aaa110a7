"""Draws of a spline flow whose two halves are solved in turn, each by itself, against zuko's passes over all latents.

At the sizes of EVaLP's sampler on ``cifar10-vae-lite``, and the steps that train it, of which four in five draw so.
"""

from functools import partial

import torch
from timing import compare, processor

from models.distributions import DiagonalNormal
from models.protocol import Group
from priors.evalp import EnergyOptions, EnergyPrior
from priors.flow import FlowOptions
from priors.protocol import Pair

LATENTS, BATCH = 64, 128


def main() -> None:
    """Print the ratios, and by how much the draws differ."""
    torch.set_num_threads(1)
    options = EnergyPrior.Options(steps=1, batch=BATCH, energy=EnergyOptions(), flow=FlowOptions(transforms=2))
    prior = EnergyPrior(options, Group(0, (LATENTS,), (0,)))
    z, normal = torch.randn(2, BATCH, LATENTS)
    below = DiagonalNormal(torch.zeros_like(z), torch.ones_like(z))
    pair = Pair(z, z, z.new_empty(BATCH, 0), below, normal, torch.rand(BATCH))

    def draws() -> torch.Tensor:
        return prior.proposal(below, pair.context).transform(normal)

    def step(number: int) -> None:
        torch.stack(list(prior.loss(pair, number).values())).sum().backward()

    print(f"{processor()}; {BATCH} draws of {LATENTS} latents")
    prior.flow.requires_grad_(False)  # zuko's passes, then, without what a gradient would add to them
    halves = torch.no_grad()(draws)
    compare({"draws by passes over all": draws, "draws by halves": halves})
    print(f"they differ by {(draws() - halves()).abs().max().item():.1g} at most")
    prior.flow.requires_grad_(True)
    compare({"step of the energy": partial(step, 0), "step of energy and sampler": partial(step, options.ratio - 1)})


if __name__ == "__main__":
    main()
