"""An image of mnist-nvae-lite: one pass of an amortised sampler, against SIR with M = 5 000 on the published classifiers.

The sampler's flows have random weights: time does not depend on weights.
"""

from pathlib import Path

import torch
from timing import compare

from pipelines.config import read
from pipelines.recipe import Recipe
from pipelines.stored import Stored
from priors.evalp import AmortisedPrior, EnergyPrior
from priors.flow import FlowOptions
from priors.protocol import Prior
from priors.samplers import Ancestral
from priors.sampling import draw
from priors.sir import SIR
from runtime import hardware

EXPERIMENT, IMAGES = "mnist-nvae-lite", 20
FLOW = FlowOptions(transforms=2, width=128, depth=1)


def main() -> None:
    """Twenty images at a time, latents and decoding."""
    torch.set_num_threads(1)
    hardware.keep_freed_memory()
    stored = Stored(Recipe(read(Path("params.yaml")), EXPERIMENT, 0, Path.cwd()))
    layout, options = stored.vae.layout(), EnergyPrior.Options(steps=1, batch=2, flow=FLOW)
    energies = Prior(stored.vae, [EnergyPrior(options, group).eval() for group in layout])
    amortised = Prior(stored.vae, [AmortisedPrior(AmortisedPrior.Options(), group) for group in layout], energies)
    ways = {
        "SIR, M = 5 000": (stored.prior("ncp"), SIR(SIR.Options(proposals=5000, precision="auto"))),
        "SIR, M = 500": (stored.prior("ncp"), SIR(SIR.Options(proposals=500, precision="auto"))),
        "SIR, M = 5 000, until decided": (
            stored.prior("ncp"),
            SIR(SIR.Options(proposals=5000, until_ess=50, precision="auto")),
        ),
        "amortised": (amortised, Ancestral(Ancestral.Options())),
    }
    compare(
        {name: (lambda way=way: draw(stored.vae, *way, range(IMAGES), 0, "mean")) for name, way in ways.items()}, rounds=3
    )


if __name__ == "__main__":
    main()
