"""Oracles for the likelihoods: exact marginals and exact normalisers, in float64."""

import itertools
import math

import pytest
import torch

from metrics.likelihood import LikelihoodOptions, Pool, contrastive_losses, fill_pool, log_likelihoods
from models.distributions import DiagonalNormal
from models.protocol import HierarchicalVAE

NOISE_STD, SLOPE, OFFSET = 0.5, 1.2, 0.3


class LinearVAE(HierarchicalVAE):
    """z ~ N(0, 1), x = SLOPE z + OFFSET + noise, with a posterior that is deliberately a little off."""

    def __init__(self, groups=1):
        super().__init__()
        self.groups = groups
        self.dummy = torch.nn.Parameter(torch.zeros(1).double())

    def encode(self, x):
        return [x] * self.groups

    def start(self, batch):
        return self.dummy.new_zeros(batch, 1)

    def prior(self, k, context):
        return DiagonalNormal(context * (k > 0), torch.ones_like(context))

    def posterior(self, k, context, features):
        if k < self.groups - 1:
            return DiagonalNormal(0.3 * features[k], torch.full_like(context, 0.9))
        precision = 1 + (SLOPE / NOISE_STD) ** 2
        prior_mean = context * (k > 0)
        mean = (prior_mean + SLOPE * (features[k] - OFFSET) / NOISE_STD**2) / precision
        return DiagonalNormal(mean + 0.1, torch.full_like(context, 1.3 * precision**-0.5))

    def advance(self, k, context, z):
        return z

    def decode(self, context):
        return DiagonalNormal(SLOPE * context + OFFSET, torch.full_like(context, NOISE_STD))


class Tilted:
    """r(z) = exp(TILT z): with a Normal base all is known. Z(c) = exp(TILT mean + TILT²/2), the posterior prior N(+TILT)."""

    exact = False
    proposes = False
    TILT = 0.8

    def __init__(self, model):
        self.model = model

    def base(self, k, context):
        return self.model.prior(k, context)

    def proposal(self, k, context):
        return self.base(k, context)

    def log_ratio(self, k, z, context):
        return self.TILT * z[..., 0]


class Base(Tilted):
    exact = True


def normal_log_density(x, mean, variance):
    return -((x - mean) ** 2) / (2 * variance) - math.log(2 * math.pi * variance) / 2


def measure(model, samples, normaliser, proposals, n=400, pool_size=2**18):
    x = torch.randn(n, 1, generator=torch.Generator().manual_seed(0)).double() * 1.3 + OFFSET
    prior = Tilted(model)
    options = LikelihoodOptions(samples=samples, normaliser=normaliser, proposals=proposals)
    pools = {"tilted": fill_pool(model, prior, 0, pool_size)}
    return x[:, 0], log_likelihoods(model, {"base": Base(model), "tilted": prior}, pools, x, range(n), 0, options)


def test_a_linear_vae_has_its_exact_marginal_likelihood():
    x, found = measure(LinearVAE(), 2000, [1], [1])
    exact = normal_log_density(x, OFFSET, SLOPE**2 + NOISE_STD**2)
    assert torch.allclose(found["base"], exact, atol=0.1)
    assert (found["base"] - exact).mean().item() == pytest.approx(0, abs=3e-3)


@pytest.mark.parametrize("groups", [1, 2])
def test_plugin_and_sampler_bound_converge_to_the_exact_value_from_their_sides(groups):
    """With r = exp(t z) the corrected prior is the Normal moved by t in every group."""
    x, found = measure(LinearVAE(groups), 300, [10, 100, 2000], [2, 10, 100, 2000], n=60)
    mean, variance = OFFSET + SLOPE * groups * Tilted.TILT, SLOPE**2 * groups + NOISE_STD**2
    exact = normal_log_density(x, mean, variance).mean().item()
    plugin = [found[f"tilted/plugin/{n}"].mean().item() - exact for n in (10, 100, 2000)]
    sampler = [found[f"tilted/sampler/{m}"].mean().item() - exact for m in (2, 10, 100, 2000)]
    assert abs(plugin[-1]) < 0.03
    assert abs(sampler[-1]) < 0.03
    assert abs(plugin[-1] - sampler[-1]) < abs(plugin[0] - sampler[1]) < 0.5
    base = normal_log_density(x, OFFSET, variance)
    assert found["base"].mean().item() == pytest.approx(base.mean().item(), abs=0.03)
    if groups == 1:
        log_z = [found[f"tilted/log-z/k00/{n}"].mean().item() for n in (10, 100, 2000)]
        assert log_z[0] < log_z[1] < log_z[2] == pytest.approx(Tilted.TILT**2 / 2, abs=0.02)


def test_the_plugin_is_optimistic_by_what_jensen_says():
    """E log Ẑ ≤ log Z: with few base samples the plug-in exceeds the exact value, on average over examples."""
    _, found = measure(LinearVAE(), 300, [2, 2000], [2], n=400)
    assert found["tilted/plugin/2"].mean() > found["tilted/plugin/2000"].mean() + 0.05


VALUES = [-1.5, -0.2, 0.4, 2.0]
PROBABILITIES = [0.4, 0.3, 0.2, 0.1]
RATIOS = [0.2, 1.0, 3.0, 8.0]


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_the_sampler_bound_never_exceeds_what_sir_really_draws(m):
    """On four values, the law of SIR with M proposals and the expected bound are both known by enumeration."""
    drawn, bound = [0.0] * 4, [0.0] * 4
    for proposals in itertools.product(range(4), repeat=m):
        chance = math.prod(PROBABILITIES[j] for j in proposals)
        total = sum(RATIOS[j] for j in proposals)
        for j in proposals:
            drawn[j] += chance * RATIOS[j] / total
    for i, others in itertools.product(range(4), itertools.product(range(4), repeat=m - 1)):
        chance = math.prod(PROBABILITIES[j] for j in others)
        total = (RATIOS[i] + sum(RATIOS[j] for j in others)) / m
        bound[i] += chance * (math.log(PROBABILITIES[i]) + math.log(RATIOS[i]) - math.log(total))
    assert sum(drawn) == pytest.approx(1)
    assert all(low <= math.log(exact) + 1e-12 for low, exact in zip(bound, drawn, strict=True))
    mean_bound = _library_bound(m)
    assert mean_bound == pytest.approx(bound, abs=0.02)


def _library_bound(m):
    """The expected bound of each value by the code under test: its log normaliser, averaged over a pool of draws."""
    from metrics.likelihood import _add_normalisers

    stream = torch.Generator().manual_seed(0)
    log_r = torch.tensor(RATIOS).double().log()
    pool = Pool(log_r[torch.multinomial(torch.tensor(PROBABILITIES), 200_000, replacement=True, generator=stream)])
    options = LikelihoodOptions(samples=1, normaliser=[1], proposals=[m])
    found = []
    for value in range(4):
        rows = torch.arange(200_000 // max(1, m - 1))
        sums = {n: pool.log_sums(n, rows) for n in {1, *([m - 1] if m > 1 else [])}}
        norms = {}
        _add_normalisers("x", sums, log_r[value].expand(len(rows)), options, norms)
        found.append((math.log(PROBABILITIES[value]) + log_r[value] - norms[f"x/sampler/{m}"]).mean().item())
    return found


def test_the_nce_loss_of_a_useless_ratio_is_chance():
    model = LinearVAE(2)
    flat = Tilted(model)
    flat.TILT = 0.0
    losses = contrastive_losses(model, flat, torch.zeros(7, 1).double(), range(7), 0)
    assert torch.allclose(torch.stack(losses), torch.full((2, 7), 2 * math.log(2)).double())


def test_examples_keep_their_numbers_in_any_batch():
    model = LinearVAE(2)
    x = torch.linspace(-2, 2, 6)[:, None].double()
    options = LikelihoodOptions(samples=5, normaliser=[10], proposals=[10])
    pools = {"tilted": fill_pool(model, Tilted(model), 0, 1000)}

    def run(rows):
        return log_likelihoods(model, {"tilted": Tilted(model)}, pools, x[list(rows)], rows, 0, options)

    whole, part = run(range(6)), run(range(3, 5))
    for key, values in whole.items():
        assert torch.allclose(values[3:5], part[key], atol=1e-9)
