"""Oracles for the likelihoods: exact marginals and exact normalisers, in float64."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from datasets.registry import spec
from metrics import likelihood
from metrics.likelihood import LikelihoodOptions, Pool, contrastive_losses, fill_pool, log_likelihoods
from models import registry as models
from models.distributions import DiagonalNormal
from models.folding import folded
from models.nvae import NVAE
from models.protocol import HierarchicalVAE, posterior_pass
from pipelines.config import validate
from priors.protocol import GroupPrior, Prior
from priors.registry import PRIORS
from runtime.randomness import Noise

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


def measure(model, samples, normaliser, proposals, n=400, pool_size=2**18, resamples=16, prior=Tilted):
    x = torch.randn(n, 1, generator=torch.Generator().manual_seed(0)).double() * 1.3 + OFFSET
    sizes = samples if isinstance(samples, list) else [samples]
    options = LikelihoodOptions(samples=sizes, normaliser=normaliser, proposals=proposals, resamples=resamples)
    pools = {"tilted": fill_pool(model, prior(model), 0, pool_size)}
    found = log_likelihoods(model, {"base": Base(model), "tilted": prior(model)}, pools, x, range(n), 0, options)
    return x[:, 0], {key.removesuffix(f"/{max(sizes)}"): value for key, value in found.items()}


def test_a_linear_vae_has_its_exact_marginal_likelihood():
    x, found = measure(LinearVAE(), 2000, [1], [1])
    exact = normal_log_density(x, OFFSET, SLOPE**2 + NOISE_STD**2)
    assert torch.allclose(found["base"], exact, atol=0.1)
    assert (found["base"] - exact).mean().item() == pytest.approx(0, abs=3e-3)


class Proposing(Tilted):
    """The same, with proposals from a wider Normal off to one side."""

    proposes = True

    def proposal(self, k, context):
        base = self.base(k, context)
        return DiagonalNormal(base.mean + 0.4, 1.5 * base.stddev)


@pytest.mark.parametrize("prior", [Tilted, Proposing])
@pytest.mark.parametrize("groups", [1, 2])
def test_plugin_and_sampler_bound_converge_to_the_exact_value_from_their_sides(groups, prior):
    """With r = exp(t z) the corrected prior is the Normal moved by t in every group, wherever proposals come from."""
    x, found = measure(LinearVAE(groups), 300, [10, 100, 2000], [2, 10, 100, 2000], n=60, prior=prior)
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


class Contextual(Tilted):
    """r(z, c) = exp(TILT z c): normalisers differ from context to context, and with them from sample to sample."""

    def log_ratio(self, k, z, context):
        return self.TILT * z[..., 0] * (context[..., 0] if k else 1.0)


def test_normalisers_of_a_few_resampled_samples_serve_all_of_them():
    """Against every sample's own normaliser, by hand: log Z(c) = TILT²/2 for k = 0, TILT c² + (TILT c)²/2 for k = 1."""
    model, samples, n, tilt = LinearVAE(2), 400, 50, Tilted.TILT
    x, found = measure(model, [3, samples], [4000], [4000], n=n, resamples=100, prior=Contextual)
    rows, passes = range(n), []
    for step in range(samples // 100):
        log_v = torch.zeros(100 * n).double()

        def visit(k, context, posterior, z):
            nonlocal log_v
            log_v += model.prior(k, context).log_prob(z) - posterior.log_prob(z)
            c = context[:, 0] if k else torch.ones(100 * n).double()
            log_v += tilt * z[:, 0] * c - tilt * c * (context[:, 0] if k else 0) - (tilt * c) ** 2 / 2

        context = posterior_pass(
            model,
            x[:, None],
            lambda k, step=step: Noise(0, "likelihood-posterior", k, step, rows, 100),
            visit,
            100,
        )
        passes.append((log_v + model.decode(context).log_prob(x[:, None].repeat(100, 1))).view(100, n))
    exact = torch.cat(passes).logsumexp(0) - math.log(samples)
    for kind in ("plugin", "sampler"):
        difference = found[f"tilted/{kind}/4000"] - exact
        assert difference.mean().abs() < 0.02
        assert difference.abs().max() < 0.4
    few = torch.cat(passes)[:3].logsumexp(0) - math.log(3)  # S up to T: every sample's own normaliser
    assert torch.allclose(found["tilted/sampler/4000/3"], few, atol=0.25)
    assert (found["tilted/sampler/4000/3"] - few).mean().abs() < 0.01


@pytest.mark.parametrize("resamples", [1, 4])
def test_fewer_normalisers_leave_a_lower_bound(resamples):
    full, few = (measure(LinearVAE(2), 100, [50], [50], n=300, resamples=t, prior=Contextual)[1] for t in (100, resamples))
    lost = full["tilted/sampler/50"] - few["tilted/sampler/50"]
    assert 0 < lost.mean() < 1.0
    assert torch.equal(full["base"], few["base"])


def test_a_bound_rises_with_the_number_of_samples_and_each_is_read_off_the_same_ones():
    sizes = [1, 7, 100, 150, 330]
    _, together = measure(LinearVAE(2), sizes, [20], [20], n=400)
    bounds = [together[f"base/{size}"].mean().item() for size in sizes[:-1]] + [together["base"].mean().item()]
    assert bounds[0] < bounds[2] - 0.01
    assert bounds[-1] == pytest.approx(bounds[2], abs=0.02)
    for size in sizes[:-1]:
        _, alone = measure(LinearVAE(2), size, [20], [20], n=400)
        if size % 100 == 0:  # draws of whole passes are the same however many follow
            assert torch.allclose(alone["base"], together[f"base/{size}"])


@pytest.mark.parametrize("groups", [1, 2])
def test_what_is_not_normalised_is_nobodys_likelihood(groups):
    _, found = measure(LinearVAE(groups), [1, 30], [5], [5], n=4)
    likelihoods = {key for key in found if not key.startswith(("tilted/log-z", "tilted/elbo-gain"))}
    kinds = ["base", "tilted/plugin/5", "tilted/sampler/5"]
    assert likelihoods == {f"{kind}/1" for kind in kinds} | set(kinds)


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
    options = LikelihoodOptions(samples=[1], normaliser=[1], proposals=[m])
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
    options = LikelihoodOptions(samples=[5, 130], normaliser=[10], proposals=[10])
    pools = {"tilted": fill_pool(model, Tilted(model), 0, 1000)}

    def run(rows):
        return log_likelihoods(model, {"tilted": Tilted(model)}, pools, x[list(rows)], rows, 0, options)

    whole, part = run(range(6)), run(range(3, 5))
    for key, values in whole.items():
        assert torch.allclose(values[3:5], part[key], atol=1e-9)


@pytest.mark.parametrize("name", ["samples", "normaliser", "proposals"])
@pytest.mark.parametrize("counts", [[], [3, 3], [0]])
def test_counts_are_sets_of_positive_numbers(name, counts):
    with pytest.raises(ValidationError):
        LikelihoodOptions(**{"samples": [1], "normaliser": [1], "proposals": [1], name: counts})


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any kernel returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and not func.is_view:  # a view of weights is no memory
                self.largest = max(self.largest, tensor.nbytes)
        return result


FLOW = {"steps": 1, "batch": 2, "flow": {"transforms": 1, "width": 8, "depth": 1}}


def on_maps():
    """A VAE of three groups, on maps of 4x4 and 8x8, and a prior of every kind over it."""
    torch.manual_seed(0)
    options = NVAE.Options(groups_per_scale=[1, 2], latent_channels=1, width=16, halvings=0, outer_cells=1, cells=1)
    vae = NVAE(options, (1, 8, 8)).eval().requires_grad_(False)
    classifier = {"steps": 1, "batch": 2, "network": {"width": 24, "depth": 1}}

    def prior(method, settings, below=None):
        made = [PRIORS[method](PRIORS[method].Options(**settings), group) for group in vae.layout()]
        return Prior(vae, [one.eval().requires_grad_(False) for one in made], below)

    priors = {"normal": prior("normal", {}), "gmm": prior("gmm", {"components": 2}), "flow": prior("flow", FLOW)}
    return vae, priors | {"ncp-gmm": prior("ncp", classifier, priors["gmm"]), "evalp": prior("evalp", FLOW)}


SETTINGS = LikelihoodOptions(samples=[110, 3, 30], normaliser=[20], proposals=[20, 7], resamples=4, pool=4096)


def measure_on_maps(vae, priors):
    x = (torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    pools = {name: fill_pool(vae, prior, 0, SETTINGS.pool) for name, prior in priors.items() if not prior.exact}
    return log_likelihoods(vae, priors, pools, x, [5, 0], 0, SETTINGS)


@pytest.mark.parametrize("budget", [2**19, 2**21])
def test_a_memory_budget_bounds_the_largest_tensor_and_leaves_the_numbers(monkeypatch, budget):
    vae, priors = on_maps()
    with LargestTensor() as free:
        whole = measure_on_maps(vae, priors)
    monkeypatch.setattr(likelihood, "BYTES_AT_ONCE", budget)
    with LargestTensor() as bounded:
        parts = measure_on_maps(vae, priors)
    assert bounded.largest <= budget < free.largest
    assert whole.keys() == parts.keys()
    for key, values in whole.items():
        assert torch.allclose(values, parts[key], rtol=1e-5, atol=1e-4), key


def test_even_one_sample_and_one_proposal_at_a_time_leave_the_numbers(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SETTINGS", SETTINGS.model_copy(update={"pool": 40}))
    vae, priors = on_maps()
    priors = {name: priors[name] for name in ("normal", "ncp-gmm")}
    whole = measure_on_maps(vae, priors)
    monkeypatch.setattr(likelihood, "BYTES_AT_ONCE", 1)
    for key, values in measure_on_maps(vae, priors).items():
        assert torch.allclose(values, whole[key], rtol=1e-5, atol=1e-4), key


@pytest.mark.parametrize("groups", [1, 2])
def test_a_budget_leaves_the_numbers_of_one_group_and_of_numbers_in_float64(monkeypatch, groups):
    _, whole = measure(LinearVAE(groups), [3, 150], [20], [20], n=5, resamples=7)
    monkeypatch.setattr(likelihood, "BYTES_AT_ONCE", 200)
    _, parts = measure(LinearVAE(groups), [3, 150], [20], [20], n=5, resamples=7)
    for key, values in whole.items():
        assert torch.allclose(values, parts[key], atol=1e-9), key


PARAMS = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())
GREY = [name for name, experiment in PARAMS["experiments"].items() if spec(experiment["dataset"]).kind != "images"]
"""Those measured before there were parts; the networks of colour images need them."""


@pytest.mark.parametrize("name", sorted(GREY))
def test_the_committed_experiments_draw_and_pass_as_many_as_ever(name):
    """Their sums are then of the same numbers in the same order, and keep their bits."""
    experiment = validate(PARAMS).experiments[name]
    vae = models.build(experiment.model.name, experiment.model, spec(experiment.dataset).shape).eval().requires_grad_(False)
    made: dict[str, Prior] = {}
    for prior, options in experiment.priors.items():
        methods = [PRIORS[options.method] if k in (options.groups or [k]) else GroupPrior for k in range(vae.groups)]
        groups = [method(options, group) for method, group in zip(methods, vae.layout(), strict=True)]
        made[prior] = Prior(vae, [one.eval().requires_grad_(False) for one in groups], made.get(options.base))
    x, batch = torch.zeros(1, *spec(experiment.dataset).shape), experiment.evaluate.batch
    costs = likelihood._Costs.of(folded(vae), made, x, experiment.evaluate.likelihood)
    assert likelihood._fitting(costs.example, batch) == batch
    assert likelihood._fitting(costs.sample * batch, likelihood.SAMPLES_AT_ONCE) == likelihood.SAMPLES_AT_ONCE
    assert set(costs.drawn.values()) <= {likelihood.PROPOSALS_AT_ONCE}
