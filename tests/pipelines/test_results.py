"""The results table: what is written is what is read, and the interval is the documented one."""

import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import special

from pipelines import config, figures, report, results
from pipelines.results import COLUMNS, Row
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

CONTRACT = [
    "experiment",
    "dataset",
    "model",
    "prior",
    "sampler",
    "metric",
    "samples",
    "normaliser",
    "proposals",
    "step",
    "value",
    "stderr",
    "n",
    "seed",
    "vae_seed",
    "seconds",
    "device",
    "precision",
    "features",
    "target",
    "revision",
    "fingerprint",
]


def row(**changes):
    """A row of which each seed has a VAE of its own, unless said otherwise."""
    given = {
        "experiment": "gaussians25", "dataset": "gaussians25", "model": "mlp-vae/normal", "prior": "ncp", "sampler": "",
        "metric": "loglik-plugin", "samples": 30, "normaliser": 100, "proposals": 0, "step": 0, "value": -0.5,
        "stderr": 0.01, "n": 100, "seed": 0, "seconds": 0.0, "device": "cpu", "precision": "fp32", "features": "",
        "target": "", "revision": "r", "fingerprint": "a+b",
    }  # fmt: skip
    return Row(**({"vae_seed": changes.get("seed", 0)} | given | changes))


def table(*changes):
    return results.frame([row(**change) for change in changes])


def test_columns_are_the_contract():
    assert COLUMNS == CONTRACT


def test_what_is_written_is_read_whatever_the_order(tmp_path):
    seeds = table({"seed": 1, "value": math.pi}, {"seed": 0}, {"sampler": "sir-5", "metric": "modes-hit"})
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
        ("truth-gap", "nats", "lower"),
        ("truth-gap-sampler", "nats", "lower"),
        ("held-out/k00", "nats", "lower"),
        ("plateaued/k00", "", ""),
        ("kept-step/k09", "", ""),
        ("loglik-sampler", "nats", "higher"),
        ("loglik-gain-plugin", "nats", "higher"),
        ("loglik-gain-sampler", "nats", "higher"),
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
    "name",
    ["", "nll", "Loglik", "loglik-sampler/N10", "loglik-plugin/N100", "log-z/k00/N10", "nce-loss", "mmd2/3", "fid-50000"],
)
def test_a_row_of_an_unknown_metric_cannot_be_made(name):
    with pytest.raises(UserError, match="is not a metric of the results table"):
        row(metric=name)


def test_a_table_with_a_number_twice_is_one_line_that_names_it(tmp_path):
    """As two branches leave it that measured the same: seeds would count double, and intervals be too narrow."""
    path = tmp_path / "results.csv"
    results.write(path, table({}, {"seed": 1}, {"seed": 1, "value": 0.5}))
    with pytest.raises(
        UserError,
        match=r"has loglik-plugin of gaussians25, ncp, seed 1 twice \(line 4\), .*git checkout .*; priorhole report",
    ):
        results.read_all(path)
    with pytest.raises(UserError, match="is missing; make it with: priorhole report"):
        results.read_all(tmp_path / "none.csv")


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


def test_an_error_that_one_seed_does_not_know_is_not_taken_for_none():
    """Images of one batch were timed together, which says nothing of how batches differ; several seeds differ themselves."""
    timed = [{"metric": "seconds-per-image", "sampler": "sir-5", "value": 1.0 + seed, "stderr": math.nan, "seed": seed}
             for seed in range(2)]  # fmt: skip
    assert math.isnan(results.over_seeds(table(timed[0])).interval.item())
    assert results.over_seeds(table(*timed)).interval.item() == pytest.approx(12.7062 / 2, rel=1e-4)


@pytest.mark.parametrize(("kind", "said"), [("code", "by earlier code"), ("configuration", "under another configuration")])
def test_numbers_that_would_be_others_now_are_said_to_be(kind, said):
    rows = [{"seed": seed, "prior": prior, "metric": "loglik"} for prior in ("gmm", "ncp") for seed in range(2)]
    frame = results.over_seeds(table(*rows).assign(stale=["", "", kind, ""]))
    sentence = f"1 of 2 numbers were measured {said} and are to be made anew; they are of ncp."
    assert sentence in list(report.remarks(frame))
    assert set(report.headlines(frame)["gaussians25"]) == ({"gmm"} if kind == "configuration" else {"gmm", "ncp"})
    assert not any("anew" in remark for remark in report.remarks(results.over_seeds(table(*rows))))


def test_a_time_is_of_one_device_and_precision():
    """Those that most seeds have; what is no time is a mean over all of them."""
    ran = [("fp32", "cpu", 0.3), ("bf16", "cpu", 0.06), ("fp32", "cpu", 0.5), ("fp32", "cuda", 0.01)]
    rows = [{"seed": i, "precision": how, "device": on, "value": value} for i, (how, on, value) in enumerate(ran)]
    time = results.over_seeds(table(*({"metric": "seconds-per-image", "sampler": "sir-5"} | row for row in rows)))
    assert (time.value.item(), time.seeds.item()) == (pytest.approx(0.4), 2)
    timed, others = (table(*({"metric": "seconds-per-image", "sampler": name} | row for row in rows)) for name in "ab")
    others["value"] = 1.0
    assert results.difference(others, timed)[0] == pytest.approx(0.6)
    assert results.over_seeds(table(*rows)).value.item() == pytest.approx(sum(value for *_, value in ran) / 4)


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


TABLES = {False: 1500, True: 500}
"""How many are simulated, for a number and for a difference, which is taken table by table."""


def simulated(random, tables, seeds, **number):
    """Tables of a number whose truth is 0, one an experiment.

    A seed's value is spread by its VAE, with a standard deviation of 1, and by an error of 0.5, which all seeds share if the
    number is measured on the test set.
    """
    rows = table(*(number | {"seed": seed, "stderr": 0.5} for seed in range(seeds)))
    error = random.normal(size=(tables, seeds if number else 1)) * 0.5
    values = random.normal(size=(tables, seeds)) + error
    names = np.repeat([f"e{k}" for k in range(tables)], seeds)
    return pd.concat([rows] * tables, ignore_index=True).assign(value=values.ravel(), experiment=names)


def coverage(seeds, difference, **number):
    """Share of simulated tables whose 95 % interval holds the truth."""
    random = np.random.default_rng(seeds)
    first, second = (simulated(random, TABLES[difference], seeds, **number) for _ in range(2))
    if difference:
        pairs = zip(first.groupby("experiment"), second.groupby("experiment"), strict=True)
        found = [results.difference(one, other) for (_, one), (_, other) in pairs]
    else:
        found = results.over_seeds(first)[["value", "interval"]].to_numpy()
    return np.mean([abs(value) <= interval for value, interval in found])


OF_DRAWS = {"metric": "fid-mnist-500", "sampler": "sir-5"}


@pytest.mark.parametrize("difference", [False, True])
@pytest.mark.parametrize("number", [{}, OF_DRAWS])
@pytest.mark.parametrize("seeds", [3, 5])
def test_95_in_100_intervals_hold_the_truth(seeds, number, difference):
    assert 0.93 <= coverage(seeds, difference, **number) <= 0.99


@pytest.mark.parametrize("difference", [False, True])
@pytest.mark.parametrize("number", [{}, OF_DRAWS])
def test_a_normal_quantile_would_be_too_narrow_for_three_seeds(number, difference, monkeypatch):
    monkeypatch.setattr(special, "stdtrit", lambda *_: 1.96)
    assert coverage(3, difference, **number) < 0.93


def test_seeds_that_share_a_vae_say_nothing_of_another():
    apart, shared = ([{"seed": seed} | vae for seed in range(3)] for vae in ({}, {"vae_seed": 0}))
    for rows, vaes, conditional in ((apart, 3, False), (shared, 1, True), (shared[:1], 1, True)):
        (found,) = results.over_seeds(table(*rows)).itertuples()
        assert (found.seeds, found.vaes, found.conditional) == (len(rows), vaes, conditional)
    data = [{"prior": "data", "metric": "loglik", "seed": seed, "vae_seed": 0} for seed in range(2)]
    assert not results.over_seeds(table(*data)).conditional.item()  # no VAE is involved


def test_tables_mark_what_holds_for_one_vae():
    ones = [{"metric": "loglik", "prior": "normal", "seed": seed, "vae_seed": 0} for seed in range(3)]
    text = "\n".join(report.tables(results.over_seeds(table(*ones))))
    assert "3 seeds on 1 VAE" in text
    assert "± 0.02 (one VAE)" in text
    assert "Intervals marked (one VAE)" in text
    own = [one | {"vae_seed": one["seed"]} for one in ones]
    assert "one VAE" not in "\n".join(report.tables(results.over_seeds(table(*own))))


def test_the_headline_is_the_largest_number_of_samples_then_of_base_samples():
    rows = results.over_seeds(
        table(
            *({"samples": s, "normaliser": n} for s in (5, 30) for n in (10, 100)),
            {"samples": 1000, "normaliser": 10},
            *({"metric": "loglik-sampler", "samples": s, "normaliser": 0, "proposals": m} for s in (5, 30) for m in (5, 50)),
            {"metric": "off-mode-share", "sampler": "sir-5", "samples": 0, "normaliser": 0, "proposals": 5},
        )
    )
    shown = results.headline(rows)[["metric", *results.SIZES]].to_numpy().tolist()
    assert shown == [
        ["loglik-plugin", 1000, 10, 0],
        ["loglik-sampler", 30, 0, 5],
        ["loglik-sampler", 30, 0, 50],
        ["off-mode-share", 0, 0, 5],
    ]
    assert results.headline(rows, largest_proposals=True).proposals.tolist() == [0, 50, 5]
    assert results.headline(rows[:0]).empty


def test_gains_over_samples_are_at_one_number_of_proposals():
    gain = {"metric": "loglik-gain-sampler", "normaliser": 0}
    found = results.gains_over_samples(
        results.over_seeds(
            table(
                *(gain | {"samples": s, "proposals": m, "value": s * m} for s in (5, 30) for m in (5, 50)),
                gain | {"samples": 30, "proposals": 500},  # not at S = 5
                *({"metric": "loglik-gain", "prior": "flow", "samples": s, "normaliser": 0} for s in (5, 30)),
                {"metric": "loglik-gain", "prior": "gmm", "samples": 30, "normaliser": 0},  # at one S alone
            )
        )
    )
    assert found[["prior", "samples", "proposals"]].to_numpy().tolist() == [
        ["flow", 5, 0], ["flow", 30, 0], ["ncp", 5, 50], ["ncp", 30, 50]
    ]  # fmt: skip


def test_the_table_of_gains_over_samples_says_s_and_m():
    gain = {"metric": "loglik-gain-sampler", "normaliser": 0, "proposals": 50}
    several = table(*(gain | {"samples": s, "value": s / 10, "seed": seed} for s in (5, 30) for seed in (0, 1)))
    text = "\n".join(report.tables(results.over_seeds(several)))
    assert "| prior | M | 5 | 30 |\n| --- | --- | --- | --- |\n| ncp | 50 | 0.500 ± 0.02 | 3.000 ± 0.02 |" in text
    assert "| prior | M | 30 |" not in "\n".join(report.tables(results.over_seeds(several[several.samples == 30])))


def test_a_row_is_stale_by_what_changed_since():
    now = {"ncp": "a+b", "gmm": "a+c", "flow": "d+b", "normal": None}
    asked = []

    def expected(*key):
        asked.append(key)
        return now[key[1]]

    rows = table(*({"prior": prior, "seed": seed} for prior in now for seed in (0, 1)))
    found = results.stale_rows(rows[::-1], expected)
    assert found.loc[rows.index].tolist() == ["", "", "code", "code", *["configuration"] * 4]
    assert sorted(asked) == sorted(("gaussians25", prior, "", "loglik-plugin") for prior in now)  # once each
    assert results.stale_rows(table({"fingerprint": ""}), expected).tolist() == ["configuration"]
    assert results.stale_rows(rows[:0], expected).empty


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
        {"prior": "normal", "metric": "loglik", "normaliser": 0, "samples": 1000, "n": 10000},
        {"prior": "gmm", "metric": "loglik", "normaliser": 0, "samples": 5, "n": 2000},
        {"prior": "gmm", "sampler": "ancestral", "metric": "seconds-per-image", "normaliser": 0, "samples": 0},
    ]
    text = "\n".join(report.tables(results.over_seeds(table(*rows))))
    assert "of gmm with S = 5 on 2000 examples; of normal with S = 1000 on 10000 examples: compare those" in text
    alike = "\n".join(report.tables(results.over_seeds(table(rows[0], rows[1] | {"samples": 1000, "n": 10000}, rows[2]))))
    assert "measured with S = 1000 importance samples on 10000 examples." in alike


def test_training_that_ran_out_is_said_so():
    ended = {"metric": "plateaued/k01", "samples": 0, "normaliser": 0, "value": 1.0}
    rows = results.over_seeds(table(ended, ended | {"seed": 1, "value": 0.0}, ended | {"metric": "plateaued/k00"}))
    assert "in one seed at least: ncp (k01)." in "\n".join(report.tables(rows))
    assert "Still improving" not in "\n".join(report.tables(results.over_seeds(table(ended))))


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
    assert list(summary.columns) == [
        *results.KEYS, "value", "interval", "seeds", "vaes", "n", "features", "conditional", "stale"
    ]  # fmt: skip


@pytest.mark.parametrize("size", ["samples", "normaliser", "proposals", "step"])
def test_numbers_of_another_size_are_other_numbers(size):
    assert len(results.over_seeds(table({size: 1}, {size: 2}))) == 2


def measured(**changes):
    return {"samples": 0, "normaliser": 0} | changes


def test_quality_is_shown_by_networks_that_know_more_than_the_data_sets_classes():
    drawn = measured(dataset="cifar10-jpeg", prior="ncp", sampler="sir-500", proposals=500)
    names = ["kid-efficientnet-lite0-5000", "fid-cifar10-jpeg-5000", "kid-cifar10-jpeg-5000", "fid-efficientnet-lite0-5000"]
    found = results.methods(results.over_seeds(table(*(drawn | {"metric": name} for name in names))))
    assert found.attrs["qualities"] == [names[3], names[1], names[0], names[2]]


def test_methods_put_cost_and_quality_of_every_prior_and_sampler_side_by_side():
    cheap, dear = measured(prior="flow", sampler="ancestral"), measured(prior="ncp", sampler="sir-500", proposals=500)
    bound = measured(samples=30)
    found = results.methods(
        results.over_seeds(
            table(
                bound | {"prior": "flow", "metric": "loglik", "value": -0.4},
                bound | {"prior": "flow", "metric": "loglik-gain", "value": 1.8},
                cheap | {"metric": "seconds-per-image", "value": 0.1},
                cheap | {"metric": "off-mode-share", "value": 0.2},
                cheap | {"metric": "mmd2/k00", "value": 0.1},
                cheap | {"metric": "mmd2/k01", "value": 0.3},
                {"metric": "loglik-plugin", "value": -0.1, "normaliser": 1000},
                {"metric": "loglik-plugin", "value": -9.0, "normaliser": 10},
                measured(metric="train-seconds", value=60.0),
                bound | {"metric": "loglik-sampler", "value": -0.3, "proposals": 50},
                bound | {"metric": "loglik-sampler", "value": -0.2, "proposals": 500},
                bound | {"metric": "loglik-sampler", "value": -9.0, "proposals": 500, "samples": 5},
                bound | {"metric": "loglik-gain-sampler", "value": 2.0, "proposals": 500},
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
    assert (second["train-seconds"], second["off-mode-share"], second["proposals"]) == (60.0, 0.01, 500)
    assert math.isnan(first["loglik-plugin"])
    assert math.isnan(second["loglik"])


@pytest.mark.parametrize("name", ["sir-5k", "sir-v2", "resampling", "sir"])
def test_a_sampler_may_have_any_name(name, tmp_path):
    from pipelines import figures

    rows = [
        measured(metric="loglik", prior="normal", samples=30),
        *(
            measured(metric=f"loglik{gain}-sampler", samples=30, proposals=m, value=m / 1e4, vae_seed=0, seed=seed)
            for gain in ("", "-gain")
            for m in (50, 5000)
            for seed in (0, 1)
        ),
        *(
            measured(metric=metric, sampler=sampler, proposals=m, value=m / 1e4)
            for sampler, m in ((name, 5000), ("adaptive", 5000), ("few", 50), ("langevin", 0))
            for metric in ("seconds-per-image", "proposals-per-image", "off-mode-share", "ess-fraction/k00")
        ),
        {"metric": "loglik-gain-plugin", "normaliser": 50},
        measured(metric="nce-loss/k00"),
        measured(metric="log-z/k00", normaliser=50),
    ]
    frame = results.over_seeds(table(*rows))
    found = results.methods(frame).set_index("sampler")
    assert found["loglik-sampler"].drop("langevin").to_dict() == {"few": 0.005, name: 0.5, "adaptive": 0.5}
    assert pd.isna(found["loglik-sampler"]["langevin"])
    written = {path.name for path in figures.of_results(frame, tmp_path, ["gaussians25"])}
    assert {f"gaussians25-{kind}.png" for kind in ("convergence", "tradeoff", "nce-ess")} == written
    assert "".join(report.tables(frame))


def test_a_base_by_itself_has_no_panel_of_gains():
    of_base = {"kl": "", "mmd2": "sir"}
    rows = [measured(metric=f"{kind}/k0{k}", sampler=sampler) for k in (0, 1) for kind, sampler in of_base.items()]
    gains = [measured(metric=f"elbo-gain/k0{k}") for k in (0, 1)]
    for measurements, panels in ((rows, 2), (rows + gains, 3)):
        figure = figures._by_group("digits-nvae", results.over_seeds(table(*measurements)))
        assert len(figure.axes) == panels
        assert all(axis.lines for axis in figure.axes)


def test_figures_of_what_is_gone_are_removed_and_pictures_stay_as_long_as_they_are_true(tmp_path):
    from matplotlib import pyplot as plt
    from tiny import tiny

    from pipelines import figures
    from pipelines.config import validate

    config = validate(tiny())

    def picture(name, **metadata):
        figure = plt.figure(figsize=(1, 1))
        figure.savefig(tmp_path / f"{name}.png", metadata=metadata)
        plt.close(figure)
        return tmp_path / f"{name}.png"

    now = figures.picture_digest(config.experiments["flat"])
    written = [picture("flat-convergence")]
    kept = [picture("flat-hole", Description=now), picture("deep-samples")]  # the latter does not say what it was drawn from
    gone = [
        picture("flat-tradeoff"),  # of results, and not drawn this time
        picture("flat-samples", Description="0" * 16),
        picture("old-samples"),
        picture("old-hole", Description=now),
    ]
    assert sorted(figures.remove_stale(tmp_path, written, config)) == sorted(gone)
    assert sorted(tmp_path.iterdir()) == sorted(written + kept)


def test_the_digest_of_a_picture_does_not_depend_on_how_it_is_measured():
    from tiny import tiny

    from pipelines.config import validate
    from pipelines.figures import picture_digest

    def digest(**changes):
        params = tiny()
        params["experiments"]["flat"] |= changes
        return picture_digest(validate(params).experiments["flat"])

    assert digest(evaluate=tiny()["experiments"]["deep"]["evaluate"] | {"features": None, "examples": 7}) == digest()
    assert digest(seeds=[5, 6]) != digest()


@pytest.mark.parametrize(("channels", "shape"), [(1, (20, 24)), (3, (20, 24, 3))])
def test_a_picture_of_samples_has_their_colours_and_no_value_that_is_none(channels, shape):
    import torch

    from pipelines.figures import tiled

    x = torch.rand(18, channels, 5, 6) * 3 - 1  # sixteen of them make a square
    picture = tiled(x)
    assert picture.shape == shape
    assert (picture.min(), picture.max()) == (0, 1)
    second = x[5].clamp(0, 1).permute(1, 2, 0)  # second row, second column
    assert torch.equal(picture[5:10, 6:12], second if channels == 3 else second[..., 0])


def test_the_held_out_criterion_is_drawn_from_the_table_alone(tmp_path):
    from pipelines import figures

    rows = [
        measured(metric=f"held-out/k{k:02d}", prior=prior, step=step, value=1.4 - step / 1e4, seed=seed)
        for prior in ("ncp", "flow") for k in range(24) for seed in (0, 1) for step in range(0, 500 + 200 * seed, 100)
    ]  # fmt: skip
    kept = [measured(metric=f"kept-step/k{k:02d}", value=300.0) for k in range(24)]
    frame = results.over_seeds(table(*rows, *kept))
    (path,) = figures.of_results(frame, tmp_path, [])
    assert path.name == "gaussians25-training.png"
    figure = figures._training("gaussians25", frame)
    (legend,) = figure.legends
    assert len(legend.get_texts()) <= 12


def test_a_prior_looks_the_same_in_every_panel_that_one_legend_speaks_of():
    from matplotlib.colors import to_hex

    from pipelines import figures

    table = results.read(ROOT / "reports" / "results.csv", "")
    figure = figures._convergence("gaussians25", results.over_seeds(table[table.experiment == "gaussians25"]))
    assert figure is not None
    colours = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            colours.setdefault(label, set()).add(to_hex(handle.lines[0].get_color()))
    assert colours.keys() == {"gmm", "ncp"}
    assert all(len(own) == 1 for own in colours.values())
    assert len(set().union(*colours.values())) == 2


def test_a_number_of_the_committed_table_is_there_once():
    table = results.read(ROOT / "reports" / "results.csv", "")
    assert not table.duplicated([*results.KEYS, "seed"]).any()


def test_the_committed_pictures_are_of_the_experiments_as_they_are(tmp_path):
    """An option that most experiments do without must not make their pictures, or anything else, another's."""
    shown = shutil.copytree(ROOT / "reports" / "figures", tmp_path / "figures")
    today = config.validate(config.read(ROOT / "params.yaml"))
    assert any(path.stem.endswith(figures.PICTURES) for path in shown.glob("*.png"))
    assert figures.remove_stale(shown, list(shown.glob("*.png")), today) == []


def test_a_correlation_over_groups_counts_each_group_once():
    """Of one sampler at a time: pooled over those of 5 and 500 proposals, as many points again would blur what both show."""
    columns = ["prior", "sampler", "metric", "proposals", "value", "interval"]
    rows = [("ncp", "", f"nce-loss/k{k:02}", 0, 0.2 * k, 0.01) for k in range(5)]
    for sampler, proposals in (("sir-5", 5), ("sir-500", 500)):
        rows += [("ncp", sampler, f"ess-fraction/k{k:02}", proposals, (k + 1) / proposals, 0.001) for k in range(5)]
    rows += [("fewer", "", f"nce-loss/k{k:02}", 0, 0.2 * k, 0.01) for k in range(3)]
    rows += [("fewer", "sir-5", f"ess-fraction/k{k:02}", 5, 0.3 - 0.1 * k, 0.001) for k in range(3)]
    figure = figures._nce_against_ess("made", pd.DataFrame(rows, columns=columns))
    assert figure is not None
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {
        "ncp by sir-5, Spearman 1.00",
        "ncp by sir-500, Spearman 1.00",
        "fewer by sir-5",
    }
    assert figure.axes[0].get_title() == "made"
