"""Numbers that are not finite stop at the next boundary between stages, named; diagnostics may be NaN."""

import json
import math
import shutil
import sys
from contextlib import nullcontext

import pytest
import torch
from tiny import ALL_ROWS, tiny, write_params

from pipelines import cli, evaluation, samples, tracking
from pipelines.evaluation import evaluation_task
from pipelines.recipe import Recipe
from pipelines.stages import Pipeline
from pipelines.work import prior_task, sample_task, vae_task
from priors.gmm import GaussianMixturePrior
from runtime import arrays, checkpoints
from runtime.errors import UserError
from runtime.identity import Identity
from runtime.progress import silent
from runtime.training import Trainee

IDENTITY = Identity("toy", 0, {"seed": 0}, "s")
BROKEN = [math.nan, math.inf, -math.inf]


def small():
    """One experiment with one seed."""
    params = tiny()
    del params["experiments"]["deep"]
    params["run"] = ["flat"]
    params["experiments"]["flat"]["seeds"] = [0]
    return params


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which everything but the evaluation is done."""
    folder = tmp_path_factory.mktemp("trained")
    write_params(folder, small())
    pipeline = Pipeline(folder)
    for stage in ("fetch", "train_vae", "train_prior", "sample"):
        getattr(pipeline, stage)("flat")
    return folder


@pytest.fixture
def done(trained, checkout, monkeypatch):
    """A copy of it to change; nothing is recorded in MLflow, which takes longer than all the rest."""
    monkeypatch.setattr(tracking, "stage", lambda *_: nullcontext())
    monkeypatch.setattr(tracking, "record", lambda *_: None)
    for name in ("data", "artifacts"):
        shutil.copytree(trained / name, checkout / name)
    write_params(checkout, small())
    return checkout


def recipe(folder, params=None):
    return Recipe(params or small(), "flat", 0, folder)


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_finished_file_is_finite_or_not_written(tmp_path, value, dtype):
    path = tmp_path / "seed-0.safetensors"
    checkpoints.save(path, {"a": torch.ones(2)}, IDENTITY)
    before = path.read_bytes()
    weights = torch.zeros(3, 4, dtype=dtype)
    weights[1, 2] = weights[0, 0] = value
    with pytest.raises(
        UserError, match=r"seed-0.safetensors is not written: 2 of the 12 numbers in body.weight are not finite"
    ):
        checkpoints.save(path, {"body.weight": weights, "count": torch.tensor(3)}, IDENTITY, step=3)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["seed-0.safetensors"]


def test_what_is_unfinished_and_rows_may_hold_what_they_hold(tmp_path):
    tensors = {"a": torch.tensor([math.nan, math.inf])}
    checkpoints.save(tmp_path / "a.partial.safetensors", tensors, IDENTITY)
    checkpoints.save(tmp_path / "a.safetensors", tensors, IDENTITY, rows=2)


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_training_whose_last_step_diverges_is_not_finished(tmp_path, value, ema):
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    trainee = Trainee("toy", module, optimizer, lambda _: 1.0, tmp_path / "a.safetensors", IDENTITY, ema=ema)
    trainee.resume()
    terms = {"loss": module.weight.sum()}
    module.weight.register_hook(lambda gradient: torch.full_like(gradient, value))
    trainee.update(terms)
    with pytest.raises(UserError, match="numbers in weight are not finite"):
        trainee.finish()
    assert not trainee.path.exists()


def test_a_vae_that_diverges_in_its_last_step_is_refused_by_its_task(done, monkeypatch):
    workspace = recipe(done).workspace
    workspace.vae("flat", 0).unlink()
    finish = Trainee.finish

    def broken(self, **metadata):
        self.average.module.encoder[0].bias.data[0] = math.nan
        finish(self, **metadata)

    monkeypatch.setattr(Trainee, "finish", broken)
    with pytest.raises(UserError, match=r"vae/seed-0.safetensors is not written: .* numbers in encoder"):
        vae_task(silent, recipe(done))
    assert not workspace.vae("flat", 0).exists()


def test_a_fit_that_diverges_is_refused_by_its_task(done, monkeypatch):
    path = recipe(done).workspace.prior("flat", "gmm", 0, 0)
    path.unlink()
    monkeypatch.setattr(GaussianMixturePrior, "fit", lambda self, codes, seed: self.scales.fill_(math.nan))
    with pytest.raises(UserError, match=r"priors/gmm/seed-0/k00.safetensors is not written: .* numbers in scales"):
        prior_task(silent, recipe(done), "gmm", [0])
    assert not path.exists()


def test_a_copy_in_half_precision_that_overflows_is_not_published(done, monkeypatch):
    path = recipe(done).workspace.vae("flat", 0)
    tensors, document = checkpoints.load(path, "")
    name = next(name for name, tensor in tensors.items() if tensor.dim() >= 2)
    tensors[name][0, 0] = 1e6
    identity = Identity(*(document[key] for key in ("experiment", "seed", "config", "source", "precision")))
    checkpoints.save(path, tensors, identity)
    with pytest.raises(UserError, match=r"1 of the .* numbers in"):
        checkpoints.publish(path, recipe(done).workspace.published(path))


def test_a_chain_that_diverges_is_named_and_exits_2(done, monkeypatch, capsys):
    params = small()
    params["experiments"]["flat"]["samplers"]["langevin"] = {"method": "langevin", "steps": 40, "step_size": 1e30}
    write_params(done, params)
    monkeypatch.setattr(sys, "argv", ["priorhole", "sample", "flat", "--workers", "1"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    *_, line = capsys.readouterr().err.splitlines()  # behind a note that what the settings before drew is kept
    assert stop.value.code == 2
    assert "flat: ncp by langevin, seed 0, images 0 to 19: z/k00 is not finite in 20 of 20" in line
    assert "step_size" in line
    assert not list(recipe(done).workspace.samples("flat", "ncp", "langevin", 0).glob("*"))


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("key", ["z/k00", "x"])
@pytest.mark.parametrize("draw", [("normal", "ancestral"), ("ncp", "langevin"), ("ncp-gmm", "sir-20")], ids="+".join)
def test_samples_that_are_not_finite_are_not_measured(done, monkeypatch, draw, key, value):
    path = recipe(done).workspace.samples("flat", *draw, 0) / ALL_ROWS
    tensors, document = checkpoints.load(path, "")
    tensors[key][[3, 5, 7], 1] = value
    identity = Identity(*(document[name] for name in ("experiment", "seed", "config", "source", "precision")))
    checkpoints.save(path, tensors, identity, rows=len(tensors["x"]))

    def not_yet(*_):
        raise AssertionError("likelihoods are measured before the samples are looked at")

    monkeypatch.setattr(evaluation, "log_likelihoods", not_yet)
    with pytest.raises(UserError, match=rf"flat: {draw[0]} by {draw[1]}, seed 0: {key} is not finite in 3 of 30"):
        evaluation_task(silent, recipe(done), None)
    with pytest.raises(UserError, match=f"{key} is not finite in 3 of 30"):
        sample_task(silent, recipe(done), *draw)


def test_a_diagnostic_that_is_nan_is_measured(done):
    path = recipe(done).workspace.samples("flat", "ncp", "langevin", 0) / ALL_ROWS
    tensors, document = checkpoints.load(path, "")
    tensors["ess/k00"][:] = math.nan
    identity = Identity(*(document[name] for name in ("experiment", "seed", "config", "source", "precision")))
    checkpoints.save(path, tensors, identity, rows=len(tensors["x"]))
    rows = evaluation_task(silent, recipe(done), None)
    assert [math.isnan(row.value) for row in rows if row.metric == "ess-fraction/k00" and row.sampler == "langevin"] == [
        True
    ]


def breaking(monkeypatch, chosen, value):
    """Let some of the measured likelihoods be ``value`` for two of each block's examples; returns what was broken."""
    measure, broken = evaluation.log_likelihoods, set()

    def measured(*arguments):
        found = measure(*arguments)
        for key in found:
            if chosen(key):
                broken.add(key)
                found[key][:2] = value
        return found

    monkeypatch.setattr(evaluation, "log_likelihoods", measured)
    return broken


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("prior", ["normal", "gmm", "ncp"])
def test_likelihoods_that_are_not_finite_are_named_and_become_no_rows(done, monkeypatch, prior, value):
    broken = breaking(monkeypatch, lambda key: key.startswith(f"{prior}/") and "log-z" not in key, value)
    with pytest.raises(UserError, match=rf"flat: {prior}, seed 0: .*: 4 of 30 are not finite"):
        evaluation_task(silent, recipe(done), None)
    assert broken
    kept = recipe(done).workspace.evaluation("flat") / f"likelihood-30-{prior}-seed-0.safetensors"
    assert kept.exists()  # what was computed is not lost


def test_a_normaliser_that_is_not_finite_is_a_row(done, monkeypatch):
    broken = breaking(monkeypatch, lambda key: "log-z" in key, -math.inf)
    rows = evaluation_task(silent, recipe(done), None)
    assert broken
    assert any(row.metric.startswith("log-z/") for row in rows)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named_before_any_likelihood(done, monkeypatch, value):
    fill = evaluation.fill_pool

    def broken(*arguments):
        pool = fill(*arguments)
        pool.log_r[:5] = value
        return pool

    monkeypatch.setattr(evaluation, "fill_pool", broken)
    with pytest.raises(UserError, match=r"flat: ncp, seed 0: the weights of base samples .*: 5 of 4096 are not finite"):
        evaluation_task(silent, recipe(done), None)
    assert not list(recipe(done).workspace.evaluation("flat").glob("likelihood-*-seed-0.safetensors"))


@pytest.mark.parametrize("deep", [False, True])
def test_the_first_group_that_broke_is_named(deep):
    drawn = {f"z/k{k:02d}": torch.zeros(6, 2, *((2, 2) if deep else ())) for k in range(12)} | {"x": torch.zeros(6, 3)}
    drawn["ess/k00"] = torch.full((6,), math.nan)
    samples.require_finite(drawn, "a")
    for k in (10, 2):
        drawn[f"z/k{k:02d}"][1:3] = math.nan
    drawn["x"][:] = math.nan
    with pytest.raises(UserError, match=r"^a: z/k02 is not finite in 2 of 6;"):
        samples.require_finite(drawn, "a")


# Files of another version

KEYS = ["experiment", "seed", "config", "source", "precision", "digest", "revision"]


def rewritten(path, change):
    """Change a stored file's metadata, its tensors left as they are."""
    if path.is_dir():
        document = path / arrays.DOCUMENT
        document.write_text(json.dumps(change(json.loads(document.read_text()))))
        return
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as handle:
        document = json.loads(handle.metadata()["priorhole"])
        tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118
    document = change(document)
    save_file(tensors, path, metadata={"priorhole": json.dumps(document)})


def read_digest(path):
    return (arrays if path.is_dir() else checkpoints).load(path, "")[1]["digest"]


def without(*keys):
    return lambda document: {key: value for key, value in document.items() if key not in keys}


FILES = {
    "data": lambda workspace: workspace.prepared("gaussians25"),
    "vae": lambda workspace: workspace.vae("flat", 0),
    "prior": lambda workspace: workspace.prior("flat", "ncp", 0, 0),
    "samples": lambda workspace: workspace.samples("flat", "ncp", "langevin", 0) / ALL_ROWS,
}
MAKES = {"data": "fetch", "vae": "train_vae", "prior": "train_prior", "samples": "sample"}
SPOILT = {
    "nothing noted": lambda _: {},
    "not a mapping": lambda _: [1],
    "no config": without("config"),
    "no source": without("source"),
    "no digest": without("digest"),
}
SAID_NOWHERE = {"no precision": without("precision"), "no history": without("history"), "no seconds": without("seconds")}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", SPOILT)
def test_a_file_of_another_version_is_one_line_for_who_reads_it_and_redone_by_who_writes_it(done, file, kind):
    path = FILES[file](recipe(done).workspace)
    before = read_digest(path)
    rewritten(path, SPOILT[kind])
    if file != "data":
        with pytest.raises(UserError) as error:
            evaluation_task(silent, recipe(done), None)
        assert path.name in str(error.value)
        assert len(str(error.value).splitlines()) == 1
    getattr(Pipeline(done), MAKES[file])("flat")
    assert (read_digest(path) == before) or file == "samples"  # which keep the time that they took


@pytest.mark.parametrize("file", ["vae", "prior", "samples"])
@pytest.mark.parametrize("kind", SAID_NOWHERE)
def test_what_is_read_and_not_there_is_one_line(done, file, kind):
    rewritten(FILES[file](recipe(done).workspace), SAID_NOWHERE[kind])
    for run in (evaluation_task, None):
        try:
            run(silent, recipe(done), None) if run else Pipeline(done).train_prior("flat")
        except UserError as error:
            said = str(error)
        else:
            continue
        assert "was written by another version of priorhole, without its" in said
        assert len(said.splitlines()) == 1


@pytest.mark.parametrize("key", KEYS)
def test_unfinished_work_of_another_version_is_begun_anew(tmp_path, key):
    path = tmp_path / "a.partial.safetensors"
    checkpoints.save(path, {"a": torch.zeros(2)}, IDENTITY)
    rewritten(path, without(key))
    found = checkpoints.load_unfinished(path, IDENTITY)
    assert (found is None) == (key in ("config", "source", "precision", "digest"))


def test_a_key_that_is_not_there_says_which_and_how_to_make_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoints.save(path, {"a": torch.zeros(2)}, IDENTITY)
    document = checkpoints.load(path, "priorhole train-vae toy")[1]
    with pytest.raises(UserError) as error:
        document["history"]
    assert str(error.value) == (
        f"{path} was written by another version of priorhole, without its history; "
        "delete it and run: priorhole train-vae toy"
    )
