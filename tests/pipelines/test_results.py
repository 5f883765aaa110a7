"""The results table: what is written is what is read, and the interval is the documented one."""

import math

import pytest

from pipelines import report, results
from pipelines.results import COLUMNS, Row
from runtime.errors import UserError

CONTRACT = [
    "experiment",
    "dataset",
    "model",
    "prior",
    "sampler",
    "metric",
    "value",
    "stderr",
    "n",
    "seed",
    "seconds",
    "device",
    "features",
    "target",
    "revision",
]


def row(**changes):
    given = {
        "experiment": "gaussians25", "dataset": "gaussians25", "model": "mlp-vae/normal", "prior": "ncp", "sampler": "",
        "metric": "loglik-plugin/N100", "value": -0.5, "stderr": 0.01, "n": 100, "seed": 0, "seconds": 0.0,
        "device": "cpu", "features": "", "target": "", "revision": "r",
    }  # fmt: skip
    return Row(**(given | changes))


def table(*changes):
    return results.frame([row(**change) for change in changes])


def test_columns_are_the_contract():
    assert COLUMNS == CONTRACT


def test_what_is_written_is_read_whatever_the_order(tmp_path):
    seeds = table({"seed": 1, "value": math.pi}, {"seed": 0}, {"sampler": "sir-5", "metric": "loglik-sampler"})
    results.write(tmp_path / "one.csv", seeds)
    results.write(tmp_path / "two.csv", seeds[::-1])
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    found = results.read(tmp_path / "one.csv", "")
    assert list(found.columns) == CONTRACT
    assert found.seed.tolist() == [0, 1, 0]
    assert found.value.tolist() == [-0.5, 3.141592654, -0.5]
    assert found.sampler.tolist() == ["", "", "sir-5"]  # an empty text stays a text
    assert (found.target == "").all()


def test_writing_what_was_read_changes_nothing(tmp_path):
    path = tmp_path / "results.csv"
    results.write(path, table({"value": 1 / 3, "stderr": 1e-12}, {"seed": 1, "value": -1e20}))
    before = path.read_bytes()
    results.write(path, results.read(path, ""))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing; make it with: make it"),
        (b"a,b\n1,2\n", "has the wrong columns; make it anew with: make it"),
        (b"", "is not a results table .*; make it anew with: make it"),
        (b"a,b\n1,2,3\n4\n5,6,7,8\n", "is not a results table .*; make it anew with: make it"),
        (b"\xff\xfe\x00", "is not a results table .*; make it anew with: make it"),
    ],
)
def test_a_file_that_is_no_results_table_is_one_line(tmp_path, content, message):
    path = tmp_path / "results.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        results.read(path, "make it")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "unit", "better"),
    [
        ("loglik", "nats", "higher"),
        ("loglik-plugin", "nats", "higher"),
        ("loglik-plugin/N100", "nats", "higher"),
        ("loglik-sampler", "nats", "higher"),
        ("loglik-gain-plugin", "nats", "higher"),
        ("loglik-gain-sampler", "nats", "higher"),
        ("bits-per-dim", "bits/dim", "lower"),
        ("ess-fraction/k03", "", "higher"),
        ("ess-floor-share/k00", "", "lower"),
        ("nce-loss/k29", "nats", ""),
        ("log-z/k00", "nats", ""),
        ("mmd2/k00", "", "lower"),
        ("off-mode-share", "", "lower"),
        ("modes-hit", "", "higher"),
        ("fid-inception-50000", "", "lower"),
        ("kid-digits-400", "", "lower"),
        ("seconds-per-image", "s", "lower"),
        ("proposals-per-image", "", "lower"),
        ("train-seconds", "s", "lower"),
        ("acceptance/k00", "", ""),
    ],
)
def test_every_metric_of_the_contract_has_a_unit_and_a_direction(name, unit, better):
    found = results.metric(name)
    assert (found.unit, found.better) == (unit, better)
    assert found.meaning


@pytest.mark.parametrize(
    "name", ["", "nll", "Loglik", "loglik-sampler/N10", "loglik-plugin/100", "nce-loss", "mmd2/3", "fid-50000"]
)
def test_a_row_of_an_unknown_metric_cannot_be_made(name):
    with pytest.raises(UserError, match="is not a metric of the results table"):
        row(metric=name)


@pytest.mark.parametrize("cell", ["", "about a half"])
def test_a_number_that_is_none_is_one_line(tmp_path, cell):
    path = tmp_path / "results.csv"
    results.write(path, table({}))
    path.write_text(path.read_text().replace("-0.5", cell))
    with pytest.raises(UserError, match=r"is not a results table .*; make it anew with: make it"):
        results.read(path, "make it")


def test_a_seed_that_is_not_a_number_is_neither_lost_nor_averaged_away(tmp_path):
    path = tmp_path / "results.csv"
    results.write(path, table({"value": math.nan}, {"seed": 1}))
    assert math.isnan(results.over_seeds(results.read(path, "")).value.item())


def test_several_seeds_add_their_spread_to_the_shared_error_of_the_test_set():
    summary = results.over_seeds(
        table(*({"seed": s, "value": v, "stderr": e} for s, v, e in ((0, 1, 0.3), (1, 2, 0.4), (2, 6, 0.5))))
    )
    (found,) = summary.itertuples()
    spread = 4.302652730 * math.sqrt(7) / math.sqrt(3)  # t of 0.975 at 2 degrees of freedom; the sample variance is 7
    shared = 1.96 * math.sqrt((0.09 + 0.16 + 0.25) / 3)
    assert (found.value, found.seeds, found.n) == (3, 3, 100)
    assert found.interval == pytest.approx(math.hypot(spread, shared), rel=1e-8)


def test_the_shared_error_does_not_shrink_with_seeds():
    equal = [{"seed": seed, "stderr": 0.1} for seed in range(50)]
    assert results.over_seeds(table(*equal)).interval.item() == pytest.approx(0.196)
    assert results.over_seeds(table(equal[0])).interval.item() == pytest.approx(0.196)


def drawn(values, stderr):
    return [
        {"metric": "fid-mnist-500", "sampler": "sir-5", "seed": seed, "value": value, "stderr": stderr}
        for seed, value in enumerate(values)
    ]


def test_the_error_of_a_seeds_own_draws_is_part_of_the_spread_of_the_seeds():
    spread = 4.302652730 * math.sqrt(7) / math.sqrt(3)
    assert results.over_seeds(table(*drawn((1, 2, 6), 0.5))).interval.item() == pytest.approx(spread)
    # Seeds that agree by chance do not make the draws' own error vanish; it does fall with their number.
    assert results.over_seeds(table(*drawn((1, 1, 1, 1), 0.5))).interval.item() == pytest.approx(1.96 * 0.5 / 2)
    assert results.over_seeds(table(*drawn((1,), 0.5))).interval.item() == pytest.approx(1.96 * 0.5)
    # The data's own distance is the same in every seed.
    data = [one | {"prior": "data", "sampler": ""} for one in drawn((1, 1, 1, 1), 0.5)]
    assert results.over_seeds(table(*data)).interval.item() == pytest.approx(1.96 * 0.5)


def test_a_difference_is_taken_seed_by_seed():
    first, second = table(*drawn((11, 22, 36), 0.5)), table(*drawn((10, 20, 30), 0.5))
    value, interval = results.difference(first, second)  # 1, 2 and 6
    assert value == pytest.approx(3)
    assert interval == pytest.approx(4.302652730 * math.sqrt(7) / math.sqrt(3))
    other = second.assign(seed=second.seed + 1)
    value, apart = results.difference(first, other)
    assert value == pytest.approx(3)
    assert apart == pytest.approx(math.hypot(*(results.over_seeds(rows).interval.item() for rows in (first, second))))
    assert apart > interval


def test_methods_that_were_measured_differently_are_said_so():
    rows = [
        {"prior": "normal", "metric": "loglik", "features": "1000 importance samples", "n": 10000},
        {"prior": "gmm", "metric": "loglik", "features": "5 importance samples", "n": 2000},
        {"prior": "gmm", "sampler": "ancestral", "metric": "seconds-per-image"},
    ]
    text = "\n".join(report.tables(results.over_seeds(table(*rows))))
    assert "normal with 1000 importance samples on 10000 examples; of gmm with 5 importance samples on 2000" in text
    alike = "\n".join(report.tables(results.over_seeds(table(*(row | {"features": "", "n": 9} for row in rows)))))
    assert "importance samples" not in alike


def test_seeds_are_pooled_within_a_key_alone():
    summary = results.over_seeds(
        table(
            {},
            {"seed": 1},
            {"sampler": "sir-5"},
            {"model": "mlp-vae/bernoulli"},
            {"experiment": "digits-nvae"},
            {"prior": "gmm"},
        )
    )
    assert len(summary) == 5
    assert sorted(summary.seeds) == [1, 1, 1, 1, 2]
    assert list(summary.columns) == [*results.KEYS, "value", "interval", "seeds", "n", "features"]


def test_methods_put_cost_and_quality_of_every_prior_and_sampler_side_by_side():
    cheap, dear = {"prior": "flow", "sampler": "ancestral"}, {"prior": "ncp", "sampler": "sir-500"}
    found = results.methods(
        results.over_seeds(
            table(
                {"prior": "flow", "metric": "loglik", "value": -0.4},
                {"prior": "flow", "metric": "loglik-gain", "value": 1.8},
                cheap | {"metric": "seconds-per-image", "value": 0.1},
                cheap | {"metric": "off-mode-share", "value": 0.2},
                cheap | {"metric": "mmd2/k00", "value": 0.1},
                cheap | {"metric": "mmd2/k01", "value": 0.3},
                {"metric": "loglik-plugin", "value": -0.1},
                {"metric": "train-seconds", "value": 60.0},
                {"sampler": "sir-50", "metric": "loglik-sampler", "value": -0.3},
                dear | {"metric": "loglik-sampler", "value": -0.2},
                dear | {"metric": "loglik-gain-sampler", "value": 2.0},
                dear | {"metric": "seconds-per-image", "value": 5.0},
                dear | {"metric": "off-mode-share", "value": 0.01},
            )
        )
    )
    assert found.attrs["qualities"] == ["off-mode-share"]
    first, second = found.to_dict("records")
    assert (first["prior"], first["sampler"], second["prior"], second["sampler"]) == ("flow", "ancestral", "ncp", "sir-500")
    assert (first["loglik"], first["loglik-gain"], first["mmd2"]) == (-0.4, 1.8, 0.2)
    assert (second["loglik-plugin"], second["loglik-sampler"], second["loglik-gain"]) == (-0.1, -0.2, 2.0)
    assert (second["train-seconds"], second["off-mode-share"]) == (60.0, 0.01)
    assert math.isnan(first["loglik-plugin"])
    assert math.isnan(second["loglik"])
