"""Every prior method that params.yaml can name."""

from priors.gmm import GaussianMixturePrior
from priors.ncp import NoiseContrastivePrior
from priors.normal import NormalPrior
from priors.protocol import GroupPrior

PRIORS: dict[str, type[GroupPrior]] = {
    "normal": NormalPrior,
    "gmm": GaussianMixturePrior,
    "ncp": NoiseContrastivePrior,
}
