"""SIR: against distributions known exactly, against the formula written out, and whatever its chunks and batches are."""

import math

import numpy as np
import pytest
import torch
from oracles import Known, cdf, two_modes
from reference import Concatenating, sir
from scipy import stats

from models.distributions import DiagonalNormal
from models.protocol import Group
from priors import sir as engine
from priors.ncp import NoiseContrastivePrior
from priors.networks import NetworkOptions
from priors.sir import SIR
from runtime import hardware
from runtime.randomness import Noise

ROWS = 20_000


def draw(sampler, prior, rows=None):
    context = torch.zeros(ROWS if rows is None else len(rows), 0)
    return sampler.draw(prior, 0, context, lambda purpose: Noise(0, purpose, rows=rows))


def test_sir_on_an_exact_ratio_draws_from_the_target():
    drawn = draw(SIR(SIR.Options(proposals=1000)), Known(two_modes))
    assert stats.kstest(drawn.z[:, 0].numpy(), cdf).pvalue > 0.01
    exact = 1 / np.trapezoid(
        np.exp(2 * two_modes(t := torch.linspace(-8, 8, 40_001).double()).numpy()) / stats.norm.pdf(t), t
    )
    assert drawn.ess.mean().item() == pytest.approx(exact, abs=0.02)
    assert (drawn.proposals == 1000).all()


def test_sir_with_few_proposals_does_not_yet():
    drawn = draw(SIR(SIR.Options(proposals=2)), Known(two_modes))
    assert stats.kstest(drawn.z[:, 0].numpy(), cdf).pvalue < 1e-6


@pytest.mark.parametrize("proposals", [1, 99, 250])
def test_sir_draws_the_same_whatever_the_batch(proposals):
    sampler, prior = SIR(SIR.Options(proposals=proposals)), Known(two_modes)
    whole, part = draw(sampler, prior, range(50)), draw(sampler, prior, range(20, 30))
    assert torch.equal(whole.z[20:30], part.z)
    assert torch.allclose(whole.ess[20:30], part.ess)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("until_ess", [None, 2.0])
def test_a_weight_that_is_none_is_seen_in_the_draw(broken, until_ess):
    def log_q(z):
        return two_modes(z).where(z < 2, torch.tensor(broken))

    drawn = draw(SIR(SIR.Options(proposals=200, until_ess=until_ess)), Known(log_q), range(50)).z
    assert drawn.isnan().any()
    assert not (drawn >= 2).any()


@pytest.mark.parametrize("proposals", [2, 7, 250])
def test_sir_over_a_discrete_set_has_the_frequencies_of_exact_enumeration(proposals):
    """Of M proposals of a ratio that takes two values, K ~ Bin(M, 1/2) are better; K r / (K r + M - K) keep one."""
    ratio = 5.0

    def log_q(z):
        return math.log(ratio) * (z > 0) - z**2 / 2 - math.log(2 * math.pi) / 2

    drawn = draw(SIR(SIR.Options(proposals=proposals)), Known(log_q))
    better = np.arange(proposals + 1)
    expected = stats.binom.pmf(better, proposals, 0.5) @ (better * ratio / (better * ratio + proposals - better))
    kept = int((drawn.z[:, 0] > 0).sum())
    assert stats.chisquare([kept, ROWS - kept], [ROWS * expected, ROWS * (1 - expected)]).pvalue > 0.01


TILT = 0.8


class Tilted(Known):
    """log r = tilt z, by a matrix product: the target is N(tilt, 1)."""

    def __init__(self, tilt=TILT):
        super().__init__(None)
        self.tilt = tilt

    def log_ratio(self, k, z, context):
        return torch.nn.functional.linear(z.float(), torch.tensor([[self.tilt]]))[..., 0]


@pytest.mark.parametrize("elements", [50, 1000, 2**19])
@pytest.mark.parametrize("precision", ["fp32", "auto"])
@pytest.mark.parametrize("until_ess", [None, 50])
def test_every_chunk_size_and_precision_draws_from_the_target(monkeypatch, elements, precision, until_ess):
    monkeypatch.setattr(engine, "elements_at_once", lambda kind: elements * 100)
    monkeypatch.setattr(hardware, "gains_from_bf16", lambda kind: True)
    drawn = draw(SIR(SIR.Options(proposals=400, until_ess=until_ess, precision=precision)), Tilted())
    assert stats.kstest(drawn.z[:, 0].numpy(), stats.norm(TILT, 1).cdf).pvalue > 0.01
    edges = stats.norm.ppf(np.linspace(0, 1, 11)[1:-1], TILT, 1)
    counts = np.bincount(np.searchsorted(edges, drawn.z[:, 0].numpy()), minlength=10)
    assert stats.chisquare(counts).pvalue > 0.01


def differing(prior, proposals, until_ess, rows=ROWS):
    """Draws of all M, draws that stop early, and the share of rows that differ: no less than their total variation."""
    every = draw(SIR(SIR.Options(proposals=proposals)), prior, range(rows))
    early = draw(SIR(SIR.Options(proposals=proposals, until_ess=until_ess)), prior, range(rows))
    return every, early, (every.z != early.z).any(1).double().mean().item()


def test_stopping_early_keeps_what_all_proposals_would_have_left():
    """Weights e^(TILT z) of up to 40 times their mean: fewer than one draw in a thousand is another one."""
    every, early, different = differing(Tilted(), 2000, 100)
    assert different < 1e-3
    assert stats.kstest(early.z[:, 0].numpy(), stats.norm(TILT, 1).cdf).pvalue > 0.01
    used = early.proposals
    assert (used % engine.BLOCK == 0).all()
    assert (early.ess * used >= 100)[used < 2000].all()
    assert used.mean() < 2000 / 5
    assert (every.proposals == 2000).all()
    flat = draw(SIR(SIR.Options(proposals=2000, until_ess=50)), Known(lambda z: -(z**2) / 2))
    assert (flat.proposals == engine.BLOCK).all()


@pytest.mark.parametrize(("tilt", "until_ess", "most"), [(1.5, 50, 0.003), (2.0, 50, 0.01), (2.0, 2, 0.04)])
def test_few_draws_differ_under_heavy_tails(tilt, until_ess, most):
    """ESS/M is 0.1 and 0.02. The race's margin bounds the share by itself, and the sample size asked for lowers it."""
    _, early, different = differing(Tilted(tilt), 5000, until_ess, rows=4000)
    assert different < most
    assert early.proposals.mean() < 5000 / 3


@pytest.mark.parametrize(("until_ess", "most"), [(50, 0.1), (500, 0.002)])
def test_what_stopping_early_misses_of_rare_large_weights_falls_with_the_sample_size_asked_for(until_ess, most):
    """One proposal in 200 weighs 100 times as much: three in five first blocks have none, and look as if all were alike."""
    edge = stats.norm.isf(1 / 200)

    def log_q(z):
        return math.log(100) * (z > edge) - z**2 / 2 - math.log(2 * math.pi) / 2

    _, early, different = differing(Known(log_q), 5000, until_ess, rows=2000)
    assert different < most
    assert early.proposals.min() < 1000


def test_adaptive_draws_do_not_depend_on_the_batch():
    sampler = SIR(SIR.Options(proposals=1000, until_ess=120))
    whole, part = draw(sampler, Tilted(), range(50)), draw(sampler, Tilted(), range(20, 30))
    assert whole.proposals.unique().numel() > 1
    for name in ("z", "ess", "proposals"):
        assert torch.equal(getattr(whole, name)[20:30], getattr(part, name))


class Classified:
    """One group with a convolutional classifier over N(0, 1) maps."""

    exact = False
    proposes = False

    def __init__(self):
        torch.manual_seed(0)
        options = NoiseContrastivePrior.Options(steps=1, batch=2, network=NetworkOptions(width=16, depth=1))
        self.group = NoiseContrastivePrior(options, Group(1, (2, 4, 4), (5, 4, 4))).eval().requires_grad_(False)
        self.group.classifier.judge[-1].weight *= 20  # so that weights differ

    def base(self, k, context):
        zeros = torch.zeros(len(context), 2, 4, 4)
        return DiagonalNormal(zeros, torch.ones_like(zeros))

    def proposal(self, k, context):
        return self.base(k, context)

    def prepare(self, k, context):
        return self.group.prepare(context)

    def prepared_log_ratio(self, k, z, prepared):
        return self.group.prepared_log_ratio(z, prepared)

    def footprint(self, k):
        return self.group.footprint


def drawn_maps(prior, proposals, rows, precision="fp32"):
    contexts = Noise(0, "contexts", rows=range(30)).normal((), (30, 5, 4, 4))[list(rows)]
    sampler = SIR(SIR.Options(proposals=proposals, precision=precision))
    return sampler.draw(prior, 0, contexts, lambda purpose: Noise(0, purpose, rows=rows))


def test_in_fp32_no_bit_depends_on_chunks_or_batches(monkeypatch):
    prior = Classified()
    whole = drawn_maps(prior, 250, range(30))
    assert whole.ess.max() < 0.95
    for elements in (1, 7 * 256, 300 * 256, 2**24):
        monkeypatch.setattr(engine, "elements_at_once", lambda kind, elements=elements: elements)
        for rows in (range(30), range(3, 4), range(10, 27)):
            part = drawn_maps(prior, 250, rows)
            for name in ("z", "ess", "proposals"):
                assert torch.equal(getattr(whole, name)[list(rows)], getattr(part, name)), (elements, rows, name)


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_the_engine_draws_as_the_formula_does(monkeypatch, precision):
    """The kept z's first coordinate, and its log r: two samples from the same distribution."""
    monkeypatch.setattr(hardware, "gains_from_bf16", lambda kind: True)
    prior, images, proposals = Classified(), 20_000, 20
    context = Noise(0, "contexts", rows=range(30)).normal((), (30, 5, 4, 4))[:1]
    plain = Concatenating(prior.group.classifier).eval()
    torch.manual_seed(0)
    base = prior.base(0, context)
    expected = torch.cat([sir(plain, base, context, proposals) for _ in range(images // 10)])
    sampler = SIR(SIR.Options(proposals=proposals, precision=precision))
    drawn = sampler.draw(prior, 0, context.expand(images, -1, -1, -1), lambda purpose: Noise(1, purpose)).z
    for statistic in (lambda z: z[:, 0, 0, 0], lambda z: prior.group.log_ratio(z[:, None], context)[:, 0]):
        assert stats.ks_2samp(statistic(expected).numpy(), statistic(drawn).numpy()).pvalue > 0.01
