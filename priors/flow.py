"""A normalising flow as prior: an exact density, sampled in one pass, trained by maximum likelihood on posterior samples.

    z = m(c) + s(c) f(u; c),  u ~ N(0, I)        log g(z | c) = log N(u) − log |det ∂f/∂u| − Σ log s

m and s are mean and standard deviation of the density below (the model's own prior, say), so f starts from the model's
units. f is a chain of coupling layers of monotone rational-quadratic splines (Durkan et al. 2019), from zuko.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from models.distributions import Distribution
from models.protocol import Group
from priors.protocol import Pair, TrainedPrior
from runtime.options import Options
from runtime.randomness import Noise
from runtime.training import Terms


class FlowOptions(Options):
    """``transforms``: coupling layers, each of both halves; ``width``, ``depth``: of the perceptrons that steer them."""

    transforms: Annotated[int, Field(ge=1)] = 4
    width: Annotated[int, Field(ge=1)] = 128
    depth: Annotated[int, Field(ge=1)] = 2


class Flow(nn.Module):
    """f(u; c) for one group. Latents are flattened; the first group's context, the same for all, is not looked at."""

    def __init__(self, options: FlowOptions, group: Group):
        super().__init__()
        import zuko

        self.latent = group.latent
        seen = torch.Size(group.context).numel() if group.k else 0
        self.see_context = nn.Sequential(nn.Flatten(), nn.Linear(seen, options.width), nn.SiLU()) if seen else None
        size, hidden = torch.Size(group.latent).numel(), (options.width,) * options.depth
        self.spline = zuko.flows.NSF(
            size,
            options.width if seen else 0,
            transforms=options.transforms,
            hidden_features=hidden,
            passes=min(2, size),
            randperm=True,
        )

    def forward(self, below: Distribution, context: Tensor) -> "FlowDensity":
        """The density over (batch, *latent) in contexts (batch, …), in the units of ``below``."""
        seen = None if self.see_context is None else self.see_context(context.float())
        return FlowDensity(self.spline(seen), below)


class FlowDensity:
    """What a flow makes of N(0, I), over (batch, *latent); ``mean`` and ``variance`` are those of the density below.

    They serve as units: a chain's step, or another flow put on this one.
    """

    def __init__(self, standard, below: Distribution):
        self._standard = standard  # zuko's distribution over (batch, d), in units of ``below``
        self.mean, self.variance = below.mean.float(), below.variance.float()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats of (*lead, batch, *latent), shape (*lead, batch)."""
        event = self.mean.dim() - 1
        standard = ((value - self.mean) / self.variance.sqrt()).flatten(value.dim() - event)
        return self._standard.log_prob(standard) - self.variance.log().flatten(1).sum(1) / 2

    def draw(self, noise: Noise, lead: tuple[int, ...] = ()) -> Tensor:
        """Reparameterised draws, shape (*lead, batch, *latent)."""
        normal = noise.normal(lead, tuple(self.mean.shape))
        return self.transform(normal)

    def transform(self, normal: Tensor) -> Tensor:
        """The draws that given Normal numbers (*lead, batch, *latent) stand for."""
        event = self.mean.dim() - 1
        standard = self._standard.transform.inv(normal.flatten(normal.dim() - event))
        return self.mean + self.variance.sqrt() * standard.view(normal.shape)


class FlowPrior(TrainedPrior):
    """The flow's density in place of the base: no energy, no correction, nothing to normalise."""

    class Options(TrainedPrior.Options):
        """``flow``: its size."""

        flow: FlowOptions = FlowOptions()

    options: Options

    def __init__(self, options: Options, group: Group):
        super().__init__(options, group)
        self.flow = Flow(options.flow, group)

    def base(self, below: Distribution, context: Tensor) -> Distribution:
        """The flow's density."""
        return self.flow(below, context)

    def loss(self, pair: Pair, step: int) -> Terms:  # noqa: ARG002
        """Negative log-likelihood of posterior samples."""
        return {"posterior": -self.base(pair.below, pair.context).log_prob(pair.posterior.float()).mean()}
