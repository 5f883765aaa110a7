"""Every prior method and every sampler that params.yaml can name."""

from priors.evalp import AmortisedPrior, EnergyPrior
from priors.flow import FlowPrior
from priors.gmm import GaussianMixturePrior
from priors.langevin import JointLangevin, Langevin, ResampledLangevin
from priors.ncp import NoiseContrastivePrior
from priors.normal import NormalPrior
from priors.protocol import GroupPrior
from priors.samplers import Ancestral, Sampler
from priors.sir import SIR

PRIORS: dict[str, type[GroupPrior]] = {
    "normal": NormalPrior,
    "gmm": GaussianMixturePrior,
    "ncp": NoiseContrastivePrior,
    "flow": FlowPrior,
    "evalp": EnergyPrior,
    "amortised": AmortisedPrior,
}

SAMPLERS: dict[str, type[Sampler]] = {
    "ancestral": Ancestral,
    "sir": SIR,
    "langevin": Langevin,
    "sir-langevin": ResampledLangevin,
    "joint-langevin": JointLangevin,
}
