"""EVaLP against targets that are known: the energy's shape and sign, the sampler, and what w_KL does."""

import math

import pytest
import torch

from models.distributions import DiagonalNormal
from models.protocol import Group
from priors.evalp import EnergyOptions, EnergyPrior
from priors.flow import FlowOptions, FlowPrior
from priors.protocol import Pair
from runtime.randomness import Noise, initialising


def trained(make, target, size, steps, batch=256, rate=2e-3):
    """A prior trained by its own loss and Adam on fresh draws of ``target`` over N(0, I)."""
    with initialising(0, "prior"):
        prior = make(Group(0, (size,), (0,)))
    optimizer = torch.optim.Adam(prior.parameters(), lr=rate, betas=prior.betas)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    below = DiagonalNormal(torch.zeros(batch, size), torch.ones(batch, size))
    for step in range(steps):

        def noise(name):
            return Noise(0, name, step=step).normal((), (batch, size))  # noqa: B023

        uniform = Noise(0, "uniform", step=step).uniform((), (batch,))
        pair = Pair(target(noise, uniform), noise("base"), torch.zeros(batch, 0), below, noise("normal"), uniform)
        optimizer.zero_grad()
        torch.stack(list(prior.loss(pair, step).values())).sum().backward()
        optimizer.step()
        decay.step()
    return prior.eval().requires_grad_(False)


def evalp(**options):
    networks = {"energy": EnergyOptions(width=64), "flow": FlowOptions(transforms=2, width=32, depth=1)}
    return lambda group: EnergyPrior(EnergyPrior.Options(steps=1, batch=2, **networks, **options), group)


def sampler_draws(prior, size, n=20_000):
    below = DiagonalNormal(torch.zeros(n, size), torch.ones(n, size))
    return prior.proposal(below, torch.zeros(n, 0)).draw(Noise(1, "draws"))


def log_normal(z, mean, std):
    return -((z - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2


def test_in_one_dimension_the_energy_is_the_log_density_ratio_and_the_sampler_the_target():
    """Without the penalty the game's solution is E = log p_0 − log q, up to a constant, and g = q = N(0.8, 0.6²)."""
    prior = trained(evalp(penalty=0, ratio=1), lambda noise, _: 0.8 + 0.6 * noise("q"), 1, 2000)
    z = torch.linspace(-0.6, 2.2, 57)[:, None]  # the target's mean and 2.3 of its standard deviations
    difference = prior.log_ratio(z, torch.zeros(57, 0)) - (log_normal(z, 0.8, 0.6) - log_normal(z, 0, 1))[:, 0]
    assert difference.std().item() < 0.15
    drawn = sampler_draws(prior, 1)
    assert drawn.mean().item() == pytest.approx(0.8, abs=0.06)
    assert drawn.std().item() == pytest.approx(0.6, rel=0.1)


def test_in_two_dimensions_the_energy_is_the_log_density_ratio():
    """q = N(μ, diag σ²) with μ = (0.5, −0.5), σ = (0.7, 0.8)."""
    mean, std = torch.tensor([0.5, -0.5]), torch.tensor([0.7, 0.8])
    prior = trained(evalp(penalty=0, ratio=1), lambda noise, _: mean + std * noise("q"), 2, 3000)
    z = mean + std * Noise(3, "points").normal((), (500, 2)).clamp(-2, 2)
    exact = sum(log_normal(z[:, d], mean[d], std[d].item()) - log_normal(z[:, d], 0, 1) for d in range(2))
    difference = prior.log_ratio(z, torch.zeros(500, 0)) - exact
    assert difference.std().item() < 0.25


def test_weights_of_proposals_lead_from_the_sampler_to_the_energy_based_density():
    """log w = −E + log p_0 − log g: with E = −z the density is N(1, 1), wherever g is."""
    prior = trained(evalp(), lambda noise, _: noise("q"), 1, 1)
    below, z = DiagonalNormal(torch.zeros(4000, 1), torch.ones(4000, 1)), None
    proposal = prior.proposal(below, torch.zeros(4000, 0))
    z = proposal.draw(Noise(2, "z"), (50,))
    log_w = z[..., 0] + below.log_prob(z) - proposal.log_prob(z)
    weights = log_w.flatten().softmax(0)
    assert (weights * z.flatten()).sum().item() == pytest.approx(1, abs=0.05)


def two_modes(noise, uniform):
    return torch.where(uniform < 0.5, -1.5, 1.5)[:, None] + 0.2 * noise("q")


@pytest.mark.parametrize(("kl", "kept"), [(1.0, True), (0.0, False)])
def test_without_the_kl_the_sampler_falls_into_one_mode(kl, kept):
    drawn = sampler_draws(trained(evalp(kl=kl), two_modes, 1, 1500), 1)
    smaller = min((drawn < 0).double().mean().item(), (drawn > 0).double().mean().item())
    assert (smaller > 0.25) == kept


def test_a_flow_alone_finds_the_density_of_its_target():
    options = FlowPrior.Options(steps=1, batch=2, flow=FlowOptions(transforms=2, width=32, depth=1))
    prior = trained(lambda group: FlowPrior(options, group), two_modes, 1, 800)
    below = DiagonalNormal(torch.zeros(1, 1), torch.ones(1, 1))
    z = torch.linspace(-4, 4, 801)[:, None, None]
    log_g = prior.base(below, torch.zeros(1, 0)).log_prob(z)[:, 0]
    exact = torch.logaddexp(log_normal(z, -1.5, 0.2), log_normal(z, 1.5, 0.2))[:, 0, 0] - math.log(2)
    assert torch.trapezoid(log_g.exp(), z[:, 0, 0]).item() == pytest.approx(1, abs=0.01)
    assert torch.trapezoid(exact.exp() * (exact - log_g), z[:, 0, 0]).item() < 0.03  # KL(q || g), nats
