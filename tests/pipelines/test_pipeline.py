"""The stages from end to end: same seed, same numbers, however the work was split or interrupted."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from tiny import ALL_ROWS, double, kill_self, tiny, tiny_beyond, write_params

from datasets.registry import DATASETS
from pipelines import evaluation, fanout, fingerprints, results
from pipelines import stored as pipelines_stored
from pipelines.aggregate import chosen_examples, leading, spread
from pipelines.config import read
from pipelines.fanout import Machine
from pipelines.recipe import Recipe
from pipelines.stages import Pipeline
from pipelines.stored import Stored
from pipelines.workspace import Workspace
from runtime import checkpoints
from runtime.errors import UserError
from runtime.identity import Identity
from runtime.randomness import Noise

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("fetch", "train_vae", "train_prior", "sample", "evaluate")
TIMES = r"train-seconds|seconds-per-image"


def run_all(folder, names, machine=Machine()):  # noqa: B008
    """All stages but the report, of experiments; the rows that they measured."""
    pipeline, tables = Pipeline(folder, machine), []
    for name in names:
        for stage in STAGES[:-1]:
            getattr(pipeline, stage)(name)
        tables.append(results.read(pipeline.evaluate(name), ""))
    return pd.concat(tables, ignore_index=True)


def numbers(table):
    """Everything but times, and what a report adds."""
    return table[~table.metric.str.fullmatch(TIMES)].drop(columns=["seconds", "target"]).reset_index(drop=True)


def weights(folder, pattern):
    paths = sorted((folder / "artifacts").glob(pattern))
    assert paths
    return {str(path.relative_to(folder)): checkpoints.load(path, "")[0] for path in paths}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for path, tensors in first.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second[path][name]), (path, name)


def test_two_runs_from_scratch_give_identical_results(checkout, finished):
    first = numbers(results.read(finished / "reports" / "results.csv", ""))
    # A worker would train this network for as many steps as it is meant to have, which is not what is compared here.
    shutil.copytree(finished / "data" / "features", checkout / "data" / "features")
    side_by_side = run_all(checkout, ["deep"], Machine(workers=2))
    second = numbers(pd.concat([side_by_side, run_all(checkout, ["flat"])], ignore_index=True))
    assert first.equals(second)
    _check_contents(first)
    for name in ("flat-hole", "flat-samples", "flat-convergence", "deep-samples", "deep-nce-ess"):
        assert (finished / "reports" / "figures" / f"{name}.png").stat().st_size > 5_000
    assert "| loglik | data |" in (finished / "reports" / "results.md").read_text()


def _check_contents(table):
    assert set(table.experiment) == {"flat", "deep"}
    flat = table[table.experiment == "flat"]
    metrics = set(flat.metric)
    assert {
        "loglik",
        "loglik-plugin",
        "loglik-sampler",
        "loglik-gain-sampler",
        "mmd2/k00",
        "off-mode-share",
        "modes-hit",
    } <= metrics
    assert {"loglik-plugin", "held-out/k00", "ess-fraction/k00", "acceptance/k00", "nce-loss/k00"} <= metrics
    assert set(flat[flat.metric == "loglik-sampler"].proposals) == {5, 20}
    deep = table[table.experiment == "deep"]
    assert {"fid-digits-30", "kid-digits-30", "ess-fraction/k02", "log-z/k02"} <= set(deep.metric)
    assert set(deep[deep.metric.str.startswith("fid")].prior) == {"normal", "ncp", "aggregate-posterior", "data"}
    headline = results.headline(flat)
    plugin = headline[(headline.metric == "loglik-plugin") & (headline.prior == "ncp")].set_index("seed").value
    base = headline[(headline.metric == "loglik") & (headline.prior == "normal")].set_index("seed").value
    gain = headline[(headline.metric == "loglik-gain-plugin") & (headline.prior == "ncp")].set_index("seed").value
    assert (plugin - base - gain).abs().max() < 1e-4


def test_one_and_two_shards_learn_the_same_classifiers(done):
    """As many as groups: on a cluster, in test_ray_cluster."""
    first = weights(done, "deep/priors/**/*.safetensors")
    shutil.rmtree(done / "artifacts" / "deep" / "priors")
    Pipeline(done, Machine(workers=2, shards=2)).train_prior("deep")
    assert_same(first, weights(done, "deep/priors/**/*.safetensors"))


def test_gpus_that_the_cluster_lacks_are_said_at_once(done):
    started = time.monotonic()
    with pytest.raises(UserError, match="each task asks for 64 GPU, the cluster has"):
        Pipeline(done, Machine(shards=2, gpus=64)).train_prior("deep")
    assert time.monotonic() - started < 60


SLOWED = """
import sys
import time
from pathlib import Path
from metrics.features import OwnClassifier
from runtime import training
training.SAVE_SECONDS = 0.0
update = training.Trainee.update
def slow(*arguments):
    time.sleep(0.02)  # or it ends while a checkpoint is written in the background
    return update(*arguments)
training.Trainee.update = slow
from pipelines.stages import Pipeline
getattr(Pipeline(Path.cwd()), sys.argv[1])("deep")
"""


def killed_midway(stage, folder, partial):
    """Start a stage, SIGKILL it once a partial checkpoint is there, and return that checkpoint's step."""
    process = subprocess.Popen([sys.executable, "-c", SLOWED, stage], cwd=folder, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (found := sorted((folder / "artifacts" / "deep").glob(partial))):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return checkpoints.load(found[0], "")[1]["step"]


def test_a_run_killed_in_both_stages_equals_the_undisturbed_one(checkout, tmp_path_factory, monkeypatch):
    params = tiny()
    params["experiments"]["deep"]["train"] |= {"steps": 60}
    params["experiments"]["deep"]["priors"]["ncp"] |= {"steps": 60}
    params["experiments"]["deep"]["seeds"] = [0]
    other = tmp_path_factory.mktemp("killed")
    for folder in (checkout, other):
        write_params(folder, params)
        Pipeline(folder).fetch("deep")
    Pipeline(checkout).train_vae("deep")
    Pipeline(checkout).train_prior("deep")
    monkeypatch.chdir(other)
    for stage, partial in (
        ("train_vae", "vae/*.partial.safetensors"),
        ("train_prior", "priors/ncp/seed-0/*.partial.safetensors"),
    ):
        assert 0 < killed_midway(stage, other, partial) < 60
        getattr(Pipeline(other), stage)("deep")
    assert_same(weights(checkout, "deep/**/*.safetensors"), weights(other, "deep/**/*.safetensors"))
    assert not list((other / "artifacts").rglob("*.partial.safetensors"))


class Killed(BaseException):
    pass


def test_sampling_goes_on_from_whole_files_and_evaluation_from_a_partial_one(done, monkeypatch):
    from runtime import blocks

    params = tiny()
    params["experiments"]["flat"]["seeds"] = [0]
    params["experiments"]["flat"]["sample"] |= {"images": 130, "rows_per_file": 100}
    write_params(done, params)
    shutil.rmtree(done / "artifacts" / "flat" / "samples")
    whole = numbers(run_all(done, ["flat"]))
    folder = done / "artifacts" / "flat"
    samples, likelihoods = list(folder.glob("samples/*/*/*.safetensors")), [*folder.glob("evaluation/likelihood-*-seed-0.*")]
    stored = {path: checkpoints.load(path, "")[0] for path in (*samples, *likelihoods)}
    assert len(samples) == 2 * 5  # files, draws
    for path in stored:
        path.unlink()
    killed, save = [], checkpoints.save

    def killing_save(path, *arguments, **metadata):
        save(path, *arguments, **metadata)
        if path.name.endswith(".partial.safetensors") or path in samples:
            killed.append(path)
            raise Killed

    monkeypatch.setattr(blocks, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(checkpoints, "save", killing_save)
    for stage in ("sample", "evaluate"):
        for _ in range(len(stored) + 1):  # once at each file of samples, and after the first block of two of likelihoods
            with contextlib.suppress(Killed):
                getattr(Pipeline(done), stage)("flat")
                break
    together = folder / "evaluation" / "likelihood-30-seed-0.safetensors"  # before each prior has its own
    assert sorted(killed) == sorted([*samples, blocks.partial_path(together)])
    assert len(likelihoods) == 4
    for path, tensors in stored.items():
        again = checkpoints.load(path, "")[0]
        assert all(torch.equal(values, again[name]) for name, values in tensors.items() if name != "seconds")
        assert not blocks.partial_path(path).exists()
    assert not together.exists()
    assert whole.equals(numbers(run_all(done, ["flat"])))


@pytest.fixture
def measured(monkeypatch):
    """The names of the priors that likelihoods are measured of, call by call."""
    calls, measure = [], evaluation.log_likelihoods

    def noted(model, priors, *more):
        calls.append([*priors])
        return measure(model, priors, *more)

    monkeypatch.setattr(evaluation, "log_likelihoods", noted)
    return calls


@pytest.mark.parametrize("workers", [1, 2])
def test_a_prior_that_is_added_is_measured_alone(done, monkeypatch, measured, workers):
    monkeypatch.setattr(fanout, "_in_processes", lambda calls, *_: [fanout._call(*call) for call in calls])
    params = tiny()
    deep = params["experiments"]["deep"]
    deep["seeds"] = [0]
    write_params(done, params)
    before = numbers(run_all(done, ["deep"], Machine(workers=workers)))
    assert not measured
    deep["priors"]["ncp-again"] = deep["priors"]["ncp"] | {"steps": 10}
    write_params(done, params)
    after = numbers(run_all(done, ["deep"], Machine(workers=workers)))
    assert {tuple(names) for names in measured} == {("ncp-again",)}
    assert after[after.prior != "ncp-again"].reset_index(drop=True).equals(before)
    gains = after[(after.prior == "ncp-again") & after.metric.str.startswith("loglik-gain")]
    assert len(gains)


def test_a_kill_while_priors_are_given_their_likelihoods_costs_none(done, monkeypatch, measured):
    whole, folder = numbers(run_all(done, ["flat"])), done / "artifacts" / "flat" / "evaluation"
    for path in folder.glob("likelihood-*"):
        path.unlink()
    save = checkpoints.save

    def killing_save(path, *arguments, **metadata):
        save(path, *arguments, **metadata)
        if path.name.startswith("likelihood-30-gmm"):
            raise Killed

    monkeypatch.setattr(checkpoints, "save", killing_save)
    with pytest.raises(Killed):
        Pipeline(done).evaluate("flat")
    monkeypatch.setattr(checkpoints, "save", save)
    count = len(measured)
    assert count
    assert numbers(results.read(Pipeline(done).evaluate("flat"), "")).equals(whole)
    assert len(measured) == 2 * count  # of the other seed alone


def test_the_size_of_files_changes_no_number(done):
    params, tables = tiny(), []
    deep = params["experiments"]["deep"]
    deep["seeds"] = [0]
    for rows, files in ((1000, 1), (150, 2), (1, 3)):  # of whole batches: 300, 200 and 100 rows
        deep["sample"] |= {"images": 230, "batch": 50, "rows_per_file": rows}
        write_params(done, params)
        for folder in ("samples", "measured"):
            shutil.rmtree(done / "artifacts" / "deep" / folder)
        tables.append(numbers(run_all(done, ["deep"])))
        assert len(list(Workspace(done).samples("deep", "ncp", "sir-20", 0).iterdir())) == files
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])


def test_more_samples_are_added_to_those_that_there_are(done):
    path = Workspace(done).samples("flat", "ncp", "sir-20", 0) / ALL_ROWS
    written = path.stat().st_mtime_ns
    params = tiny()
    params["experiments"]["flat"]["sample"]["images"] = 50
    write_params(done, params)
    with pytest.raises(UserError, match=r"unfinished; make it with: priorhole sample flat"):
        Pipeline(done).evaluate("flat")
    table = run_all(done, ["flat"])
    assert path.stat().st_mtime_ns == written
    assert (table[table.metric == "proposals-per-image"].n == 50).all()


@pytest.mark.parametrize("how", ["only begun", "cut short", "a file is gone"])
def test_unfinished_samples_are_no_samples(done, how):
    params = tiny()
    params["experiments"]["flat"]["sample"] |= {"images": 230, "rows_per_file": 100}
    write_params(done, params)
    shutil.rmtree(done / "artifacts" / "flat" / "samples")
    Pipeline(done).sample("flat")
    folder = Workspace(done).samples("flat", "ncp", "sir-20", 0)
    _, second, third = sorted(folder.iterdir())
    if how == "only begun":
        second.unlink()
        third.unlink()
    elif how == "a file is gone":
        second.unlink()
    else:
        third.write_bytes(third.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"(missing|unfinished; make it with|is corrupt .*): priorhole sample flat"):
        Pipeline(done).evaluate("flat")


def test_only_what_changed_is_learned_anew_and_what_is_gone_is_dropped(done):
    folder = done / "artifacts" / "flat" / "priors"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    params = tiny()
    params["experiments"]["flat"]["priors"]["ncp"]["steps"] = 35
    del params["experiments"]["flat"]["priors"]["gmm"], params["experiments"]["flat"]["priors"]["ncp-gmm"]
    write_params(done, params)
    with pytest.raises(UserError, match=r"prior\.steps is 30 there and 35 here"):
        Pipeline(done).sample("flat")
    Pipeline(done).train_prior("flat")
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert {path.parts[-3] for path in after} == {"normal", "ncp"}
    assert all((before[path] == after[path]) == ("normal" in path.parts) for path in after)


def test_results_of_experiments_not_evaluated_here_are_kept(done):
    shutil.rmtree(done / "artifacts" / "deep")
    table = results.read(done / "reports" / "results.csv", "")
    table = table[table.experiment == "flat"]
    results.write(done / "reports" / "results.csv", table.assign(experiment="deep", value=1.5))
    Pipeline(done).report()
    merged = results.read(done / "reports" / "results.csv", "")
    assert set(merged.experiment) == {"flat", "deep"}
    assert (merged[merged.experiment == "deep"].value == 1.5).all()
    assert not (merged[merged.experiment == "flat"].value == 1.5).all()


def test_results_of_experiments_that_params_does_not_name_are_kept_and_not_shown(done, capsys):
    """They may be of days on another machine, and a name be misspelt or in another branch."""
    params = tiny()
    params["experiments"]["depth"] = params["experiments"].pop("deep")
    params["run"] = ["flat"]
    write_params(done, params)
    before = results.read(done / "reports" / "results.csv", "")
    for _ in range(2):
        Pipeline(done).report()
        after = results.read(done / "reports" / "results.csv", "")
        deep = [table[table.experiment == "deep"].reset_index(drop=True) for table in (before, after)]
        assert deep[0].equals(deep[1])
        count = len(deep[0])
        assert f"results.csv keeps {count} rows of deep, which params.yaml does not name" in capsys.readouterr().err
    assert "## deep" not in (done / "reports" / "results.md").read_text()
    Pipeline(done).verdicts()


def test_a_killed_worker_is_one_line_and_its_neighbours_finish(checkout):
    from pipelines.fanout import Task, run

    tasks = [Task("killed", kill_self, {}), Task("fine", double, {"x": 2})]
    with pytest.raises(UserError, match="worker process was killed"):
        run(tasks, Machine(workers=2), checkout / "progress")
    assert run([Task("a", double, {"x": 2}), Task("b", double, {"x": 3})], Machine(workers=2), checkout / "p") == [4, 6]


def test_runs_are_mirrored_into_mlflow_and_its_failure_is_a_warning(checkout, monkeypatch, capsys):
    import mlflow

    Pipeline(checkout).fetch("flat")
    Pipeline(checkout).train_vae("flat")
    client = mlflow.MlflowClient(f"sqlite:///{checkout}/mlruns.db")
    runs = client.search_runs([client.get_experiment_by_name("flat").experiment_id])
    (parent,) = (run for run in runs if "seed" not in run.data.tags)
    inside = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.data.tags["seed"] for run in inside) == ["0", "1"]
    assert len(runs) == 3
    assert {run.data.tags["dvc.stage"] for run in runs} == {"train-vae@flat"}
    assert {run.inputs.dataset_inputs[0].dataset.name for run in runs} == {"gaussians25"}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert min(run.info.end_time - run.info.start_time for run in runs) > 100  # ms
    assert inside[0].data.params["train.steps"] == "40"
    assert len(client.get_metric_history(inside[0].info.run_id, "loss")) == 40
    assert inside[0].data.metrics["learning-rate"] > 0
    assert inside[0].data.metrics["kl/k00"] > 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://store")
    capsys.readouterr()
    Pipeline(checkout).train_vae("flat")
    assert capsys.readouterr().err.startswith("warning: this stage was not recorded in MLflow")


def test_what_was_published_is_kept_where_it_was_not_trained(done):
    paths = Pipeline(done).publish("flat")
    (vae,) = (done / "artifacts" / "flat" / "vae").glob("seed-0.*")
    before = {path: path.stat().st_mtime_ns for path in paths}
    vae.unlink()
    assert Pipeline(done).publish("flat") == paths
    published = Workspace(done).published(vae)
    assert [path for path in paths if path.stat().st_mtime_ns == before[path]] == [published]
    published.unlink()
    before = {path: path.stat().st_mtime_ns for path in paths if path != published}
    with pytest.raises(UserError, match=r"seed-0\.safetensors is missing; make it with: priorhole train-vae flat"):
        Pipeline(done).publish("flat")
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_copies_of_priors_are_not_published_beside_another_vae(done):
    """They would be refused by every stage, and what was published before be gone."""
    pipeline = Pipeline(done)
    before = {path: path.read_bytes() for path in pipeline.publish("flat")}
    shutil.rmtree(done / "artifacts" / "flat")
    params = tiny()
    params["experiments"]["flat"]["train"]["steps"] = 41
    write_params(done, params)
    pipeline.train_vae("flat")
    with pytest.raises(UserError, match=r"pretrained/flat/priors/.* was learned on another VAE than seed 0's"):
        pipeline.publish("flat")
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("damage", [slice(0, 100), slice(None, -9)])
@pytest.mark.parametrize("kind", ["vae", "priors/ncp"])
def test_a_broken_copy_is_had_again_from_version_control(done, kind, damage):
    """Its stage would make another one, of which no other copy knows."""
    pipeline = Pipeline(done)
    pipeline.publish("flat")
    shutil.rmtree(done / "artifacts" / "flat")
    path = next(path for path in (done / "pretrained" / "flat" / kind).rglob("seed-0*/*" if "/" in kind else "seed-0*"))
    path.write_bytes(path.read_bytes()[damage])
    with pytest.raises(
        UserError, match=f"{re.escape(str(path))} is corrupt.* and run: git checkout {re.escape(str(path))}$"
    ):
        pipeline.sample("flat")
    with pytest.raises(UserError, match=f"git checkout {re.escape(str(path))}"):
        pipeline.verify("flat")


def test_published_copies_serve_sampling_and_measuring_right_after_a_clone(done, tmp_path_factory, monkeypatch):
    paths = Pipeline(done).publish("flat")
    assert len(paths) == 2 + 2 * 4
    assert {checkpoints.load(path, "")[0]["decoder.0.weight"].dtype for path in paths if "/vae/" in str(path)} == {
        torch.float16
    }
    clone = tmp_path_factory.mktemp("clone")
    shutil.copytree(done / "pretrained", clone / "pretrained")
    shutil.copy(done / "params.yaml", clone)
    monkeypatch.chdir(clone)
    copy = Pipeline(clone)
    copy.sample("flat")
    assert not (clone / "data").exists()
    table = results.read(copy.evaluate("flat", 10), "")
    assert (table[(table.metric == "loglik") & (table.prior != "data")].n == 10).all()
    assert not (clone / "artifacts" / "flat" / "evaluation" / "results.csv").exists()
    # A prior that is learned on a copy is not the one that was learned on the original.
    copy.train_prior("flat")
    learned_here, learned_before = (
        checkpoints.load_document(Workspace(folder).prior("flat", "ncp", 0, 0), "")["config"]["vae digest"]
        for folder in (clone, done)
    )
    assert learned_here == Stored(Recipe(tiny(), "flat", 0, clone)).vae_document["digest"] != learned_before
    # A copy of another configuration is refused.
    params = tiny()
    params["experiments"]["flat"]["model"]["width"] = 8
    write_params(clone, params)
    with pytest.raises(UserError, match="another configuration"):
        copy.sample("flat")


def test_what_was_learned_on_copies_serves_wherever_they_lie(done, tmp_path_factory):
    Pipeline(done).publish("flat")
    clone, another = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("another")
    params = tiny()
    params["experiments"]["other"] = params["experiments"]["flat"] | {"trained_in": "flat"}
    shutil.copytree(done / "pretrained", clone / "pretrained")
    write_params(clone, params)
    Pipeline(clone).fetch("flat")
    Pipeline(clone).train_prior("flat")
    Pipeline(clone).sample("other")  # from the files of the experiment that learned on a copy
    Pipeline(clone).publish("flat")
    shutil.copytree(clone / "pretrained", another / "pretrained")
    write_params(another, params)
    for name in ("flat", "other"):
        Pipeline(another).sample(name)  # from copies of what was learned on a copy, a prior under another among them
        stored = Stored(Recipe(params, name, 1, another))
        learned_on = {stored.prior_document(prior, 0)["config"]["vae digest"] for prior in ("gmm", "ncp", "ncp-gmm")}
        assert learned_on == {stored.vae_document["digest"]}


@pytest.mark.parametrize("name", sorted(folder.name for folder in (ROOT / "pretrained").iterdir() if folder.is_dir()))
def test_the_committed_copies_serve_right_after_a_clone(tmp_path, name):
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    params = read(tmp_path / "params.yaml")
    for seed in params["experiments"][name]["seeds"]:
        stored = Stored(Recipe(params, name, seed, tmp_path))
        assert stored.vae_document["original"]
        for folder in (ROOT / "pretrained" / name / "priors").glob(f"*/seed-{seed}"):
            assert [stored.prior_document(folder.parent.name, k)["step"] >= 0 for k in range(stored.groups)]


def test_what_is_trained_in_one_experiment_can_serve_another(done):
    params = tiny()
    flat = params["experiments"]["flat"]
    own = {"normal": flat["priors"]["normal"], "ncp": flat["priors"]["ncp"] | {"samplers": ["sir-20"]}}
    params["experiments"]["other"] = flat | {"trained_in": "flat", "priors": own}
    write_params(done, params)
    pipeline = Pipeline(done)
    pipeline.fetch("other")
    pipeline.sample("other")
    first, second = (Stored(Recipe(params, name, 0, done)) for name in ("flat", "other"))
    assert torch.equal(first.samples("ncp", "sir-20").first(30), second.samples("ncp", "sir-20").first(30))
    assert not (done / "artifacts" / "other" / "vae").exists()
    # A prior of another configuration does not serve, and one of its own goes before.
    own["ncp"]["learning_rate"] = 0.01
    write_params(done, params)
    with pytest.raises(UserError, match="another configuration"):
        pipeline.sample("other")
    pipeline.train_prior("other")
    pipeline.sample("other")
    changed = Stored(Recipe(params, "other", 0, done))
    ess = [stored.samples("ncp", "sir-20").diagnostic("ess/k00") for stored in (first, changed)]
    assert not torch.equal(*ess)


def test_what_another_experiment_shares_is_not_trained_again(done):
    params = tiny()
    flat = params["experiments"]["flat"]
    own = {name: flat["priors"][name] for name in ("normal", "ncp")}
    own["gmm3"] = flat["priors"]["gmm"] | {"components": 3}
    own["ncp-gmm3"] = flat["priors"]["ncp-gmm"] | {"base": "gmm3"}
    params["experiments"]["other"] = flat | {"trained_in": "flat", "priors": own}
    write_params(done, params)
    pipeline, made = Pipeline(done), done / "artifacts" / "other"
    pipeline.fetch("other")
    pipeline.train_vae("other")
    pipeline.train_prior("other")
    assert not list((made / "vae").glob("*.safetensors"))
    assert {path.parts[-3] for path in made.rglob("*.safetensors")} == {"gmm3", "ncp-gmm3"}
    pipeline.sample("other")
    # Where nothing is there, the experiment that it is trained in is the one to run, but for what that one does not have.
    shutil.rmtree(done / "artifacts")
    with pytest.raises(UserError, match=r"is missing; make it with: priorhole train-vae flat$"):
        pipeline.train_prior("other")
    pipeline.train_vae("flat")
    with pytest.raises(UserError, match=r"is missing; make it with: priorhole train-prior flat$"):
        Stored(Recipe(params, "other", 0, done)).prior_document("ncp", 0)
    with pytest.raises(UserError, match=r"is missing; make it with: priorhole train-prior other$"):
        Stored(Recipe(params, "other", 0, done)).prior_document("gmm3", 0)


def test_one_vae_can_serve_every_seed(checkout):
    params = tiny()
    params["experiments"]["flat"]["vae_seed"] = 5
    write_params(checkout, params)
    pipeline = Pipeline(checkout)
    for stage in ("fetch", "train_vae", "train_prior"):
        getattr(pipeline, stage)("flat")
    assert [path.name for path in (checkout / "artifacts" / "flat" / "vae").iterdir()] == ["seed-5.safetensors"]
    first, second = weights(checkout, "flat/priors/ncp/seed-*/*.safetensors").values()
    assert not torch.equal(first["classifier.see_z.weight"], second["classifier.see_z.weight"])


def test_fewer_examples_are_spread_over_the_set():
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(10, 30).tolist() == list(range(10))
    assert leading(10, 4, 4).tolist() == [0, 2, 5, 7]
    assert leading(20, 8, 3).tolist() == [0, 5, 12, 2, 7, 10, 15, 17]  # the first three are spread too


def test_the_examples_of_colour_images_are_of_all_classes_whatever_their_order():
    """Classes take turns in a data set of ten folders: rows at even distances were of one or five of them."""

    def turns(kind, size=10_000):
        named = next(name for name, entry in DATASETS.items() if entry.kind == kind)
        return SimpleNamespace(name=named, size=lambda _: size)

    for count, first in ((200, 200), (500, 500), (5_000, 2_000), (20_000, 2_000)):
        rows = chosen_examples(turns("images"), count, first)
        assert len(rows) == len(rows.unique()) == min(count, 10_000)
        for some in (rows, rows[:first]):
            shares = torch.bincount(some % 10, minlength=10) / len(some)
            assert (shares - 0.1).abs().max().item() < 4 * (0.09 / len(some)) ** 0.5
    assert torch.equal(chosen_examples(turns("binary-images"), 200, 200), spread(10_000, 200))


def test_every_likelihood_says_its_samples_and_is_paired_with_the_base_at_the_same(finished):
    table = results.read(finished / "reports" / "results.csv", "")
    likelihoods = table[table.metric.str.startswith("loglik") & (table.prior != "data")]
    assert set(likelihoods.samples) == {1, 4}
    assert (likelihoods.n == 30).all()
    base = likelihoods[likelihoods.prior == "normal"].set_index(["experiment", "seed", "samples"]).value
    assert base.index.is_unique
    for kind, count in (("sampler", "proposals"), ("plugin", "normaliser")):
        values, gains = (
            likelihoods[likelihoods.metric == f"loglik{infix}-{kind}"].set_index(
                ["experiment", "prior", "seed", "samples", count]
            )
            for infix in ("", "-gain")
        )
        assert set(values.index.get_level_values(count)) == {5, 20}
        paired = values.value - [base[experiment, seed, size] for experiment, _, seed, size, _ in values.index]
        assert (paired - gains.value[paired.index]).abs().max() < 1e-5
    assert set(likelihoods[likelihoods.metric == "loglik"].prior) == {"normal", "gmm"}  # the exact ones
    assert set(table[table.metric.str.startswith("kl/")].prior) == {"normal"}
    assert not table.fingerprint.str.contains("None").any()


def test_a_prior_without_parameters_follows_the_one_below_it(done):
    """Samples of an amortised prior, what is put on it, and its likelihoods are made anew when the energy below is."""
    params = tiny_beyond()
    write_params(done, params)
    pipeline = Pipeline(done, Machine(workers=1))
    for stage in STAGES[:-1]:
        getattr(pipeline, stage)("deep")
    workspace = Workspace(done)
    paths = [
        workspace.samples("deep", "amortised", "ancestral", 0) / ALL_ROWS,
        workspace.samples("deep", "ncp-amortised", "langevin", 0) / ALL_ROWS,
        workspace.prior("deep", "ncp-amortised", 0, 0),
    ]
    before = [checkpoints.load(path, "")[0] for path in paths]
    params["experiments"]["deep"]["priors"]["evalp"]["learning_rate"] = 0.01
    write_params(done, params)
    pipeline.train_prior("deep")
    for prior, sampler in (("amortised", "ancestral"), ("ncp-amortised", "langevin")):
        with pytest.raises(UserError, match="belongs to another configuration"):
            Stored(Recipe(params, "deep", 0, done)).samples(prior, sampler)
    pipeline.sample("deep")
    for old, path in zip(before, paths, strict=True):
        new = checkpoints.load(path, "")[0]
        assert any(not torch.equal(old[name], values) for name, values in new.items() if name != "seconds")


@pytest.mark.parametrize(
    ("pattern", "stage", "what"),
    [
        ("vae/seed-0.safetensors", "train-vae", "the VAE"),
        ("priors/ncp/seed-0/k00.safetensors", "train-prior", "the prior ncp"),
        (f"samples/ncp+sir-20/seed-0/{ALL_ROWS}", "sample", "what sir-20 drew from ncp"),
    ],
)
def test_files_made_by_earlier_code_are_used_and_said_to_be(done, capsys, pattern, stage, what):
    """Outside DVC nothing would make them anew: a line says so, and their rows' fingerprints are not today's."""
    path = done / "artifacts" / "flat" / pattern
    tensors, document = checkpoints.load(path, "")
    old = Identity("flat", 0, document["config"], "earlier", document["precision"])
    kept = {
        key: document[key] for key in ("step", "seconds", "history", "held_out", "ended", "kept", "rows") if key in document
    }
    checkpoints.save(path, tensors, old, **kept)
    pipelines_stored._say_once.cache_clear()
    capsys.readouterr()
    pipeline = Pipeline(done, Machine(workers=1))
    table = results.read(pipeline.evaluate("flat"), "")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: flat: ")]
    assert said == [f"note: flat: {what} was made by earlier code; 'priorhole {stage} flat' makes it anew"]
    stale = results.stale_rows(table, fingerprints.expected(pipeline.config))
    assert set(stale) == {"", "code"}
    touched = table[(stale == "code") & (table.seed == 0)]
    assert (table[stale == "code"].seed == 0).all()
    assert set(touched.prior) <= {"normal", "gmm", "ncp", "ncp-gmm", "aggregate-posterior"}
    if stage == "sample":
        assert set(touched.sampler) == {"sir-20"}
    if stage == "train-prior":
        assert set(touched.prior) == {"ncp"}


def test_rows_of_another_configuration_are_told_from_todays(done):
    table = results.read(done / "reports" / "results.csv", "")
    table = table[table.experiment == "flat"]
    assert set(results.stale_rows(table, fingerprints.expected(Pipeline(done).config))) == {""}
    params = tiny()
    flat = params["experiments"]["flat"]
    flat["priors"]["ncp"]["learning_rate"] = 0.01
    flat["samplers"]["langevin"]["steps"] = 4
    del flat["priors"]["ncp-gmm"]
    write_params(done, params)
    stale = results.stale_rows(table, fingerprints.expected(Pipeline(done).config))
    expected = table.prior.isin(["ncp", "ncp-gmm"])
    assert (stale[expected] == "configuration").all()
    assert (stale[~expected] == "").all()


def test_files_made_in_another_precision_are_used_and_their_rows_say_so(checkout, monkeypatch):
    from runtime import hardware

    params = tiny()
    flat = params["experiments"]["flat"]
    flat["seeds"] = [0]
    flat["train"]["precision"] = flat["priors"]["ncp"]["precision"] = flat["samplers"]["sir-20"]["precision"] = "auto"
    write_params(checkout, params)
    pipeline = Pipeline(checkout, Machine(workers=1))
    monkeypatch.setattr(hardware, "gains_from_bf16", lambda kind: True)
    for stage in STAGES[:-1]:
        getattr(pipeline, stage)("flat")
    monkeypatch.setattr(hardware, "gains_from_bf16", lambda kind: False)
    table = results.read(pipeline.evaluate("flat"), "")
    drawn = table[(table.sampler == "sir-20") & (table.prior == "ncp")]
    assert set(drawn.precision) == {"bf16"}
    assert set(table[table.metric.str.startswith("loglik")].precision) == {"fp32"}
    assert set(table[(table.metric == "train-seconds") & (table.prior == "normal")].precision) == {"bf16"}


def test_groups_that_a_prior_leaves_alone_keep_the_base(done):
    write_params(done, tiny_beyond())
    pipeline = Pipeline(done, Machine(workers=1))
    pipeline.train_prior("deep")
    stored = Stored(Recipe(read(done / "params.yaml"), "deep", 0, done))
    prior, below = stored.prior("evalp"), stored.prior("normal")
    context = stored.vae.start(4)
    for k in range(stored.vae.groups):
        z = below.base(k, context).draw(Noise(0, "z", k))
        same = torch.equal(prior.proposal(k, context).log_prob(z), below.base(k, context).log_prob(z))
        uncorrected = not prior.log_ratio(k, z, context).any()
        assert same == uncorrected == (k > 0)
        context = stored.vae.advance(k, context, z)


def test_rows_of_a_prior_that_leaves_the_first_group_alone_are_of_todays_code(done):
    params = tiny_beyond()
    params["experiments"]["deep"]["seeds"] = [0]
    priors = params["experiments"]["deep"]["priors"]
    params["experiments"]["deep"]["priors"] = {"normal": priors["normal"], "evalp": priors["evalp"] | {"groups": [1]}}
    write_params(done, params)
    table = run_all(done, ["deep"], Machine(workers=1))
    assert set(results.stale_rows(table, fingerprints.expected(Pipeline(done).config))) == {""}


def test_every_prior_beyond_the_papers_goes_through_all_stages(done):
    write_params(done, tiny_beyond())
    table = run_all(done, ["flat", "deep"], Machine(workers=1))
    measured = set(table[table.metric.str.fullmatch("loglik|loglik-sampler")].prior)
    assert measured >= {"evalp-gmm", "evalp", "amortised", "ncp-amortised"}
    emitted = table.metric.unique()
    assert [pattern for pattern in results.METRICS if not any(re.fullmatch(pattern, name) for name in emitted)] == []
    curve = table[(table.metric == "held-out/k00") & (table.prior == "evalp") & (table.seed == 0)]
    assert curve.step.is_monotonic_increasing
    assert curve.step.max() == 20
    follows = table[(table.prior == "amortised") & table.metric.str.startswith("plateaued/")]
    assert set(follows.metric) == {"plateaued/k00"}  # as well trained as the energy that it is put on, where that is trained


def test_a_group_that_the_model_has_not_is_refused(checkout):
    params = tiny_beyond()
    params["experiments"]["deep"]["priors"]["evalp"]["groups"] = [0, 3]
    write_params(checkout, params)
    with pytest.raises(UserError, match=r"priors.evalp.groups: .* groups 0 to 2"):
        Pipeline(checkout, Machine(workers=1)).fetch("deep")
