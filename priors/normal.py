"""The base prior: the model's own Normal, uncorrected. Every other prior is measured against it."""

from priors.protocol import GroupPrior


class NormalPrior(GroupPrior):
    """p(z_k | c_k) as the VAE was trained with it."""
