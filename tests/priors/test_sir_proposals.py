"""SIR over proposals that are not the base's: what it keeps, against exact laws, however it streams and when it stops."""

import math

import numpy as np
import pytest
import torch
from oracles import Known, cdf, two_modes
from scipy import stats

from models.distributions import DiagonalNormal
from priors import sir as engine
from priors.sir import SIR
from runtime.randomness import Noise

ROWS = 12_000
SMALLEST_P = 1e-4
"""Some seventy p-values are looked at here: fewer than one in a hundred such files has a smaller one by chance."""
PLACES = torch.tensor([-3.0, 0.0, 10.0]).double()
"""Contexts: where base, target and proposals lie. Rows take them in turn."""


class TwoNormals:
    """The mixture of N(place − 1, 0.8²) and N(place + 2, 1.5²) with weights 0.4 and 0.6; ``place`` is (batch, 1)."""

    WEIGHTS, SHIFTS, WIDTHS = (0.4, 0.6), (-1.0, 2.0), (0.8, 1.5)

    def __init__(self, place):
        self.place = place
        self.parts = [
            DiagonalNormal(place + shift, torch.full_like(place, width))
            for shift, width in zip(self.SHIFTS, self.WIDTHS, strict=True)
        ]

    def log_prob(self, value):
        weighed = [part.log_prob(value) + math.log(weight) for part, weight in zip(self.parts, self.WEIGHTS, strict=True)]
        return torch.logsumexp(torch.stack(weighed), 0)

    def draw(self, noise, lead=()):
        first = noise.uniform(lead, tuple(self.place.shape)) < self.WEIGHTS[0]
        return torch.where(first, *(part.draw(noise, lead) for part in self.parts))


def wide(place):
    return DiagonalNormal(place + 0.5, torch.full_like(place, 2.0))


PROPOSALS = {"wide Normal": wide, "mixture": TwoNormals}


class Proposing(Known):
    """Base N(place, 1), target ``two_modes`` about the place, and proposals of another density; all known exactly."""

    proposes = True

    def __init__(self, propose):
        super().__init__(two_modes)
        self.propose = propose

    def base(self, k, context):
        return DiagonalNormal(context, torch.ones_like(context))

    def proposal(self, k, context):
        return self.propose(context)

    def log_ratio(self, k, z, context):
        return two_modes((z - context)[..., 0]) - self.base(k, context).log_prob(z)


def draw(propose, rows=range(ROWS), by_row=False, **options):
    """What SIR keeps, as seen from each row's place, and the draw itself."""
    context = PLACES[torch.tensor(rows) % 3][:, None]
    streams = (lambda purpose: Noise(0, purpose, rows=rows)) if by_row else (lambda purpose: Noise(0, purpose))
    drawn = SIR(SIR.Options(**options)).draw(Proposing(propose), 0, context, streams)
    return (drawn.z - context)[:, 0], drawn


def assert_of_the_law(values, law):
    """At every place alike, and all together: 12 000 draws tell cdfs apart that differ by 0.02."""
    for chosen in (values, *(values[turn::3] for turn in range(3))):
        assert stats.kstest(chosen.numpy(), law).pvalue > SMALLEST_P


GRID = torch.linspace(-9, 12, 2101).double()


def proposal_density(propose):
    return propose(torch.zeros(1, 1).double()).log_prob(GRID[:, None, None])[:, 0].exp().numpy()


def law_of_two(propose):
    """The cdf of SIR with M = 2 by quadrature: its density is 2 g(z) ∫ g(z') w(z) / (w(z) + w(z')) dz', w = target / g."""
    g = proposal_density(propose)
    w = two_modes(GRID).exp().numpy() / g
    share = w[:, None] / np.maximum(w[:, None] + w[None], 1e-300)
    density = 2 * g * np.trapezoid(g[None] * share, GRID.numpy(), axis=1)
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(GRID.numpy()))])
    assert cumulative[-1] == pytest.approx(1, abs=1e-3)
    return lambda z: np.interp(z, GRID.numpy(), cumulative / cumulative[-1])


@pytest.mark.parametrize("propose", PROPOSALS.values(), ids=PROPOSALS)
def test_with_many_proposals_the_target_is_kept_and_the_sample_size_is_known(propose):
    values, drawn = draw(propose, proposals=1000)
    assert_of_the_law(values, cdf)
    exact = 1 / np.trapezoid(two_modes(GRID).exp().numpy() ** 2 / proposal_density(propose), GRID.numpy())
    assert drawn.ess.mean().item() == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("propose", PROPOSALS.values(), ids=PROPOSALS)
def test_one_proposal_is_kept_as_it_is(propose):
    values, drawn = draw(propose, proposals=1)
    g = proposal_density(propose)
    cumulative = np.concatenate([[0], np.cumsum((g[1:] + g[:-1]) / 2 * np.diff(GRID.numpy()))])
    assert_of_the_law(values, lambda z: np.interp(z, GRID.numpy(), cumulative))
    assert (drawn.ess == 1).all()


@pytest.mark.parametrize("propose", PROPOSALS.values(), ids=PROPOSALS)
def test_of_two_proposals_one_is_kept_with_the_odds_of_their_weights(propose):
    values, _ = draw(propose, proposals=2)
    law = law_of_two(propose)
    assert_of_the_law(values, law)
    apart = np.abs(law(GRID.numpy()) - cdf(GRID.numpy())).max()
    assert apart > 0.03  # so the draws can tell it from the target
    assert stats.kstest(values.numpy(), cdf).pvalue < 1e-6


@pytest.mark.parametrize("elements", [1, 5_000, 2**19])
@pytest.mark.parametrize("until_ess", [None, 40])
@pytest.mark.parametrize("propose", PROPOSALS.values(), ids=PROPOSALS)
def test_the_target_is_kept_in_chunks_of_any_size_and_when_stopping_early(monkeypatch, propose, until_ess, elements):
    """Rows that stop leave chunks of rows whose places are in no order any more."""
    monkeypatch.setattr(engine, "elements_at_once", lambda kind: elements * engine.BLOCK)
    rows = range(ROWS if elements > 1 else 1500)  # a row at a time is slow
    values, drawn = draw(propose, rows, proposals=600, until_ess=until_ess)
    assert_of_the_law(values, cdf)
    if until_ess is None:
        assert (drawn.proposals == 600).all()
    else:
        assert drawn.proposals.unique().numel() > 1
        assert drawn.proposals.mean() < 400
        assert (drawn.ess * drawn.proposals >= until_ess)[drawn.proposals < 600].all()


@pytest.mark.parametrize("propose", PROPOSALS.values(), ids=PROPOSALS)
def test_stopping_early_keeps_what_all_proposals_would_have_left(propose):
    every, _ = draw(propose, range(3000), by_row=True, proposals=2000)
    early, drawn = draw(propose, range(3000), by_row=True, proposals=2000, until_ess=60)
    assert (every != early).double().mean() < 0.003
    assert drawn.proposals.mean() < 1000


@pytest.mark.parametrize("until_ess", [None, 40])
@pytest.mark.parametrize("propose", PROPOSALS.values(), ids=PROPOSALS)
def test_a_row_keeps_the_same_whatever_the_chunk_and_the_batch(monkeypatch, propose, until_ess):
    _, whole = draw(propose, range(60), by_row=True, proposals=450, until_ess=until_ess)
    for elements in (1, 7, 2**19):
        monkeypatch.setattr(engine, "elements_at_once", lambda kind, elements=elements: elements * engine.BLOCK)
        for rows in (range(60), range(3, 4), range(20, 47)):
            _, part = draw(propose, rows, by_row=True, proposals=450, until_ess=until_ess)
            for name in ("z", "ess", "proposals"):
                assert torch.equal(getattr(whole, name)[list(rows)], getattr(part, name)), (elements, rows, name)
