"""What rows say of their numbers beside the numbers: errors, counts and devices, and when kept ones are taken."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny, write_params

from metrics.likelihood import Pool
from pipelines import evaluation
from pipelines.evaluation import Evaluation, evaluation_task
from pipelines.recipe import Recipe
from pipelines.samples import Samples, chain_states
from pipelines.stages import Pipeline
from pipelines.stored import Stored
from priors.langevin import Langevin, ResampledLangevin
from priors.samplers import ESS_FLOOR
from priors.sir import SIR
from runtime import blocks, checkpoints, hardware
from runtime.progress import silent

POOL = 4096
REPEATS = 200


def recipe(folder, name, **likelihood):
    params = tiny()
    params["experiments"][name]["evaluate"]["likelihood"] |= likelihood
    return Recipe(params, name, 0, folder)


@pytest.mark.parametrize(("samples", "read"), [(1, 1), (2, 2), (16, 16)])
def test_the_error_of_a_pool_is_of_the_blocks_that_were_read(done, samples, read):
    """16 samples of each example go once round 16 blocks; the first of each reads the first block, again and again."""
    count = POOL // 16
    measuring = Evaluation(Stored(recipe(done, "flat", samples=[1, 2, 16])), silent, None)
    first = torch.arange(30)[:, None] * 16
    means, errors = [], []
    for repeat in range(REPEATS):
        pool = Pool(torch.randn(POOL, generator=torch.Generator().manual_seed(repeat)))
        positions = (first + torch.arange(samples)).flatten()
        assert len((positions % 16).unique()) == read
        means.append(pool.log_sums(count, positions).double().mean())
        errors.append(measuring._pool_error(pool, count, samples))
    assert torch.tensor(errors).mean().item() == pytest.approx(torch.stack(means).std().item(), rel=0.2)


def test_the_error_of_a_normaliser_that_all_examples_share_is_the_pools(done):
    """Every example of a flat model has the same normaliser, so their spread says nothing of its error."""
    made = recipe(done, "flat")
    measuring = Evaluation(Stored(made), silent, None)
    rows = [row for row in evaluation_task(silent, made, None) if row.metric == "log-z/k00" and row.prior == "ncp"]
    assert {row.normaliser for row in rows} == {5, 20}
    for row in rows:
        assert row.stderr >= measuring.pool("ncp").error(row.normaliser) > 0


def test_likelihoods_of_other_examples_are_not_taken_for_these(done, monkeypatch):
    measuring = Evaluation(Stored(recipe(done, "flat")), silent, None)
    assert not measuring._missing()
    monkeypatch.setattr(measuring.stored.dataset, "digest", "of other examples")
    assert measuring._missing() == [["normal", "gmm", "ncp", "ncp-gmm"]]


@pytest.mark.parametrize("whole", [True, False], ids=["a part was finished", "a part was begun"])
def test_what_was_measured_before_a_prior_was_added_is_not_measured_again(done, monkeypatch, whole):
    made = recipe(done, "flat")
    before = [row for row in evaluation_task(silent, made, None) if row.metric.startswith("loglik")]
    for path in made.workspace.evaluation("flat").glob("likelihood-*-seed-0.safetensors"):
        path.unlink()
    stopped = Evaluation(Stored(made), silent, None)
    if whole:
        stopped.measure(stopped.stretches()[0])
    else:

        def stop(done, total, text):
            raise KeyboardInterrupt

        monkeypatch.setattr(blocks, "SAVE_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            list(Evaluation(Stored(made), stop, None).rows())
    params = tiny()
    params["experiments"]["flat"]["priors"]["gmm3"] = params["experiments"]["flat"]["priors"]["gmm"] | {"components": 3}
    write_params(done, params)
    Pipeline(done).train_prior("flat")
    Pipeline(done).sample("flat")
    measured, measure = [], evaluation.log_likelihoods

    def noted(model, priors, pools, x, rows, *more):
        measured.append(([*priors], rows))
        return measure(model, priors, pools, x, rows, *more)

    monkeypatch.setattr(evaluation, "log_likelihoods", noted)
    rows = list(evaluation_task(silent, Recipe(params, "flat", 0, done), None))
    first, second = range(20), range(20, 30)
    assert measured == [(["normal", "gmm", "ncp", "ncp-gmm"], second), (["gmm3"], first), (["gmm3"], second)]
    after = [row for row in rows if row.metric.startswith("loglik") and row.prior != "gmm3"]
    assert [row.value for row in after] == [row.value for row in before]
    assert not list(made.workspace.evaluation("flat").glob("*rows-*"))


def test_mmd_counts_the_rows_that_enter(done, monkeypatch):
    """As many of the samples as of the aggregate posterior, and no more than MMD takes."""
    made = recipe(done, "deep")

    def counts():
        return {row.n for row in evaluation_task(silent, made, None) if row.metric.startswith("mmd2/")}

    assert counts() == {30}
    fewer = evaluation.aggregate_posterior
    monkeypatch.setattr(evaluation, "aggregate_posterior", lambda *given: replace(fewer(*given), total=20))
    assert counts() == {20}


def test_rows_name_the_device_that_made_what_they_measure(done, monkeypatch):
    """Not the one that looks at it later."""
    for path in done.joinpath("artifacts", "flat").rglob("*.safetensors"):
        assert checkpoints.load(path, "")[1]["device"] == "cpu"
    monkeypatch.setattr(hardware, "device_name", lambda: "another")
    rows = list(evaluation_task(silent, recipe(done, "flat"), None))
    for metric in ("train-seconds", "seconds-per-image"):
        assert {row.device for row in rows if row.metric == metric} == {"cpu"}


def test_what_is_published_keeps_its_device(done, monkeypatch):
    path = next(done.joinpath("artifacts", "flat", "vae").rglob("*.safetensors"))
    monkeypatch.setattr(hardware, "device_name", lambda: "another")
    checkpoints.publish(path, done / "copy.safetensors")
    assert checkpoints.load(done / "copy.safetensors", "")[1]["device"] == "cpu"


@pytest.mark.parametrize(
    ("sampler", "ess", "evaluations", "share"),
    [
        (SIR.Options(proposals=500), 0.021, 500, 0.0),
        (SIR.Options(proposals=500), 0.019, 500, 1.0),
        (Langevin.Options(steps=49, step_size=0.1), 0.21, 50, 0.0),
        (Langevin.Options(steps=49, step_size=0.1), 0.19, 50, 1.0),
        # 500 proposals to begin with make a chain of 50 states no longer.
        (ResampledLangevin.Options(proposals=500, steps=49, step_size=0.1), 0.21, 550, 0.0),
        (ResampledLangevin.Options(proposals=500, steps=49, step_size=0.1), 0.19, 550, 1.0),
    ],
)
def test_effective_samples_are_of_what_their_fraction_is_of(monkeypatch, sampler, ess, evaluations, share):
    assert ESS_FLOOR == 10
    columns = {"proposals/k00": torch.full((4,), float(evaluations)), "ess/k00": torch.full((4,), ess)}
    monkeypatch.setattr(Samples, "diagnostic", lambda _, name: columns[name])
    assert Samples([], 4, "").under_floor(1, chain_states(sampler)) == {"k00": share}
    columns["proposals/k00"][:] = 0  # nothing was weighed
    assert Samples([], 4, "").under_floor(1, chain_states(sampler)) == {"k00": 0.0}
