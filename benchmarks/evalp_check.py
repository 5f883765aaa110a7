"""A check of EVaLP's held-out loss, in which every example is given 49 proposals, against the training steps between checks.

In the first group, whose context is the same for all, a proposal and its weight are found once, whomever they serve; in a
later group for each example anew. Both here over 64 latents without a context, as of ``cifar10-vae-lite``: the same numbers.
"""

import torch
from timing import compare, processor

from models.distributions import DiagonalNormal
from models.protocol import Group
from priors.evalp import EnergyOptions, EnergyPrior
from priors.flow import FlowOptions
from priors.protocol import Pair

LATENTS, BATCH = 64, 128


def main() -> None:
    """Print the ratios, and by how much the two losses differ."""
    torch.set_num_threads(1)
    options = EnergyPrior.Options(steps=1, batch=BATCH, energy=EnergyOptions(), flow=FlowOptions(transforms=2))
    priors = [EnergyPrior(options, Group(k, (LATENTS,), (0,))) for k in (1, 0)]
    priors[1].load_state_dict(priors[0].state_dict())
    z, normal = torch.randn(2, BATCH, LATENTS)
    below = DiagonalNormal(torch.zeros_like(z), torch.ones_like(z))
    pair = Pair(z, z, z.new_empty(BATCH, 0), below, normal, torch.rand(BATCH))

    def ten_steps() -> None:
        for step in range(10):
            torch.stack(list(priors[1].loss(pair, step).values())).sum().backward()

    each, once = (lambda prior=prior: prior.held_out_loss(pair, 0)["prior"] for prior in priors)
    print(f"{processor()}; {LATENTS} latents")
    compare({"check of 128, proposals for each": each, "check of 128, proposals once": once, "10 steps": ten_steps})
    print(f"the two checks differ by {(each() - once()).abs().item():.1e} of {once().item():.4f}")


if __name__ == "__main__":
    main()
