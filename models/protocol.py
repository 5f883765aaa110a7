"""The one protocol over which training, priors, samplers and metrics are written.

A flat VAE is a hierarchical VAE with one group: p(x, z) = p(x | z) Π_k p(z_k | z_<k), q(z | x) = Π_k q(z_k | z_<k, x).
The *context* before group k, c_k = c(z_<k), is the deterministic top-down state that p(z_k | z_<k) is computed from.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from models.distributions import DiagonalNormal, Distribution, kl_divergence
from runtime.randomness import Noise


@dataclass(frozen=True)
class Group:
    """One group: its index, and the shapes, without the batch, of its latent variable and of its context.

    A context of no elements carries no information; nor does the first group's, which is the same for every example.
    """

    k: int
    latent: tuple[int, ...]
    context: tuple[int, ...]


class Likelihood(Distribution, ABC):
    """p(x | z) over (batch, *data shape)."""

    mean: Tensor  # (batch, *data shape)

    @abstractmethod
    def tempered(self, temperature: float) -> "Likelihood":
        """The same, its spread scaled by ``temperature``."""


class HierarchicalVAE(nn.Module, ABC):
    """A variational autoencoder with K ordered groups of latent variables.

    Attributes:
        groups: K.
        convolutional: whether it has convolutions, whose spectral norms can be a loss.
        stochastic: whether its posteriors are distributions; if not, it is an autoencoder: it has no likelihood, and no
            prior of its own to improve upon but what is fitted to its codes.
    """

    groups: int
    convolutional: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True

    @abstractmethod
    def encode(self, x: Tensor) -> Sequence[Tensor]:
        """Bottom-up features of x (batch, *data shape), one tensor (batch, …) per group."""

    @abstractmethod
    def start(self, batch: int) -> Tensor:
        """The context before the first group, shape (batch, …)."""

    @abstractmethod
    def prior(self, k: int, context: Tensor) -> DiagonalNormal:
        """The base prior p(z_k | z_<k) over (batch, *latent shape of k)."""

    @abstractmethod
    def posterior(self, k: int, context: Tensor, features: Sequence[Tensor]) -> Distribution:
        """The approximate posterior q(z_k | z_<k, x) over (batch, *latent shape of k).

        Its density may be known at its own last draw alone, and its ``mean`` may be a centre of another kind.
        """

    @abstractmethod
    def advance(self, k: int, context: Tensor, z: Tensor) -> Tensor:
        """The context after group k took the value z (batch, *latent shape of k)."""

    @abstractmethod
    def decode(self, context: Tensor) -> Likelihood:
        """The likelihood p(x | z), from the context after the last group."""

    def divergence(self, k: int, context: Tensor, posterior: Distribution, z: Tensor) -> Tensor:
        """What the loss takes for group k's latents: KL(q ‖ p), in nats, (batch,).

        Where q is no Normal, its estimate log q(z) − log p(z) at ``z``, q's last draw, (batch, *latent shape of k).
        """
        prior = self.prior(k, context)
        if isinstance(posterior, DiagonalNormal):
            return kl_divergence(posterior, prior)
        return posterior.log_prob(z) - prior.log_prob(z)

    def penalties(self, x: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Further terms of the loss for a batch (batch, *data shape): scalars, by name."""
        return {}

    def settle(self) -> None:
        """Make what is kept of the weights, and follows from them, anew: moving averages have taken their place."""

    @torch.no_grad()
    def layout(self) -> list[Group]:
        """Every group with its shapes."""
        found = []

        def choose(k: int, context: Tensor) -> Tensor:
            z = self.prior(k, context).mean
            found.append(Group(k, tuple(z.shape[1:]), tuple(context.shape[1:])))
            return z

        descend(self, 1, choose)
        return found


class Tempered(HierarchicalVAE):
    """Another model at a temperature: the standard deviations of its base priors scaled, and its likelihood's spread.

    The latter only if ``decoder``: NVAE's published samples have a temperature in their priors alone.
    """

    def __init__(self, model: HierarchicalVAE, temperature: float, decoder: bool = True):
        super().__init__()
        self.model, self.temperature, self.decoder, self.groups = model, temperature, decoder, model.groups

    def encode(self, x: Tensor) -> Sequence[Tensor]:
        """The model's own."""
        return self.model.encode(x)

    def start(self, batch: int) -> Tensor:
        """The model's own."""
        return self.model.start(batch)

    def prior(self, k: int, context: Tensor) -> DiagonalNormal:
        """The model's, its standard deviation times the temperature."""
        return self.model.prior(k, context).tempered(self.temperature)

    def posterior(self, k: int, context: Tensor, features: Sequence[Tensor]) -> Distribution:
        """The model's own."""
        return self.model.posterior(k, context, features)

    def advance(self, k: int, context: Tensor, z: Tensor) -> Tensor:
        """The model's own."""
        return self.model.advance(k, context, z)

    def decode(self, context: Tensor) -> Likelihood:
        """The model's, tempered where that is asked for."""
        likelihood = self.model.decode(context)
        return likelihood.tempered(self.temperature) if self.decoder else likelihood


Choose = Callable[[int, Tensor], Tensor]
"""choose(k, context) returns z_k, shape (batch, *latent shape of k)."""


def descend(model: HierarchicalVAE, batch: int, choose: Choose) -> Tensor:
    """One top-down pass: group by group, ``choose`` picks z_k in its context. Returns the context to decode from."""
    context = model.start(batch)
    for k in range(model.groups):
        context = model.advance(k, context, choose(k, context))
    return context


class LearnedPrior(Protocol):
    """A prior over a model's groups: p(z_k | c_k) = base(z_k | c_k) r(z_k, c_k) / Z_k(c_k)."""

    proposes: bool
    """Whether :meth:`proposal` is another density than the base."""

    exact: bool
    """Whether r = 1 in every group, so that the base is the prior and its density is exact."""

    def base(self, k: int, context: Tensor) -> Distribution:
        """The distribution over (batch, *latent shape of k) that r corrects; its density is normalised."""
        ...

    def proposal(self, k: int, context: Tensor) -> Distribution:
        """A normalised density close to base·r, with the base's support, to weigh proposals from; the base by default."""
        ...

    def log_ratio(self, k: int, z: Tensor, context: Tensor) -> Tensor:
        """log r(z, c), unnormalised, nats: z (*lead, batch, *latent), context (batch, …), result (*lead, batch)."""
        ...

    def prepare(self, k: int, context: Tensor) -> Tensor:
        """What r needs of the contexts (batch, …), worked out once for any number of z: shape (batch, …)."""
        ...

    def prepared_log_ratio(self, k: int, z: Tensor, prepared: Tensor) -> Tensor:
        """:meth:`log_ratio`, given what :meth:`prepare` returned for the contexts."""
        ...

    def footprint(self, k: int) -> int:
        """How many numbers the widest layer that scores one z holds: what r costs in memory."""
        ...


Visit = Callable[[int, Tensor, Distribution, Tensor], None]
"""visit(k, context, posterior, z) sees group k of a posterior pass, with the z that was drawn from that posterior."""


def posterior_pass(
    model: HierarchicalVAE,
    x: Tensor | Sequence[Tensor],
    noise: Callable[[int], Noise],
    visit: Visit | None = None,
    repeats: int = 1,
) -> Tensor:
    """One top-down pass with z_k ~ q(z_k | z_<k, x) in every group.

    Args:
        model: the VAE.
        x: (batch, *data shape), encoded once; or its features, as :meth:`HierarchicalVAE.encode` gives them.
        noise: noise(k) draws group k.
        visit: sees every group, first to last.
        repeats: how many passes over each example, repeat-major: everything but x has ``repeats * batch`` rows.

    Returns:
        The context to decode from.
    """
    encoded = model.encode(x) if isinstance(x, Tensor) else x
    features = [feature.repeat(repeats, *[1] * (feature.dim() - 1)) for feature in encoded]

    def choose(k: int, context: Tensor) -> Tensor:
        posterior = model.posterior(k, context, features)
        z = posterior.draw(noise(k))
        if visit is not None:
            visit(k, context, posterior, z)
        return z

    return descend(model, len(features[0]), choose)
