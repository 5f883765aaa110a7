"""The papers' claims: how each kind is judged, what is refused, and that targets.yaml is complete."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from pipelines import claims, results
from pipelines.claims import Claim
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TARGETS = claims.load(ROOT / "reports" / "targets.yaml")
TESTED = [claim for claim in TARGETS if claim.untested is None]

NCP = {"prior": "ncp", "sampler": "sir-5", "metric": "loglik-sampler"}
BASE = {"prior": "normal", "metric": "loglik"}
COMMON = {
    "id": "one", "paper": "NCP-VAE", "statement": "a statement", "source": "a table", "standing": "seed", "experiment": "e",
    "subject": NCP, "kind": "absolute", "direction": "higher", "value": -1.0,
    "tolerance": {"value": 0.1, "reason": "a reason"},
}  # fmt: skip
ORDERING = {"kind": "ordering", "value": None, "tolerance": None, "against": BASE}
CORRELATION = ORDERING | {
    "kind": "correlation",
    "subject": {"prior": "ncp", "metric": "nce-loss/*"},
    "against": {"prior": "ncp", "sampler": "sir-5", "metric": "ess-fraction/*"},
}


def claim(**changes):
    return Claim.model_validate(COMMON | changes)


def rows(metric, *values, prior="ncp", sampler="sir-5", stderr=0.0, experiment="e"):
    """One row a seed."""
    return [
        results.Row(experiment, "d", "m", prior, sampler, metric, value, stderr, 10, seed, 0.0, "cpu", "", "", "r")
        for seed, value in enumerate(values)
    ]


def verdict(one, *found):
    return claims.judge([one], results.frame([row for part in found for row in part]))[0]


@pytest.mark.parametrize(
    ("direction", "ours", "word"),
    [
        ("higher", -1.05, "reproduced"),
        ("higher", 5.0, "reproduced"),
        ("higher", -1.15, "not reproduced"),
        ("lower", -0.95, "reproduced"),
        ("lower", -5.0, "reproduced"),
        ("lower", -0.85, "not reproduced"),
    ],
)
def test_an_absolute_claim_is_held_to_the_value_give_or_take_the_tolerance(direction, ours, word):
    found = verdict(claim(direction=direction), rows("loglik-sampler", ours - 0.01, ours + 0.01))
    assert (found.verdict, found.failed) == (word, word != "reproduced")
    assert found.ours == pytest.approx(ours)
    assert found.interval == pytest.approx(12.7062 * 0.01, rel=1e-4)  # t of 0.975 at one degree of freedom


@pytest.mark.parametrize(
    ("ours", "stderr", "word"),
    [(0.95, 0.1, "reproduced"), (0.85, 0.1, "not reproduced"), (0.95, 0.6, "not reproduced")],
)
def test_a_gain_must_reach_the_value_and_exclude_zero(ours, stderr, word):
    gain = claim(kind="gain", value=1.0, subject=NCP | {"metric": "loglik-gain-sampler"})
    assert verdict(gain, rows("loglik-gain-sampler", ours, stderr=stderr)).verdict == word


@pytest.mark.parametrize(
    ("direction", "ours", "stderr", "word"),
    [
        ("higher", 1.0, 0.1, "reproduced"),
        ("higher", -1.0, 0.1, "not reproduced"),
        ("higher", 1.0, 0.4, "not reproduced"),  # 1.96 sqrt(0.4² + 0.4²) is 1.11
        ("lower", -1.0, 0.1, "reproduced"),
        ("lower", 1.0, 0.1, "not reproduced"),
        ("lower", 0.0, 0.0, "not reproduced"),
    ],
)
def test_an_ordering_must_exceed_the_interval_of_the_difference(direction, ours, stderr, word):
    base = rows("loglik", 0.0, prior="normal", sampler="", stderr=stderr)
    found = verdict(claim(**ORDERING, direction=direction), rows("loglik-sampler", ours, stderr=stderr), base)
    assert (found.verdict, found.ours) == (word, ours)
    assert found.interval == pytest.approx(1.96 * 2**0.5 * stderr)


@pytest.mark.parametrize(
    ("ours", "stderr", "word"),
    [
        (0.0, 0.0, "reproduced"),
        (-0.1, 0.0, "reproduced"),  # as much worse as the tolerance allows
        (-0.11, 0.0, "not reproduced"),
        (0.0, 0.1, "not reproduced"),  # no worse, but the interval does not say so
        (0.5, 0.1, "reproduced"),
    ],
)
def test_no_worse_is_said_of_the_far_end_of_the_interval(ours, stderr, word):
    one = claim(**ORDERING | {"kind": "no-worse", "tolerance": COMMON["tolerance"]})
    base = rows("loglik", 0.0, prior="normal", sampler="", stderr=stderr)
    assert verdict(one, rows("loglik-sampler", ours, stderr=stderr), base).verdict == word


def scattered(losses, shares):
    """A row for every group, of one seed."""
    return [
        part
        for k, (loss, share) in enumerate(zip(losses, shares, strict=True))
        for part in (rows(f"nce-loss/k{k:02d}", loss, sampler=""), rows(f"ess-fraction/k{k:02d}", share))
    ]


@pytest.mark.parametrize(
    ("shares", "rho", "word"),
    [
        ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6), 1.0, "reproduced"),
        ((0.6, 0.5, 0.4, 0.3, 0.2, 0.1), -1.0, "not reproduced"),
        ((0.2, 0.1, 0.5, 0.3, 0.6, 0.05), 1 - 6 * 34 / 210, "not reproduced"),  # 1 - 6 Σd² / (n³ - n)
    ],
)
def test_a_correlation_must_have_the_sign_and_be_significant(shares, rho, word):
    found = verdict(claim(**CORRELATION), *scattered((1.0, 1.1, 1.2, 1.3, 1.35, 1.38), shares))
    assert (found.verdict, found.interval) == (word, None)
    assert found.ours == pytest.approx(rho, abs=1e-3)


def test_a_correlation_of_a_few_points_is_untested():
    found = verdict(claim(**CORRELATION), *scattered((1.0, 1.1, 1.2), (0.1, 0.2, 0.3)))
    assert found.verdict == "untested: 3 groups and seeds are too few for a rank correlation"


def test_a_claim_without_results_is_untested_and_says_what_to_run():
    other = rows("loglik-sampler", 0.0, experiment="e-lite")
    for one, found in ((claim(), ()), (claim(), [other]), (claim(**ORDERING), [rows("loglik-sampler", 1.0)])):
        judged = verdict(one, *found)
        assert judged.verdict == "untested: results.csv has no such row; add e to run in params.yaml, then dvc repro"
        assert (judged.failed, judged.ours) == (False, None)


def test_a_claim_that_cannot_be_tested_says_why_whatever_the_results():
    one = claim(untested="needs a GPU")
    assert verdict(one, rows("loglik-sampler", 9.0)).verdict == "untested: needs a GPU"


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
        ({"kind": "vague"}, r"claims\.0\.kind: Input should be 'absolute', 'gain', 'ordering', 'no-worse' or 'correlation'"),
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
        ("", "top level: Input should be a valid dictionary"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, document, message):
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, document)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_one_line(tmp_path):
    (tmp_path / "targets.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not valid YAML"):
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
    header, rule, *lines = claims.markdown(judged()).splitlines()
    assert header == "| claim | paper | ours | 95 % interval | verdict |"
    assert {line.count("|") for line in (rule, *lines)} == {6}
    assert lines[0].endswith("| -1 | -1.000 | ± 0 | reproduced |")
    assert lines[1].endswith("| -1 | -2.000 | ± 0 | not reproduced |")
    assert lines[2].endswith("| 3 (unverified) |  |  | untested: the number is recalled |")


def test_the_console_shows_every_verdict():
    text = io.StringIO()
    Console(file=text, width=200).print(claims.console(judged()))
    for word in (*claims.HEADER, "reproduced", "not reproduced", "untested: the number is recalled", "3 (unverified)"):
        assert word in text.getvalue()


@pytest.mark.parametrize("one", TARGETS, ids=lambda one: one.id)
def test_every_claim_of_the_papers_is_complete(one):
    assert one.statement
    assert one.source
    assert one.id == one.id.lower().replace(" ", "-")
    assert one.tolerance is None or one.tolerance.reason
    assert one.untested is None or len(one.untested) > len("needs ")
    for subject in filter(None, (one.subject, one.against)):
        assert results.metric(subject.metric.replace("*", "k00")).better in ("", one.direction)


def test_recalled_numbers_are_never_tested():
    assert all(claim.untested for claim in TARGETS if claim.standing == "recalled")


@pytest.mark.parametrize("one", TESTED, ids=lambda one: one.id)
def test_every_tested_claim_names_what_params_yaml_measures(one):
    experiment = yaml.safe_load((ROOT / "params.yaml").read_text())["experiments"][one.experiment]
    bounds = [f"sir-{proposals}" for proposals in experiment["evaluate"]["likelihood"]["proposals"]]
    for subject in filter(None, (one.subject, one.against)):
        drawn = experiment["priors"][subject.prior]["samplers"]
        assert subject.sampler in ("", *(bounds if subject.metric.startswith("loglik") else drawn))


def test_neither_the_table_nor_the_claims_import_torch():
    code = "import sys, pipelines.claims; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_recorded_finding_is_shown_and_must_be_true():
    known = claim(finding="the base is too good")
    missed, held = (verdict(known, rows("loglik-sampler", value)) for value in (-2.0, -0.5))
    assert not missed.failed
    assert "not reproduced: the base is too good" in claims.markdown([missed])
    assert held.failed  # it says that the claim does not hold, and the claim does
    assert not verdict(known).failed  # no such row: untested
