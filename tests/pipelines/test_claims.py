"""The papers' claims: how each kind is judged, what is refused, and that targets.yaml is complete."""

import io
import itertools
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from rich.console import Console
from scipy.stats import spearmanr

from pipelines import claims, results
from pipelines.claims import Claim
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TARGETS = claims.load(ROOT / "reports" / "targets.yaml")
TESTED = [claim for claim in TARGETS if claim.tested]
JUDGED = [claim for claim in TARGETS if claim.untested is None]

NCP = {"prior": "ncp", "metric": "loglik-sampler", "proposals": 5}
BASE = {"prior": "normal", "metric": "loglik"}
COMMON = {
    "id": "one", "paper": "NCP-VAE", "statement": "a statement", "source": "a table", "standing": "seed", "experiment": "e",
    "subject": NCP, "kind": "absolute", "direction": "higher", "value": -1.0,
    "tolerance": {"value": 0.1, "reason": "a reason"}, "criterion": {"committed": "0123456789ab"},
}  # fmt: skip
ORDERING = {"kind": "ordering", "value": None, "tolerance": None, "against": BASE}
NO_WORSE = ORDERING | {"kind": "no-worse", "tolerance": COMMON["tolerance"]}
CORRELATION = ORDERING | {
    "kind": "correlation",
    "subject": {"prior": "ncp", "metric": "nce-loss/*"},
    "against": {"prior": "ncp", "sampler": "sir-5k", "metric": "ess-fraction/*"},
}


def claim(**changes):
    return Claim.model_validate(COMMON | changes)


def rows(metric, *values, prior="ncp", sampler="", stderr=0.0, experiment="e", vae_seed=None, **sizes):
    """One row a seed, each of a VAE of its own, or all of one."""
    proposals = 5 if metric.endswith("-sampler") else 0
    sizes = {"samples": 10, "normaliser": 0, "proposals": proposals, "step": 0} | sizes
    if not metric.startswith("loglik"):
        sizes["samples"] = 0
    return [
        results.Row(
            experiment=experiment, dataset="d", model="m", prior=prior, sampler=sampler, metric=metric, value=value,
            stderr=stderr, n=10, seed=seed, vae_seed=seed if vae_seed is None else vae_seed, seconds=0.0, device="cpu",
            precision="fp32", features="", target="", revision="r", fingerprint="c+s", **sizes,
        )
        for seed, value in enumerate(values)
    ]  # fmt: skip


def verdict(one, *found, stale=None):
    return claims.judge([one], results.frame([row for part in found for row in part]), stale)[0]


SEEDS = 12.7062  # Student's t of 0.975 at one degree of freedom: the half-width over |difference| / 2 of two seeds


@pytest.mark.parametrize(
    ("direction", "ours", "word"),
    [
        ("higher", -0.5, "reproduced"),
        ("higher", 5.0, "reproduced"),
        ("higher", -1.05, "inconclusive"),  # the interval reaches below -1.1
        ("higher", -1.15, "inconclusive"),  # and above it
        ("higher", -2.0, "contradicted"),
        ("lower", -1.5, "reproduced"),
        ("lower", -0.95, "inconclusive"),
        ("lower", 0.0, "contradicted"),
    ],
)
def test_an_absolute_claim_is_judged_by_the_whole_interval(direction, ours, word):
    found = verdict(claim(direction=direction), rows("loglik-sampler", ours - 0.01, ours + 0.01))
    assert (found.word, found.failed) == (word, word != "reproduced")
    (number,) = found.numbers
    assert number.value == pytest.approx(ours)
    assert number.interval == pytest.approx(SEEDS * 0.01, rel=1e-4)


@pytest.mark.parametrize(("ours", "word"), [(25.0, "reproduced"), (24.0, "contradicted")])
def test_the_bar_itself_is_enough_for_an_absolute_claim(ours, word):
    count = claim(value=25.0, tolerance={"value": 0.0, "reason": "a count"})
    assert verdict(count, rows("loglik-sampler", ours, ours)).word == word


@pytest.mark.parametrize(
    ("ours", "stderr", "word"),
    [
        (1.2, 0.1, "reproduced"),
        (0.95, 0.1, "inconclusive"),
        (0.5, 0.1, "contradicted"),
        (0.3, 0.4, "inconclusive"),
        (-0.5, 0.1, "contradicted"),
    ],
)
def test_a_gain_must_reach_the_value_by_its_whole_interval(ours, stderr, word):
    gain = claim(kind="gain", value=1.0, subject=NCP | {"metric": "loglik-gain-sampler"})
    assert verdict(gain, rows("loglik-gain-sampler", ours, stderr=stderr)).word == word


@pytest.mark.parametrize(("ours", "word"), [(0.3, "reproduced"), (0.1, "inconclusive"), (-0.3, "contradicted")])
def test_a_gain_of_no_stated_size_must_exclude_zero(ours, word):
    gain = claim(
        kind="gain", value=0.0, tolerance={"value": 0, "reason": "r"}, subject=NCP | {"metric": "loglik-gain-sampler"}
    )
    assert verdict(gain, rows("loglik-gain-sampler", ours, stderr=0.1)).word == word


@pytest.mark.parametrize(
    ("direction", "ours", "stderr", "word"),
    [
        ("higher", 1.0, 0.1, "reproduced"),
        ("higher", -1.0, 0.1, "contradicted"),
        ("higher", 1.0, 0.4, "inconclusive"),  # 1.96 sqrt(0.4² + 0.4²) is 1.11
        ("higher", -1.0, 0.4, "inconclusive"),
        ("lower", -1.0, 0.1, "reproduced"),
        ("lower", 1.0, 0.1, "contradicted"),
        ("lower", 0.0, 0.0, "contradicted"),  # the same is not better
    ],
)
def test_an_ordering_must_exceed_the_interval_of_the_difference(direction, ours, stderr, word):
    base = rows("loglik", 0.0, prior="normal", stderr=stderr)
    found = verdict(claim(**ORDERING, direction=direction), rows("loglik-sampler", ours, stderr=stderr), base)
    assert (found.word, found.numbers[0].value) == (word, ours)
    assert found.numbers[0].interval == pytest.approx(1.96 * 2**0.5 * stderr)


@pytest.mark.parametrize(
    ("ours", "stderr", "word"),
    [
        (0.0, 0.0, "reproduced"),
        (-0.1, 0.0, "reproduced"),  # as much worse as the tolerance allows
        (-0.11, 0.0, "contradicted"),
        (0.0, 0.1, "inconclusive"),  # no worse, but the interval does not say so
        (-0.5, 0.1, "contradicted"),
        (0.5, 0.1, "reproduced"),
    ],
)
def test_no_worse_is_said_of_the_far_end_of_the_interval(ours, stderr, word):
    base = rows("loglik", 0.0, prior="normal", stderr=stderr)
    assert verdict(claim(**NO_WORSE), rows("loglik-sampler", ours, stderr=stderr), base).word == word


def test_what_is_inconclusive_says_what_would_have_shown():
    base = rows("loglik", 0.0, prior="normal", stderr=0.1)
    found = verdict(claim(**ORDERING), rows("loglik-sampler", 0.0, stderr=0.1), base)
    half_width = 1.96 * 2**0.5 * 0.1
    assert f"1 seed of n = 10 would have shown {half_width * 2.8 / 1.96:.2g}, four times in five" in found.text


def test_a_number_that_is_not_finite_is_inconclusive():
    found = verdict(claim(), rows("loglik-sampler", float("nan"), -0.5))
    assert (found.word, found.reason) == ("inconclusive", "a seed's number is not finite")


def scattered(losses, shares, seeds=1, vae_seed=None):
    """A row for every group and seed; the seeds differ a little."""
    return [
        part
        for k, (loss, share) in enumerate(zip(losses, shares, strict=True))
        for part in (
            rows(f"nce-loss/k{k:02d}", *(loss + 1e-4 * seed for seed in range(seeds)), vae_seed=vae_seed),
            rows(f"ess-fraction/k{k:02d}", *[share] * seeds, sampler="sir-5k", vae_seed=vae_seed, proposals=5000),
        )
    ]


LOSSES = (1.0, 1.1, 1.2, 1.3, 1.35, 1.38)


@pytest.mark.parametrize(
    ("shares", "rho", "word"),
    [
        ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6), 1.0, "reproduced"),
        ((0.6, 0.5, 0.4, 0.3, 0.2, 0.1), -1.0, "contradicted"),
        ((0.2, 0.1, 0.5, 0.3, 0.6, 0.05), 1 - 6 * 34 / 210, "inconclusive"),  # 1 - 6 Σd² / (n³ - n)
    ],
)
def test_a_correlation_must_have_the_sign_and_be_significant(shares, rho, word):
    found = verdict(claim(**CORRELATION), *scattered(LOSSES, shares))
    assert (found.word, found.numbers[0].interval) == (word, None)
    assert found.numbers[0].value == pytest.approx(rho, abs=1e-3)


@pytest.mark.parametrize(
    "shares", [(0.1, 0.3, 0.3, 0.6, 0.4, 0.3), (0.5, 0.4, 0.2, 0.3, 0.1, 0.1), LOSSES], ids=["tied", "-", "1"]
)
def test_the_significance_of_few_groups_is_the_share_of_orders_that_correlate_as_much(shares):
    (found,) = verdict(claim(**CORRELATION), *scattered(LOSSES, shares)).numbers
    rho = spearmanr(LOSSES, shares).statistic
    assert found.value == pytest.approx(rho, rel=1e-12)
    orders = [spearmanr(LOSSES, order).statistic for order in itertools.permutations(shares)]
    p = sum(abs(other) > abs(rho) - 1e-9 for other in orders) / len(orders)
    assert f"Spearman, p = {p:.1g}, 6 groups" in found.note


def test_the_significance_of_many_groups_is_spearmans():
    losses, shares = range(1, 11), (3, 1, 2, 6, 4, 5, 10, 7, 8, 9)
    (found,) = verdict(claim(**CORRELATION), *scattered(losses, shares)).numbers
    assert f"Spearman, p = {spearmanr(losses, shares).pvalue:.1g}, 10 groups" in found.note


@pytest.mark.parametrize("groups", [10, 15, 30])
def test_a_perfect_correlation_of_many_groups_is_significant(groups):
    losses = range(1, groups + 1)
    for shares in (losses, losses[::-1]):  # of which rounding makes exactly 1, or not quite
        perfect = verdict(claim(**CORRELATION), *scattered(losses, shares)).numbers[0]
        assert f"Spearman, p < 0.001, {groups} groups" in perfect.note


def test_a_correlation_with_what_is_not_finite_is_inconclusive():
    assert verdict(claim(**CORRELATION), *scattered(LOSSES, (0.1, 0.2, 0.3, 0.4, 0.5, float("nan")))).word == "inconclusive"


@pytest.mark.parametrize(("vae_seed", "vaes"), [(0, "1 VAE"), (None, "3 VAEs")])
def test_neither_seeds_nor_vaes_make_a_correlation_of_groups_significant(vae_seed, vaes):
    """A rank correlation of 0.77 has p = 0.07 in six groups, and far less in eighteen that are thrice the same."""
    found = verdict(claim(**CORRELATION), *scattered(LOSSES, (0.1, 0.3, 0.2, 0.6, 0.4, 0.5), 3, vae_seed))
    assert (found.word, found.reason) == ("inconclusive", "6 groups show a correlation of 0.89 or more")
    assert f"6 groups of {vaes}" in found.numbers[0].note


def test_the_same_few_groups_of_several_vaes_are_still_few():
    found = verdict(claim(**CORRELATION), *scattered(LOSSES[:4], (0.1, 0.2, 0.3, 0.4), 3))
    assert found.text == "untested: e has too few groups for a rank correlation; it takes 5"


def test_a_correlation_of_a_few_points_is_untested():
    """A perfect order of four comes by chance once in twelve times, either way round."""
    found = verdict(claim(**CORRELATION), *scattered((1.0, 1.1, 1.2, 1.3), (0.1, 0.2, 0.3, 0.4)))
    assert found.text == "untested: e has too few groups for a rank correlation; it takes 5"


def test_a_claim_without_results_is_untested_and_says_what_to_run():
    other = rows("loglik-sampler", 0.0, experiment="e-lite")
    for one, found in ((claim(), ()), (claim(), [other]), (claim(**ORDERING), [rows("loglik-sampler", 1.0)])):
        judged = verdict(one, *found)
        assert judged.text == "untested: results.csv has no such row of e; run the stages of e, then priorhole report"
        assert (judged.failed, judged.numbers) == (False, ())


def test_a_claim_that_cannot_be_tested_says_why_and_what_it_takes_once_its_experiment_is_measured():
    elsewhere, here = rows("loglik-sampler", 9.0, experiment="f"), rows("loglik-sampler", 9.0)
    assert verdict(claim(untested="needs a GPU"), elsewhere).text == "untested: needs a GPU"
    now = "e is measured now: judging it takes a `subject` and a `criterion` in targets.yaml"
    assert verdict(claim(untested="needs a GPU"), here).text == f"untested: needs a GPU; {now}"
    recalled = claim(untested="known from memory alone", standing="recalled")
    assert verdict(recalled, here).text == "untested: known from memory alone"


def trained(prior, plateaued):
    return rows("plateaued/k00", *plateaued, prior=prior)


@pytest.mark.parametrize("still", ["ncp", "normal", "flow", None])
@pytest.mark.parametrize("ours", [1.0, -1.0, 0.0])
def test_a_prior_that_was_still_improving_is_neither_refuted_nor_beaten(still, ours):
    one = claim(**ORDERING | {"against": {"prior": "flow", "metric": "loglik"}})
    found = [rows("loglik-sampler", ours, stderr=0.1), rows("loglik", 0.0, prior="flow", stderr=0.1)]
    found += [trained(prior, [1.0, 0.0 if prior == still else 1.0]) for prior in ("ncp", "normal", "flow")]
    word = {1.0: "reproduced", -1.0: "contradicted", 0.0: "inconclusive"}[ours]
    undone = {(1.0, "flow"), (-1.0, "ncp")}
    judged = verdict(one, *found)
    assert judged.word == ("inconclusive" if (ours, still) in undone else word)
    assert ("was still improving when its budget ended" in judged.reason) == ((ours, still) in undone)


@pytest.mark.parametrize(
    ("changes", "metric", "worse"),
    [
        ({}, "loglik-sampler", -3.0),
        ({"kind": "gain", "value": 1.0, "subject": NCP | {"metric": "loglik-gain-sampler"}}, "loglik-gain-sampler", -3.0),
        (NO_WORSE, "loglik-sampler", -3.0),
    ],
)
def test_no_kind_of_claim_is_denied_a_prior_that_was_still_improving(changes, metric, worse):
    found = [rows(metric, worse, stderr=0.1), rows("loglik", 0.0, prior="normal", stderr=0.1)]
    one = claim(**changes)
    assert verdict(one, *found, trained("ncp", [1.0])).word == "contradicted"
    ended = verdict(one, *found, trained("ncp", [0.0]))
    assert (ended.word, ended.reason) == ("inconclusive", "ncp was still improving when its budget ended")
    elsewhere = rows("plateaued/k00", 0.0, experiment="f")
    assert verdict(one, *found, elsewhere).word == "contradicted"


@pytest.mark.parametrize("rival", ["ncp", "flow"])
def test_a_rival_of_another_experiment_that_was_still_improving_is_not_beaten(rival):
    """Also one of the same name, whose namesake in the claim's own experiment says nothing of it."""
    one = claim(**ORDERING | {"against": NCP | {"experiment": "f", "prior": rival}})
    found = [rows("loglik-sampler", 1.0, stderr=0.1), rows("loglik-sampler", 0.0, prior=rival, experiment="f", stderr=0.1)]
    ended, stopped = ([rows("plateaued/k00", value, prior=rival, experiment="f")] for value in (0.0, 1.0))
    here = trained(rival, [1.0])
    judged = verdict(one, *found, *ended, here)
    assert (judged.word, judged.reason) == ("inconclusive", f"{rival} was still improving when its budget ended")
    assert verdict(one, *found, *stopped, here).word == "reproduced"


@pytest.mark.parametrize(("samples", "n", "judged"), [(10, 10, True), (5, 10, False), (10, 20, False)])
def test_likelihoods_are_compared_at_the_same_s_and_on_as_many_examples(samples, n, judged):
    one = claim(**ORDERING | {"against": NCP | {"experiment": "f"}})
    other = [replace(row, n=n) for row in rows("loglik-sampler", 0.0, experiment="f", stderr=0.1, samples=samples)]
    found = verdict(one, rows("loglik-sampler", 1.0, stderr=0.1), other)
    unequal = "untested: e has its two likelihoods at unequal S, or on unequal numbers of examples"
    assert found.text == ("reproduced" if judged else unequal)


def test_neither_times_nor_the_base_depend_on_how_long_priors_were_trained():
    quick, slow = ({"prior": prior, "sampler": "any", "metric": "seconds-per-image"} for prior in ("ncp", "flow"))
    faster = claim(**ORDERING | {"direction": "lower", "subject": quick, "against": slow})
    found = [rows("seconds-per-image", value, prior=prior, sampler="any") for prior, value in (("ncp", 1.0), ("flow", 2.0))]
    assert verdict(faster, *found, trained("flow", [0.0])).word == "reproduced"
    base = claim(subject=BASE)
    assert verdict(base, rows("loglik", -3.0, prior="normal"), trained("normal", [0.0])).word == "contradicted"


def test_two_samplers_of_one_prior_are_compared_however_it_was_trained():
    one = claim(
        **NO_WORSE
        | {
            "subject": {"prior": "ncp", "sampler": "sir-v2", "metric": "off-mode-share"},
            "against": {"prior": "ncp", "sampler": "sir-5k", "metric": "off-mode-share"},
            "direction": "lower",
        }
    )
    found = [rows("off-mode-share", 0.1, sampler=sampler, stderr=0.01) for sampler in ("sir-v2", "sir-5k")]
    assert verdict(one, *found, trained("ncp", [0.0])).word == "reproduced"


SETTINGS = {"experiment": None, "settings": ["e", "f", "g"]}


@pytest.mark.parametrize(
    ("values", "word", "said"),
    [
        ((-0.5, -0.6, -0.7), "reproduced", "in all 3 settings"),
        ((-2.0, -3.0, -2.5), "contradicted", "in all 3 settings"),
        ((-0.5, -2.0, -3.0), "inconclusive", "holds in 1 of 3 settings (e)"),
    ],
)
def test_a_claim_over_several_settings_holds_in_all_of_them_or_depends(values, word, said):
    found = [rows("loglik-sampler", value, experiment=name) for name, value in zip("efg", values, strict=True)]
    judged = verdict(claim(**SETTINGS), *found)
    assert (judged.word, judged.reason) == (word, said)
    assert f"| {min(values):.3f} to {max(values):.3f} |" in claims.markdown([judged])
    assert "run the stages of g, then" in verdict(claim(**SETTINGS), *found[:2]).text


def test_a_context_is_shown_and_never_judged():
    one = claim(kind="context", why="units are not known", criterion=None)
    judged = verdict(one, rows("loglik-sampler", -9.0))
    assert (judged.tested, judged.failed) == (False, False)
    assert "a statement" not in claims.markdown([judged])
    assert "| -1 | -9.000 | ± 0 (one VAE) | units are not known |" in claims.document([judged])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("configuration", "untested: its rows are of another configuration; run priorhole evaluate e; priorhole report"),
        ("code", "reproduced"),
        ("", "reproduced"),
    ],
)
def test_rows_of_another_configuration_are_refused_and_those_of_earlier_code_said_to_be(change, text):
    judged = verdict(claim(), rows("loglik-sampler", -0.5), stale=lambda table: pd.Series(change, index=table.index))
    assert judged.text == text
    assert any("measured by earlier code" in number.note for number in judged.numbers) == (change == "code")


def test_the_headline_is_the_largest_number_of_samples_and_others_can_be_named():
    found = [rows("loglik-sampler", -0.5, samples=1000), rows("loglik-sampler", -3.0, samples=5)]
    assert verdict(claim(), *found).word == "reproduced"
    assert verdict(claim(subject=NCP | {"samples": 5}), *found).word == "contradicted"


def test_a_subject_that_is_several_numbers_is_refused():
    one = claim(subject={"prior": "ncp", "metric": "elbo-gain/k00"})
    with pytest.raises(UserError, match=r"targets\.yaml: one: e has several numbers for elbo-gain/k00; name `proposals`"):
        verdict(one, *(rows("elbo-gain/k00", 0.0, proposals=proposals) for proposals in (5, 50)))


def test_a_criterion_newer_than_its_result_is_said_to_be():
    one = claim(criterion={"after_result": "five seeds were added"})
    judged = verdict(one, rows("loglik-sampler", -0.5))
    assert judged.text == "reproduced: the criterion is newer than the result: five seeds were added"


def load(folder, document):
    path = folder / "targets.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return claims.load(path)


def test_what_is_loaded_is_what_was_written(tmp_path):
    assert load(tmp_path, {"claims": [COMMON, COMMON | ORDERING | {"id": "two"}]}) == [claim(), claim(**ORDERING, id="two")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vlaue": 1.0}, r"claims\.0\.vlaue: Extra inputs are not permitted"),
        ({"value": "-1"}, r"claims\.0\.value: Input should be a valid number"),
        (
            {"kind": "vague"},
            r"claims\.0\.kind: Input should be 'absolute', 'gain', 'ordering', 'no-worse', 'correlation' or",
        ),
        ({"standing": "certain"}, r"claims\.0\.standing: "),
        ({"subject": {"prior": "ncp"}}, r"claims\.0\.subject\.metric: Field required"),
        ({"tolerance": {"value": 0.1}}, r"claims\.0\.tolerance\.reason: Field required"),
        ({"tolerance": {"value": -0.1, "reason": "r"}}, r"claims\.0\.tolerance\.value: .* greater than or equal to 0"),
        ({"subject": NCP | {"metric": "loglikelihood"}}, r"claims\.0\.subject\.metric: 'loglikelihood' is not a metric"),
        ({"subject": NCP | {"metric": "nce-loss/*"}}, r"claims\.0: only a correlation is over all groups"),
        ({"source": ""}, r"claims\.0\.source: String should have at least 1 character"),
        ({"untested": ""}, r"claims\.0\.untested: String should have at least 1 character"),
        ({"standing": "recalled"}, r"claims\.0: a recalled number is never tested"),
        ({"subject": None}, r"claims\.0: a claim without `untested` needs a subject"),
        ({"value": None}, r"claims\.0: a tested claim of kind absolute needs a value and a tolerance"),
        ({"kind": "gain", "tolerance": None}, r"claims\.0: a tested claim of kind gain needs a value and a tolerance"),
        ({"kind": "ordering"}, r"claims\.0: a tested claim of kind ordering needs `against`"),
        ({"kind": "no-worse", "tolerance": None}, r"claims\.0: a tested claim of kind no-worse needs a tolerance"),
        ({"kind": "correlation"}, r"claims\.0: a tested claim of kind correlation needs `against`"),
        ({"criterion": None}, r"claims\.0: a tested claim needs a `criterion`"),
        ({"criterion": {}}, r"claims\.0\.criterion: name the revision in `committed`, or say in `after_result`"),
        ({"criterion": {"committed": "HEAD"}}, r"claims\.0\.criterion\.committed: "),
        ({"kind": "context"}, r"claims\.0: a context needs a subject, and to say in `why`"),
        ({"expected": "contradicted"}, r"claims\.0: a claim that is expected to be contradicted needs a `finding`"),
        ({"experiment": None}, r"claims\.0: name either one `experiment` or several `settings`"),
        ({"settings": ["a", "b"]}, r"claims\.0: name either one `experiment` or several `settings`"),
        ({"experiment": None, "settings": ["a", "a"]}, r"claims\.0: `settings` names an experiment twice"),
        ({"subject": NCP | {"proposals": None}}, r"claims\.0\.subject: loglik-sampler is a bound for SIR with M proposals"),
        ({"subject": NCP | {"sampler": "sir-5"}}, r"claims\.0\.subject: loglik-sampler belongs to no sampler"),
        ({"experiment": "mnist-nvae-lite"}, r"claims\.0: a -lite experiment is not the paper's protocol"),
    ],
)
def test_a_wrong_claim_is_one_line_with_the_path_of_its_key(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, {"claims": [COMMON | changes]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"claims": [COMMON, COMMON]}, "the id one occurs more than once"),
        ({"claims": {}}, "claims: Input should be a valid list"),
        ({}, "claims: Field required"),
        ("claims: [", "is not valid YAML"),
        ("claims: []\nclaims: []\n", "line 2 is not valid YAML: the key 'claims' was given in line 1 already"),
        ("", "top level: Input should be a valid dictionary"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, document, message):
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, document)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_one_line(tmp_path):
    (tmp_path / "targets.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8"):
        claims.load(tmp_path / "targets.yaml")


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        claims.load(tmp_path / "targets.yaml")


def test_lite_results_may_be_held_against_a_gain_or_an_ordering(tmp_path):
    lite = {"experiment": "mnist-nvae-lite"}
    assert len(load(tmp_path, {"claims": [COMMON | lite | {"kind": "gain"}, COMMON | ORDERING | lite | {"id": "two"}]})) == 2


def judged():
    """A claim that holds, one that fails, one that is recalled."""
    recalled = claim(id="recalled", standing="recalled", value=3.0, untested="the number is recalled")
    found = results.frame(rows("loglik-sampler", -1.0) + rows("loglik-sampler", -2.0, experiment="f"))
    return claims.judge([recalled, claim(), claim(id="two", experiment="f")], found)


def test_the_markdown_lists_the_tested_claims_first():
    header, rule, *lines = claims.markdown(judged()).splitlines()[:5]
    assert header == "| claim | paper | ours | 95 % interval | verdict |"
    assert {line.count("|") for line in (rule, *lines)} == {6}
    assert lines[0].endswith("| -1 | -1.000 | ± 0 (one VAE) | reproduced |")
    assert lines[1].endswith("| contradicted: reproduced is what targets.yaml expects |")
    assert lines[2].endswith("| 3 (unverified) |  |  | untested: the number is recalled |")


def test_the_document_says_every_margin_and_why():
    text = claims.document(judged())
    assert "`one` (absolute): margin 0.1: a reason. Committed in 0123456789ab." in text


def test_the_console_shows_every_verdict():
    text = io.StringIO()
    Console(file=text, width=200).print(claims.console(judged()))
    for word in (*claims.HEADER, "reproduced", "contradicted", "untested: the number is recalled", "3 (unverified)"):
        assert word in text.getvalue()


@pytest.mark.parametrize("one", TARGETS, ids=lambda one: one.id)
def test_every_claim_names_rows_that_can_be_there_and_asks_for_the_better_side(one):
    assert one.id == one.id.lower().replace(" ", "-")
    assert one.untested is None or len(one.untested) > len("needs ")
    for subject in filter(None, (one.subject, one.against)):
        assert results.metric(subject.metric.replace("*", "k00")).better in ("", one.direction)


PLANNED = r"(celeba64|cifar10|celebahq256)-(vae|rae|nvae)"


@pytest.mark.parametrize("one", TARGETS, ids=lambda one: one.id)
def test_every_claim_is_of_an_experiment_that_is_there_or_says_that_it_waits_for_it(one):
    experiments = yaml.safe_load((ROOT / "params.yaml").read_text())["experiments"]
    others = {subject.experiment for subject in one.named if subject.experiment is not None}
    for name in {*one.experiments, *others} - set(experiments):
        assert re.fullmatch(PLANNED, name)
        assert one.untested


@pytest.mark.parametrize("one", JUDGED, ids=lambda one: one.id)
def test_every_claim_with_a_subject_names_what_params_yaml_measures(one):
    experiments = yaml.safe_load((ROOT / "params.yaml").read_text())["experiments"]
    for name in one.experiments:
        for subject in one.named:
            experiment = experiments[subject.experiment or name]
            assert subject.sampler in ("", *experiment["priors"][subject.prior]["samplers"])
            if subject.metric.startswith("loglik") and subject.proposals is not None:
                assert subject.proposals in experiment["evaluate"]["likelihood"]["proposals"]


CRITERION = ("kind", "value", "direction", "tolerance", "experiment", "settings", "subject", "against")


def git(*arguments):
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("one", [one for one in TESTED if one.criterion.after_result is None], ids=lambda one: one.id)
def test_a_criterion_is_older_than_the_result_it_judges_unless_it_says_so(one):
    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("no whole git history here")
    then = git("show", f"{one.criterion.committed}:reports/targets.yaml")
    assert then.returncode == 0, f"{one.criterion.committed} is no revision with a targets.yaml"
    written = (then.stdout, (ROOT / "reports" / "targets.yaml").read_text())
    before, now = (next(entry for entry in yaml.safe_load(text)["claims"] if entry["id"] == one.id) for text in written)
    for key in CRITERION:
        old, new = before.get(key), now.get(key)
        if key == "tolerance" and old and new:  # its reason may be worded better
            old, new = old["value"], new["value"]
        assert old == new, key
    table = results.read(ROOT / "reports" / "results.csv", "")
    judged_rows = pd.concat([claims.rows_of(one, subject, table) for subject in one.named])
    for revision in judged_rows.revision.unique():
        measured = revision.removesuffix("-dirty")
        assert git("merge-base", "--is-ancestor", one.criterion.committed, measured).returncode == 0, measured


def test_a_gain_is_held_against_that_of_another_experiment():
    fid = "fid-efficientnet-lite0-30"
    subject = {"prior": "ncp", "sampler": "sir", "metric": fid, "less": {"prior": "normal", "sampler": "ancestral"}}
    one = claim(**ORDERING | {"subject": subject, "against": subject | {"experiment": "flat"}, "direction": "lower"})
    base = {"prior": "normal", "sampler": "ancestral"}
    deep = [rows(fid, 60.0, 62.0, sampler="sir"), rows(fid, 100.0, 101.0, **base)]
    flat = [
        rows(fid, 80.0, 81.0, sampler="sir", experiment="flat"),
        rows(fid, 90.0, 91.0, experiment="flat", **base),
    ]
    found = verdict(one, *deep, *flat)
    assert (found.word, found.numbers[0].value) == ("reproduced", pytest.approx(-29.5))
    assert "no such row of flat" in verdict(one, *deep, flat[0]).reason


def test_neither_the_table_nor_the_claims_import_torch():
    code = "import sys, pipelines.claims; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("expected", ["contradicted", "inconclusive"])
def test_an_expected_verdict_is_shown_with_its_finding_and_must_come_out(expected):
    known = claim(expected=expected, finding="the base is too good")
    for word, value in {"reproduced": 0.0, "inconclusive": -1.1, "contradicted": -2.0}.items():
        found = verdict(known, rows("loglik-sampler", value, stderr=0.1))
        assert (found.word, found.failed) == (word, word != expected)
        assert ("the base is too good" in claims.markdown([found])) == (word == expected)
        assert (f"{expected} is what targets.yaml expects" in found.text) == (word != expected)
    assert not verdict(known).failed  # no such row: untested
