import itertools

import pytest
import torch

from models.distributions import Bernoulli, DiagonalNormal, LogisticMixture, ReleasedLogisticMixture
from models.likelihoods import LIKELIHOODS, likelihood
from runtime.randomness import Noise


def mixture(channels, batch=2, side=2, seed=0):
    outputs = 1 + 2 * channels + channels * (channels - 1) // 2
    stream = torch.Generator().manual_seed(seed)
    return LogisticMixture(torch.randn(batch, outputs, side, side, 3, generator=stream, dtype=torch.float64))


def test_the_logistic_mixture_gives_each_pixel_a_total_mass_of_one():
    for bits in (5, 8):
        levels = torch.arange(2**bits, dtype=torch.float64) / (2**bits - 1)
        one = LogisticMixture(mixture(1, batch=1, side=1)._parameters, bits)
        assert one.log_prob(levels.view(-1, 1, 1, 1, 1)).exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_later_channels_of_the_logistic_mixture_are_conditional_masses():
    one, levels = mixture(2, batch=1, side=1), torch.arange(256, dtype=torch.float64) / 255
    for first in (0, 102, 255):
        alone = LogisticMixture(one._parameters[:, [0, 1, 3]]).log_prob(levels[first].view(1, 1, 1, 1))
        pairs = torch.stack([levels[first].expand(256), levels], dim=1).view(256, 1, 2, 1, 1)
        assert one.log_prob(pairs).logsumexp(0).item() == pytest.approx(alone.item(), abs=1e-9)


def test_draws_of_the_logistic_mixture_follow_its_masses():
    one, levels = mixture(2, batch=1, side=1), torch.arange(256, dtype=torch.float64) / 255
    table = torch.cartesian_prod(levels, levels)
    mass = one.log_prob(table.view(-1, 1, 2, 1, 1)).exp().view(256, 256)
    drawn = (one.draw(Noise(0, "t"), (20_000,)) * 255).round().long().view(20_000, 2)
    found = torch.zeros(256, 256, dtype=torch.float64)
    found.index_put_((drawn[:, 0], drawn[:, 1]), torch.full((20_000,), 1 / 20_000, dtype=torch.float64), accumulate=True)
    # Kolmogorov's distance in the plane: about 1.6 / sqrt(n) would be usual.
    assert (found - mass).cumsum(0).cumsum(1).abs().max() < 0.02


def test_the_mean_of_the_logistic_mixture_is_that_of_its_draws():
    one = LogisticMixture(0.3 * mixture(3, batch=1, side=1)._parameters).tempered(0.05)
    assert one.draw(Noise(0, "t"), (20_000,)).double().mean(0) == pytest.approx(one.mean, abs=0.01)


@pytest.mark.parametrize("bits", [5, 8])
def test_draws_of_the_logistic_mixture_are_levels_but_for_the_released_codes(bits):
    parameters = mixture(3)._parameters
    levels = LogisticMixture(parameters, bits).draw(Noise(0, "t")) * (2**bits - 1)
    assert torch.allclose(levels, levels.round(), atol=1e-9)
    released = ReleasedLogisticMixture(parameters, bits).draw(Noise(0, "t")) * (2**bits - 1)
    assert (released - levels).abs().max() > 0.1
    assert released.min() >= 0
    assert released.max() <= 2**bits - 1


def test_extreme_logistic_mixtures_stay_finite():
    for log_scale, mean in itertools.product((-20.0, 5.0), (-30.0, 0.0, 30.0)):
        parameters = torch.tensor([0.0, mean, log_scale]).view(1, 3, 1, 1, 1).requires_grad_()
        score = LogisticMixture(parameters).log_prob(torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1, 1))
        assert torch.isfinite(score).all()
        score.sum().backward()
        assert torch.isfinite(parameters.grad).all()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_says_how_many_outputs_it_needs(name):
    head = likelihood(name, 1.0)
    decoded = head(torch.randn(2, head.outputs(3), 4, 4))
    drawn = decoded.draw(Noise(0, "t"), (5,))
    assert drawn.shape == (5, 2, 3, 4, 4)
    assert decoded.log_prob(drawn).shape == (5, 2)
    assert decoded.mean.shape == (2, 3, 4, 4)


def test_a_temperature_narrows_without_moving():
    cold = DiagonalNormal(torch.ones(1, 2), torch.full((1, 2), 0.5)).tempered(0.5)
    assert torch.equal(cold.mean, torch.ones(1, 2))
    assert torch.equal(cold.variance, torch.full((1, 2), 0.0625))
    assert Bernoulli(torch.tensor([[1.0]])).tempered(0.5).base_dist.logits.item() == 2
