"""Distributions that are drawn from with an explicit noise source.

They are torch's own, plus ``draw(noise, lead)``: torch's ``sample`` reads the global generator, which nothing here may.
"""

import math
from typing import Protocol

import torch
from torch import Tensor, distributions
from torch.nn import functional

from runtime.errors import UserError
from runtime.randomness import Noise


class Distribution(Protocol):
    """A distribution over (batch, *event)."""

    @property
    def mean(self) -> Tensor:
        """Mean of every coordinate, shape (batch, *event)."""
        ...

    @property
    def variance(self) -> Tensor:
        """Variance of every coordinate, shape (batch, *event)."""
        ...

    def log_prob(self, value: Tensor, /) -> Tensor:
        """Log density in nats of ``value`` (*lead, batch, *event): shape (*lead, batch)."""
        ...

    def draw(self, noise: Noise, lead: tuple[int, ...] = ()) -> Tensor:
        """Draws of shape (*lead, batch, *event), differentiable in the parameters where the family allows it."""
        ...


class DiagonalNormal(distributions.Independent):
    """Normal with independent coordinates; ``mean`` and ``std`` have shape (batch, *event)."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__(distributions.Normal(mean, std, validate_args=False), mean.dim() - 1, validate_args=False)

    def draw(self, noise: Noise, lead: tuple[int, ...] = ()) -> Tensor:
        """Reparameterised draws, shape (*lead, batch, *event)."""
        return self.base_dist.loc + self.base_dist.scale * noise.normal(lead, tuple(self.base_dist.loc.shape))

    def tempered(self, temperature: float) -> "DiagonalNormal":
        """The same with every standard deviation multiplied by ``temperature``."""
        return DiagonalNormal(self.base_dist.loc, temperature * self.base_dist.scale)


class ReleasedNormal(DiagonalNormal):
    """The Normal decoder of NVAE's released code, over images in [0, 1]: its log_prob is a density of 2x − 1.

    So it is lower than that of a density of x, by ln 2 a coordinate. Means and draws stay within [0, 1].
    """

    @property
    def mean(self) -> Tensor:
        """The mode within [0, 1], (batch, *event)."""
        return super().mean.clamp(0, 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of 2 ``value`` − 1 in nats, ``value`` (*lead, batch, *event): shape (*lead, batch)."""
        return super().log_prob(value) - math.log(2) * self.event_shape.numel()

    def draw(self, noise: Noise, lead: tuple[int, ...] = ()) -> Tensor:
        """Draws, clamped to [0, 1], shape (*lead, batch, *event)."""
        return super().draw(noise, lead).clamp(0, 1)

    def tempered(self, temperature: float) -> "ReleasedNormal":
        """The same with every standard deviation multiplied by ``temperature``."""
        return ReleasedNormal(self.base_dist.loc, temperature * self.base_dist.scale)


class Point:
    """All probability on one value, (batch, *event): a deterministic encoder's posterior. It has no density."""

    def __init__(self, value: Tensor):
        self.mean = value

    @property
    def variance(self) -> Tensor:
        """Zeros, (batch, *event)."""
        return torch.zeros_like(self.mean)

    def log_prob(self, value: Tensor, /) -> Tensor:  # noqa: ARG002
        """Raises UserError: there is none."""
        raise UserError("a deterministic encoder has no density, and so no likelihood; leave evaluate.likelihood out")

    def draw(self, noise: Noise, lead: tuple[int, ...] = ()) -> Tensor:  # noqa: ARG002
        """The value itself, (*lead, batch, *event)."""
        return self.mean.expand(*lead, *self.mean.shape)


class Bernoulli(distributions.Independent):
    """Independent binary pixels; ``logits`` has shape (batch, *event)."""

    def __init__(self, logits: Tensor):
        super().__init__(distributions.Bernoulli(logits=logits, validate_args=False), logits.dim() - 1, False)

    def draw(self, noise: Noise, lead: tuple[int, ...] = ()) -> Tensor:
        """Draws in {0, 1}, shape (*lead, batch, *event)."""
        uniform = noise.uniform(lead, tuple(self.base_dist.logits.shape))
        return (uniform < self.base_dist.probs).to(self.base_dist.logits.dtype)

    def tempered(self, temperature: float) -> "Bernoulli":
        """The same with the logits divided by ``temperature``."""
        return Bernoulli(self.base_dist.logits / temperature)


class LogisticMixture:
    """A mixture of logistics for every pixel, discretised to 2^bits levels (Salimans et al., PixelCNN++, 2017, section 2).

    Images are (batch, channels, h, w) with levels i / (2^bits − 1). A component is shared by a pixel's channels; given the
    component, a channel's mean depends linearly on the channels before it. The lowest and the highest level take the tails.

    Args:
        parameters: (batch, 1 + 2 channels + channels (channels - 1) / 2, h, w, components): logits of the weights, means,
            log-scales, and coefficients (through tanh); means and scales in units of data in [-1, 1].
        bits: of a level.
    """

    SMALLEST_LOG_SCALE = -7.0

    def __init__(self, parameters: Tensor, bits: int = 8):
        self._parameters, self._bits = parameters, bits
        self._half = 1 / (2**bits - 1)  # of the width of a level, in units of data in [-1, 1]
        outputs = parameters.shape[1]
        self._channels = next(c for c in (1, 2, 3, 4) if 1 + 2 * c + c * (c - 1) // 2 == outputs)
        c = self._channels
        weights, self._means, log_scales, coefficients = parameters.split([1, c, c, outputs - 1 - 2 * c], dim=1)
        self._log_weights = weights.squeeze(1).log_softmax(-1)
        self._log_scales = log_scales.clamp(min=self.SMALLEST_LOG_SCALE)
        self._coefficients = coefficients.tanh()

    def _centres(self, channel: int, before: Tensor) -> Tensor:
        """Means of one channel, (…, h, w, components), given the channels before it (…, channel, h, w) in [-1, 1]."""
        centres = self._means[:, channel]
        first = channel * (channel - 1) // 2
        for earlier in range(channel):
            centres = centres + self._coefficients[:, first + earlier] * before.select(-3, earlier)[..., None]
        return centres

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability mass in nats of images ``value`` (*lead, batch, channels, h, w): shape (*lead, batch)."""
        x = 2 * value - 1
        total = self._log_weights
        for channel in range(self._channels):
            level = x.select(-3, channel)[..., None]
            total = total + self._log_mass(level, self._centres(channel, x), self._log_scales[:, channel])
        return total.logsumexp(-1).flatten(-2).sum(-1)

    def _log_mass(self, level: Tensor, centre: Tensor, log_scale: Tensor) -> Tensor:
        """Of levels in [-1, 1] (*lead, batch, h, w, 1) under every component: (*lead, batch, h, w, components)."""
        sharpness, centred = torch.exp(-log_scale), level - centre
        above, below = sharpness * (centred + self._half), sharpness * (centred - self._half)
        # The mass of a level is sigmoid(above) - sigmoid(below), written so that neither tail cancels.
        inside = functional.logsigmoid(above) + functional.logsigmoid(-below) + torch.log(-torch.expm1(below - above))
        lowest, highest = functional.logsigmoid(above), functional.logsigmoid(-below)
        return torch.where(level < self._half - 1, lowest, torch.where(level > 1 - self._half, highest, inside))

    def draw(self, noise: Noise, lead: tuple[int, ...] = ()) -> Tensor:
        """Draws, clamped to [0, 1] and rounded to the levels, shape (*lead, batch, channels, h, w)."""
        gumbel = noise.gumbel(lead, tuple(self._log_weights.shape))
        chosen = functional.one_hot((self._log_weights + gumbel).argmax(-1), self._log_weights.shape[-1])
        uniform = noise.uniform(lead, (len(self._parameters), self._channels, *self._parameters.shape[2:4]))
        logistic = torch.logit(uniform, eps=1e-5)
        drawn: list[Tensor] = []
        for channel in range(self._channels):
            before = torch.stack(drawn, dim=-3) if drawn else logistic
            centre = (self._centres(channel, before) * chosen).sum(-1)
            scale = (self._log_scales[:, channel].exp() * chosen).sum(-1)
            drawn.append((centre + scale * logistic.select(-3, channel)).clamp(-1, 1))
        return self._stored((torch.stack(drawn, dim=-3) + 1) / 2)

    def _stored(self, images: Tensor) -> Tensor:
        return (images / self._half).round() * self._half

    @property
    def mean(self) -> Tensor:
        """Expected image before discretisation, (batch, channels, h, w)."""
        weights = self._log_weights.exp()
        found: list[Tensor] = []
        for channel in range(self._channels):
            # Means are linear in the channels before, component by component.
            before = torch.stack(found, dim=1) if found else self._means[:, :0]
            centres = self._means[:, channel]
            first = channel * (channel - 1) // 2
            for earlier in range(channel):
                centres = centres + self._coefficients[:, first + earlier] * before[:, earlier]
            found.append(centres)
        images = (weights[:, None] * torch.stack(found, dim=1)).sum(-1)
        return ((images + 1) / 2).clamp(0, 1)

    def tempered(self, temperature: float) -> "LogisticMixture":
        """The same with every scale multiplied by ``temperature``."""
        c, parameters = self._channels, self._parameters.clone()
        parameters[:, 1 + c : 1 + 2 * c] = self._log_scales + math.log(temperature)
        return type(self)(parameters, self._bits)


class ReleasedLogisticMixture(LogisticMixture):
    """The mixture as NVAE's released code computes it. Its masses sum to more than one, its mean is of no distribution.

    The upper tail goes to every level above 0.99 in [-1, 1], which of 8 bits are 255 and 254; where a mass is under 1e-5 it
    is the density times the width. The mean chains colours through averaged coefficients, and draws are not rounded.
    """

    def _log_mass(self, level: Tensor, centre: Tensor, log_scale: Tensor) -> Tensor:
        sharpness, centred = torch.exp(-log_scale), level - centre
        above, below = sharpness * (centred + self._half), sharpness * (centred - self._half)
        mass, middle = above.sigmoid() - below.sigmoid(), sharpness * centred
        narrow = middle - log_scale - 2 * functional.softplus(middle) + math.log(2 * self._half)
        inside = torch.where(mass > 1e-5, mass.clamp(min=1e-10).log(), narrow)
        lowest, highest = functional.logsigmoid(above), functional.logsigmoid(-below)
        return torch.where(level < -0.999, lowest, torch.where(level > 0.99, highest, inside))

    def _stored(self, images: Tensor) -> Tensor:
        return images

    @property
    def mean(self) -> Tensor:
        """The chain of clamped colours, (batch, channels, h, w)."""
        weights = self._log_weights.exp()[:, None]
        means, coefficients = ((weights * part).sum(-1) for part in (self._means, self._coefficients))
        found: list[Tensor] = []
        for channel in range(self._channels):
            first = channel * (channel - 1) // 2
            shift = sum(coefficients[:, first + earlier] * found[earlier] for earlier in range(channel))
            found.append((means[:, channel] + shift).clamp(-1, 1))
        return (torch.stack(found, dim=1) + 1) / 2


def soft_clamp(value: Tensor, bound: float = 5.0) -> Tensor:
    """Squash smoothly into (-bound, bound), as NVAE does to its means and log-sigmas."""
    return bound * torch.tanh(value / bound)


def kl_divergence(q: DiagonalNormal, p: DiagonalNormal) -> Tensor:
    """KL(q || p) in nats, shape (batch,)."""
    return distributions.kl_divergence(q, p)
