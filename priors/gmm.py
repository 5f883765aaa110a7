"""A Gaussian mixture fitted to the aggregate posterior after training (RAE, Ghosh et al. 2020: 10 full components)."""

import warnings
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, distributions

from models.distributions import Distribution
from models.protocol import Group
from priors.protocol import FittedPrior
from runtime.errors import UserError
from runtime.randomness import Noise

FACTORS_AT_ONCE = 2**26  # numbers of the components' factors, of as many draws as have one


class Mixture(distributions.MixtureSameFamily):
    """A mixture of full-covariance Normals over flattened latents, the same in every row of a batch.

    Args:
        weights: (components,), summing to 1.
        means: (components, d).
        scales: lower Cholesky factors of the covariances, (components, d, d).
        batch: number of rows.
        latent: shape whose number of elements is d.
    """

    def __init__(self, weights: Tensor, means: Tensor, scales: Tensor, batch: int, latent: tuple[int, ...]):
        self.weights, self.means, self.scales, self.rows, self.latent = weights, means, scales, batch, latent
        component = distributions.MultivariateNormal(means, scale_tril=scales, validate_args=False)
        super().__init__(distributions.Categorical(weights, validate_args=False), component, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats of (*lead, batch, *latent), shape (*lead, batch)."""
        return super().log_prob(value.flatten(value.dim() - len(self.latent)))

    def draw(self, noise: Noise, lead: tuple[int, ...] = ()) -> Tensor:
        """Draws of shape (*lead, batch, *latent): a component, then its Normal."""
        edges = self.weights.cumsum(0)[:-1].contiguous()
        chosen = torch.bucketize(noise.uniform(lead, (self.rows,)), edges, right=True)
        standard = noise.normal(lead, (self.rows, self.means.shape[1]))
        z = self.means[chosen] + self._spread(chosen.flatten(), standard.flatten(0, -2)).view_as(standard)
        return z.unflatten(-1, self.latent)

    def _spread(self, chosen: Tensor, standard: Tensor) -> Tensor:
        """The factors of the chosen components (n,) times standard numbers (n, d), (n, d)."""
        at_once = max(1, FACTORS_AT_ONCE // self.scales[0].numel())
        parts = zip(chosen.split(at_once), standard.split(at_once), strict=True)
        return torch.cat([(self.scales[some] @ numbers.unsqueeze(-1)).squeeze(-1) for some, numbers in parts])

    @property
    def mean(self) -> Tensor:
        """Mean of every coordinate, shape (batch, *latent)."""
        return (self.weights @ self.means).reshape(1, *self.latent).expand(self.rows, *self.latent)

    @property
    def variance(self) -> Tensor:
        """Variance of every coordinate, shape (batch, *latent)."""
        within, between = self.scales.square().sum(-1), (self.means - self.weights @ self.means).square()
        return (self.weights @ (within + between)).reshape(1, *self.latent).expand(self.rows, *self.latent)


class GaussianMixturePrior(FittedPrior):
    """The first group's base replaced by a mixture; the other groups keep the model's prior.

    What a group after the first needs is its aggregate posterior *given the context*; a mixture that ignores the context
    would be worse than the model's own conditional prior.

    A covariance of d latents has its d (d + 1) / 2 numbers from its own component's codes, and of d codes or fewer none has
    full rank: the likelihood is then without bound, and what is fitted is what the regularisation leaves of it. So fewer
    than d + 1 codes for each component are refused.

    Raises:
        UserError: on fewer codes than that.
    """

    smooth = False

    class Options(FittedPrior.Options):
        """``components``: number of full-covariance Gaussians."""

        components: Annotated[int, Field(ge=1)] = 10

        @model_validator(mode="after")
        def _enough(self) -> Self:
            if self.codes < self.components:
                raise ValueError(f"{self.components} components cannot be fitted to {self.codes} codes; raise codes")
            return self

    weights: Tensor
    means: Tensor
    scales: Tensor

    def __init__(self, options: Options, group: Group):
        super().__init__(options, group)
        self.active = group.k == 0
        size = int(torch.Size(group.latent).numel()) if self.active else 0
        fewest = options.components * (size + 1)
        if options.codes < fewest:
            raise UserError(
                f"{options.components} full covariances of {size} latents need {fewest} codes and not {options.codes}; "
                "raise codes or lower components"
            )
        self.register_buffer("weights", torch.full((options.components,), 1 / options.components))
        self.register_buffer("means", torch.zeros(options.components, size))
        self.register_buffer("scales", torch.eye(size).repeat(options.components, 1, 1))

    def base(self, below: Distribution, context: Tensor) -> Distribution:
        """The mixture in the first group, what is below in the others."""
        if not self.active:
            return below
        return Mixture(self.weights, self.means, self.scales, len(context), self.group.latent)

    def fit(self, codes: Tensor, seed: int) -> None:
        """Expectation maximisation by scikit-learn, from its k-means start."""
        if not self.active:
            return
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture
        from threadpoolctl import threadpool_limits

        estimator = GaussianMixture(len(self.weights), max_iter=2000, random_state=seed)
        # One thread: tasks run side by side, and a sum's last bit depends on how many threads made it.
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)  # the likelihood it reached is what is reported
            estimator.fit(codes.flatten(1).double().cpu().numpy())
        covariances = torch.as_tensor(estimator.covariances_)
        for buffer, value in (
            (self.weights, torch.as_tensor(estimator.weights_)),
            (self.means, torch.as_tensor(estimator.means_)),
            (self.scales, torch.linalg.cholesky(covariances)),
        ):
            buffer.copy_(value)
