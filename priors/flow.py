"""A normalising flow as prior: an exact density, sampled in one pass, trained by maximum likelihood on posterior samples.

    z = m(c) + s(c) f(u; c),  u ~ N(0, I)        log g(z | c) = log N(u) − log |det ∂f/∂u| − Σ log s

m and s are mean and standard deviation of the density below (the model's own prior, say), so f starts from the model's
units. f is a chain of coupling layers: of monotone rational-quadratic splines (Durkan et al. 2019), from zuko, over the
flattened latents; or affine ones steered by convolutions (Dinh et al. 2017), for latent maps too large to flatten.
"""

import math
from typing import Annotated, Literal, Protocol

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
    """``transforms``: coupling layers, each of both halves; ``width``, ``depth``: of the networks that steer them.

    ``maps``: whether latent maps are flattened, or coupled by convolutions.
    """

    maps: Literal["flatten", "convolve"] = "flatten"
    transforms: Annotated[int, Field(ge=1)] = 4
    width: Annotated[int, Field(ge=1)] = 128
    depth: Annotated[int, Field(ge=1)] = 2


NEAR = 0.01
"""What a spline's steering starts scaled by."""


class Standard(Protocol):
    """f in given contexts, over latents (*lead, batch, *latent)."""

    def transform(self, normal: Tensor) -> Tensor:
        """f(u)."""
        ...

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of f(u), shape (*lead, batch)."""
        ...


def flow(options: FlowOptions, group: Group) -> "SplineFlow | ConvolutionalFlow":
    """The flow for a group. The first group's context, the same for all, is not looked at."""
    if options.maps == "convolve" and len(group.latent) == 3:
        return ConvolutionalFlow(options, group)
    return SplineFlow(options, group)


class SplineFlow(nn.Module):
    """Couplings of rational-quadratic splines over flattened latents, steered by perceptrons."""

    def __init__(self, options: FlowOptions, group: Group):
        super().__init__()
        import zuko

        self.event = len(group.latent)
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
        for network in self.spline.modules():
            if isinstance(network, (zuko.nn.MLP, zuko.nn.MaskedMLP)):  # start close to the identity: the density below
                last = list(network)[-1]
                last.weight.data.mul_(NEAR)
                last.bias.data.mul_(NEAR)

    def forward(self, below: Distribution, context: Tensor) -> "FlowDensity":
        """The density over (batch, *latent) in contexts (batch, …), in the units of ``below``."""
        seen = None if self.see_context is None else self.see_context(context.float())
        return FlowDensity(_Splines(self.spline, seen, self.event), below)


class _Splines:
    """zuko's flow over flat latents in given contexts as a Standard."""

    def __init__(self, spline, seen: Tensor | None, event: int):
        self._spline, self._seen, self._event = spline, seen, event
        self._flat = spline(seen)

    def transform(self, normal: Tensor) -> Tensor:
        flat = normal.flatten(normal.dim() - self._event)
        # To the same numbers; but gradients would be summed in another order than those that priors were trained with.
        inverse = self._flat.transform.inv if torch.is_grad_enabled() else self._by_halves
        return inverse(flat).view(normal.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self._flat.log_prob(value.flatten(value.dim() - self._event))

    def _by_halves(self, normal: Tensor) -> Tensor:
        for layer in reversed(self._spline.transform.transforms):
            coupled = hasattr(layer, "order")  # a single latent has nothing to be coupled with
            normal = _inverse_by_halves(layer, self._seen, normal) if coupled else layer(self._seen).inv(normal)
        return normal


def _inverse_by_halves(layer, seen: Tensor | None, y: Tensor) -> Tensor:
    """The inverse of zuko's masked autoregressive layer, in whose every pass the splines of all latents are made and solved.

    A pass settles one half of the latents. Here it makes their splines alone, so that two passes cost one.
    """
    x = torch.zeros_like(y)
    *steer, last = layer.hyper
    weight = last.mask * last.weight
    within = torch.arange(layer.total, device=y.device)
    for half in layer.order.argsort(stable=True).split(-(-y.shape[-1] // layer.passes)):
        hidden = x if seen is None else torch.cat((x, seen.expand(*x.shape[:-1], -1)), -1)
        for module in steer:
            hidden = module(hidden)
        own = (half[:, None] * layer.total + within).flatten()
        parameters = nn.functional.linear(hidden, weight[own], last.bias[own]).unflatten(-1, (-1, layer.total))
        spline = layer.univariate(*parameters.split([math.prod(shape) for shape in layer.shapes], -1))
        x[..., half] = spline.inv(y[..., half])
    return x


class ConvolutionalFlow(nn.Module):
    """Affine couplings over latent maps (c, h, w), on alternating checkerboards, steered by convolutions."""

    kept: Tensor

    def __init__(self, options: FlowOptions, group: Group):
        super().__init__()
        channels, height, width = group.latent
        seen = group.context[0] if group.k else 0
        self.see_context = nn.Conv2d(seen, options.width, 1) if seen else None
        self.couplings = nn.ModuleList(
            _Coupling(channels, options.width, options.depth) for _ in range(2 * options.transforms)
        )
        parity = torch.arange(height)[:, None] + torch.arange(width) + torch.arange(channels)[:, None, None]
        self.register_buffer("kept", (parity % 2).float(), persistent=False)

    def forward(self, below: Distribution, context: Tensor) -> "FlowDensity":
        """The density over (batch, *latent) in contexts (batch, …), in the units of ``below``."""
        return FlowDensity(_Couplings(self, None if self.see_context is None else self.see_context(context.float())), below)


class _Coupling(nn.Module):
    """Scale and shift of the half that changes, from the half that is kept and what is seen of the context."""

    BOUND = 2.0  # of a log scale, so that no layer blows up

    def __init__(self, channels: int, width: int, depth: int):
        super().__init__()
        self.see_z = nn.Conv2d(channels, width, 3, padding=1)
        layers = [layer for _ in range(depth - 1) for layer in (nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))]
        last = nn.Conv2d(width, 2 * channels, 3, padding=1)
        self.steer = nn.Sequential(*layers, nn.SiLU(), last)
        nn.init.zeros_(last.weight)
        if last.bias is not None:
            nn.init.zeros_(last.bias)

    def forward(self, kept: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden = self.see_z(kept.flatten(0, -4)).view(*kept.shape[:-3], -1, *kept.shape[-2:])
        hidden = hidden if seen is None else hidden + seen
        scale, shift = self.steer(hidden.flatten(0, -4)).view(*kept.shape[:-3], -1, *kept.shape[-2:]).chunk(2, -3)
        return self.BOUND * torch.tanh(scale / self.BOUND), shift


class _Couplings:
    """A ConvolutionalFlow in given contexts as a Standard."""

    def __init__(self, flow: ConvolutionalFlow, seen: Tensor | None):
        self._flow, self._seen = flow, seen

    def _masks(self) -> list[tuple[nn.Module, Tensor]]:
        kept = self._flow.kept
        return [(coupling, kept if index % 2 else 1 - kept) for index, coupling in enumerate(self._flow.couplings)]

    def transform(self, normal: Tensor) -> Tensor:
        for coupling, kept in self._masks():
            scale, shift = coupling(kept * normal, self._seen)
            normal = kept * normal + (1 - kept) * (normal * scale.exp() + shift)
        return normal

    def log_prob(self, value: Tensor) -> Tensor:
        total = value.new_zeros(value.shape[:-3])
        for coupling, kept in reversed(self._masks()):
            scale, shift = coupling(kept * value, self._seen)
            value = kept * value + (1 - kept) * (value - shift) * (-scale).exp()
            total = total - ((1 - kept) * scale).flatten(-3).sum(-1)
        return total - (value**2 + math.log(2 * math.pi)).flatten(-3).sum(-1) / 2


class FlowDensity:
    """What a flow makes of N(0, I), over (batch, *latent); ``mean`` and ``variance`` are those of the density below.

    They serve as units: a chain's step, or another flow put on this one.
    """

    def __init__(self, standard: Standard, below: Distribution):
        self._standard = standard  # in units of ``below``
        self.mean, self.variance = below.mean.float(), below.variance.float()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats of (*lead, batch, *latent), shape (*lead, batch)."""
        standard = (value - self.mean) / self.variance.sqrt()
        return self._standard.log_prob(standard) - self.variance.log().flatten(1).sum(1) / 2

    def draw(self, noise: Noise, lead: tuple[int, ...] = ()) -> Tensor:
        """Reparameterised draws, shape (*lead, batch, *latent)."""
        normal = noise.normal(lead, tuple(self.mean.shape))
        return self.transform(normal)

    def transform(self, normal: Tensor) -> Tensor:
        """The draws that given Normal numbers (*lead, batch, *latent) stand for."""
        return self.mean + self.variance.sqrt() * self._standard.transform(normal)


class FlowPrior(TrainedPrior):
    """The flow's density in place of the base: no energy, no correction, nothing to normalise."""

    class Options(TrainedPrior.Options):
        """``flow``: its size."""

        flow: FlowOptions = FlowOptions()

    options: Options

    def __init__(self, options: Options, group: Group):
        super().__init__(options, group)
        self.flow = flow(options.flow, group)

    def base(self, below: Distribution, context: Tensor) -> Distribution:
        """The flow's density."""
        return self.flow(below, context)

    def loss(self, pair: Pair, step: int) -> Terms:  # noqa: ARG002
        """Negative log-likelihood of posterior samples."""
        return {"posterior": -self.base(pair.below, pair.context).log_prob(pair.posterior.float()).mean()}
