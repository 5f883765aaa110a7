"""EVaLP and flows against targets that are known: the energy's shape and sign, the sampler, and what w_KL does."""

import math

import pytest
import torch

from models.distributions import DiagonalNormal
from models.protocol import Group
from priors.evalp import CRITERION_PROPOSALS, EnergyOptions, EnergyPrior
from priors.flow import FlowOptions, FlowPrior, flow
from priors.protocol import Pair
from runtime.randomness import Noise, initialising


def trained(make, target, size, steps, batch=256):
    """A prior trained by its own loss and Adam on fresh draws of ``target`` over N(0, I)."""
    with initialising(0, "prior"):
        prior = make(Group(0, (size,), (0,)))
    optimizer = torch.optim.Adam(prior.parameters(), lr=2e-3, betas=prior.betas)
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


@pytest.mark.parametrize("mean", [[1.0], [0.6, -0.8]])
def test_the_energy_is_the_log_density_ratio_where_the_penalty_lets_it_be(mean):
    """q = N(μ, I) with ‖μ‖ = 1: −E = log q − log p_0 = μ · z has slope 1, so the penalty asks nothing else; and g = q."""
    mean, size = torch.tensor(mean), len(mean)
    prior = trained(evalp(ratio=1), lambda noise, _: mean + noise("q"), size, 800)
    z = mean + Noise(3, "points").normal((), (500, size)).clamp(-2, 2)
    difference = prior.log_ratio(z, torch.zeros(500, 0)) - z @ mean
    assert difference.std().item() < 0.05
    drawn = sampler_draws(prior, size)
    assert torch.allclose(drawn.mean(0), mean, atol=0.1)
    assert torch.allclose(drawn.std(0), torch.ones(size), atol=0.1)


def test_weights_of_proposals_lead_from_the_sampler_to_the_energy_based_density():
    """log w = −E + log p_0 − log g: with E = −z the density is N(1, 1), wherever g is."""
    prior = trained(evalp(), lambda noise, _: noise("q"), 1, 1)
    below = DiagonalNormal(torch.zeros(4000, 1), torch.ones(4000, 1))
    proposal = prior.proposal(below, torch.zeros(4000, 0))
    z = proposal.draw(Noise(2, "z"), (50,))
    log_w = z[..., 0] + below.log_prob(z) - proposal.log_prob(z)
    weights = log_w.flatten().softmax(0)
    assert (weights * z.flatten()).sum().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("k", [0, 1])
def test_the_held_out_loss_is_that_of_sir_with_every_other_examples_noise(k):
    """The mean of log 1/50 (w(z) + Σ w(g(u_j; c))) − log p_0(z) r(z), example by example, in its own context c."""
    batch, size = 60, 3
    group = Group(k, (size,), (2 if k else 0,))
    with initialising(0, "prior"):
        prior = evalp()(group).eval().requires_grad_(False)
        for parameter in prior.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def noise(name, *shape):
        return Noise(0, name).normal((), (batch, *shape))

    spread = torch.linspace(0.5, 2, batch)[:, None] if k else torch.ones(batch, 1)
    below = DiagonalNormal(torch.zeros(batch, size), spread.expand(batch, size))
    z, normal, context = noise("q", size), noise("normal", size), noise("context", *group.context)
    pair = Pair(z, z, context, below, normal, torch.ones(batch))
    losses = []
    for row in range(batch):
        rows = [row, *((row - shift) % batch for shift in range(CRITERION_PROPOSALS - 1))]
        own = DiagonalNormal(torch.zeros(1, size), spread[row].expand(1, size))
        sampler, context_of_row = prior.proposal(own, context[row : row + 1]), context[row : row + 1]
        candidates = torch.cat([z[row].view(1, 1, -1), sampler.transform(normal[rows[1:]][:, None])])
        log_density = own.log_prob(candidates) + prior.log_ratio(candidates, context_of_row)
        log_w = log_density - sampler.log_prob(candidates)
        losses.append(log_w.logsumexp(0) - math.log(CRITERION_PROPOSALS) - log_density[0])
    assert prior.held_out_loss(pair, 0)["prior"].item() == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)


def two_modes(noise, uniform):
    return torch.where(uniform < 0.5, -1.5, 1.5)[:, None] + 0.2 * noise("q")


@pytest.mark.parametrize(("kl", "kept"), [(1.0, True), (0.0, False)])
def test_without_the_kl_the_sampler_falls_into_one_mode(kl, kept):
    drawn = sampler_draws(trained(evalp(kl=kl, ratio=1), two_modes, 1, 800), 1)
    smaller = min((drawn < 0).double().mean().item(), (drawn > 0).double().mean().item())
    assert (smaller > 0.1) == kept


@pytest.mark.parametrize("maps", ["flatten", "convolve"])
def test_a_flows_density_is_that_of_its_draws(maps):
    """log g(z(u)) = log N(u) − log |det ∂z/∂u|, the determinant by automatic differentiation."""
    group = Group(1, (2, 2, 2), (3, 2, 2))
    with initialising(0, "flow"):
        network = flow(FlowOptions(transforms=2, width=8, maps=maps), group)
        for parameter in network.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    noise, context = Noise(0, "u").normal((), (1, 2, 2, 2)), Noise(0, "c").normal((), (1, 3, 2, 2))
    below = DiagonalNormal(torch.full((1, 2, 2, 2), 0.3), torch.full((1, 2, 2, 2), 0.5))
    density = network(below, context)
    jacobian = torch.autograd.functional.jacobian(lambda u: density.transform(u.view_as(noise)).flatten(), noise.flatten())
    expected = -(noise**2).sum() / 2 - 4 * math.log(2 * math.pi) - torch.linalg.slogdet(jacobian.double()).logabsdet
    z = density.transform(noise)
    assert density.log_prob(z).item() == pytest.approx(expected.item(), abs=1e-3)
    assert density.log_prob(z.expand(3, 5, 1, 2, 2, 2)).shape == (3, 5, 1)


@pytest.mark.parametrize(("latents", "k", "lead"), [(8, 0, ()), (7, 1, (3, 2)), (1, 1, (3,)), (1, 0, ())])
def test_draws_without_gradients_are_those_with_them_to_the_last_bit(latents, k, lead):
    group = Group(k, (latents,), (4,))
    with initialising(0, "flow"):
        network = flow(FlowOptions(transforms=3, width=16), group)
        for parameter in network.parameters():
            parameter.data += 0.5 * torch.randn_like(parameter)
    below = DiagonalNormal(torch.full((5, latents), 0.3), torch.full((5, latents), 0.5))
    density = network(below, Noise(0, "c").normal((), (5, 4)))
    normal = 2 * Noise(0, "u").normal((), (*lead, 5, latents))
    expected = density.transform(normal)
    with torch.no_grad():
        assert torch.equal(density.transform(normal), expected)


def test_a_flow_alone_finds_the_density_of_its_target():
    """Two modes at ±1.5 with standard deviation 0.5."""
    options = FlowPrior.Options(steps=1, batch=2, flow=FlowOptions(transforms=2, width=32, depth=1))

    def target(noise, uniform):
        return torch.where(uniform < 0.5, -1.5, 1.5)[:, None] + 0.5 * noise("q")

    prior = trained(lambda group: FlowPrior(options, group), target, 1, 2000)
    below = DiagonalNormal(torch.zeros(1, 1), torch.ones(1, 1))
    z = torch.linspace(-5, 5, 1001)[:, None, None]
    log_g = prior.base(below, torch.zeros(1, 0)).log_prob(z)[:, 0]
    exact = torch.logaddexp(log_normal(z, -1.5, 0.5), log_normal(z, 1.5, 0.5))[:, 0, 0] - math.log(2)
    assert torch.trapezoid(log_g.exp(), z[:, 0, 0]).item() == pytest.approx(1, abs=0.02)
    assert torch.trapezoid(exact.exp() * (exact - log_g), z[:, 0, 0]).item() < 0.03  # KL(q || g), nats
