"""What an experiment would take, said before it is run: what can be counted is right, and nothing is left behind."""

import dataclasses
import json
from contextlib import suppress

import pytest
import torch
from tiny import tiny, write_params

from datasets.dataset import Dataset
from datasets.registry import spec
from models.conv_vae import ConvVAE
from pipelines import plan as planning
from pipelines.fanout import Machine
from pipelines.reporting.overview import overview, overviews
from pipelines.stages import Pipeline
from priors.trainer import TrainingBatches
from runtime.errors import UserError


def planned(folder, name, machine=None, **changes):
    """By stage, the plan of an experiment with some of its settings changed."""
    params = tiny()
    for key, value in changes.items():
        settings = params["experiments"][name]
        settings[key] = settings[key] | value if isinstance(value, dict) else value
    write_params(folder, params)
    found = Pipeline(folder, machine or Machine()).plan(name)
    return {stage.stage: stage for stage in found.stages}, found


@pytest.fixture
def quick(monkeypatch):
    """Measurements of one step each: here it matters what they are multiplied by."""
    monkeypatch.setattr(planning, "SECONDS", 0.02)
    monkeypatch.setattr(planning, "_starting", lambda: 0.0)


@pytest.fixture
def unit(quick, monkeypatch):
    """Every step of a training takes a second, and every call."""
    monkeypatch.setattr(planning, "_paced", lambda run, most=200: 1.0)
    monkeypatch.setattr(planning, "_timed", lambda call: 1.0)


def test_nothing_but_the_answer_is_left_behind(checkout, quick):
    params = tiny()
    write_params(checkout, params)
    before = {path: path.stat().st_mtime_ns for path in checkout.rglob("*")}
    pipeline = Pipeline(checkout)
    found, kept = pipeline.plan("deep"), pipeline.workspace.plan("deep")
    after = {path: path.stat().st_mtime_ns for path in checkout.rglob("*")}
    assert {path for path in after if after[path] != before.get(path)} == {*kept.parents[:2], kept}
    # And that is what `list` knows of it, until the settings are others.
    listed = {one.name: (one.hours, one.unit) for one in overviews(pipeline.workspace, pipeline.config)}
    assert listed == {"flat": (None, ""), "deep": (found.hours, "CPU")}
    params["experiments"]["deep"]["sample"]["images"] += 1
    write_params(checkout, params)
    changed = Pipeline(checkout)
    assert overview(changed.workspace, changed.config, "deep").hours is None


def test_tasks_and_disk_are_those_that_the_stages_come_to(done, quick):
    stages, found = planned(done, "deep")
    artifacts = done / "artifacts" / "deep"

    def files(folder):
        return list((artifacts / folder).rglob("*.safetensors"))

    assert stages["train-vae"].tasks == len(files("vae"))
    assert stages["sample"].tasks == len(files("samples"))
    assert stages["train-prior"].tasks * 3 == len(files("priors"))  # a task has three groups
    for stage, folder in (("train-vae", "vae"), ("sample", "samples")):
        taken = sum(path.stat().st_size for path in files(folder))
        assert stages[stage].disk < taken < stages[stage].disk + 20_000 * len(files(folder))  # and a header each
    assert stages["fetch"].disk == 0  # it is there
    assert found.missing == []


def test_time_is_steps_times_seeds(done, unit):
    stages, _ = planned(done, "flat", train={"steps": 70})
    assert stages["train-vae"].seconds == 2 * 70
    stages, _ = planned(done, "flat", train={"steps": 70}, seeds=[0, 1, 2])
    assert stages["train-vae"].seconds == 3 * 70
    stages, _ = planned(done, "flat", train={"steps": 70}, vae_seed=0)
    assert stages["train-vae"].seconds == 70


def test_a_trained_prior_or_the_results_say_how_many_steps_it_took(done, unit):
    ncp = tiny()["experiments"]["deep"]["priors"]["ncp"] | {"steps": 9_000}
    known = planned(done, "deep", priors={"ncp": ncp})[0]["train-prior"]
    (done / "artifacts" / "deep" / "priors").rename(done / "gone")
    assert planned(done, "deep", priors={"ncp": ncp})[0]["train-prior"].seconds == known.seconds
    (done / "reports" / "results.csv").unlink()
    at_most = planned(done, "deep", priors={"ncp": ncp})[0]["train-prior"]
    assert at_most.seconds / known.seconds == pytest.approx(9_000 / 30)


def test_what_another_experiment_shares_is_not_planned_for(done, unit):
    params = tiny()
    flat = params["experiments"]["flat"]
    own = {name: flat["priors"][name] for name in ("normal", "ncp")}
    own["gmm3"] = flat["priors"]["gmm"] | {"components": 3}
    params["experiments"]["other"] = flat | {"trained_in": "flat", "priors": own}
    write_params(done, params)

    def tasks():
        stages = {stage.stage: stage for stage in Pipeline(done).plan("other").stages}
        return [(stages[name].tasks, stages[name].seconds > 0) for name in ("train-vae", "train-prior")]

    assert tasks() == [(0, False), (len(flat["seeds"]), True)]
    (done / "artifacts" / "flat").rename(done / "gone")
    assert tasks() == [(len(flat["seeds"]), True), (len(own) * len(flat["seeds"]), True)]


@pytest.mark.parametrize(("workers", "walls"), [(1, 20.0), (2, 10.0), (8, 5.0)])
def test_days_are_those_of_the_workers_there_are_tasks_for(workers, walls):
    stage = planning.StagePlan("sample", 4, 20.0, 0, 0, 0, [])
    assert stage.wall(workers) == walls
    found = planning.Plan("x", "cpu", workers, [], [stage, dataclasses.replace(stage, tasks=1)], "CPU")
    assert found.hours == pytest.approx(40 / 3600)
    assert found.days == pytest.approx((walls + 20) / 86400)


def test_what_has_to_be_got_by_hand_is_named(checkout, quick):
    params = tiny()
    params["experiments"]["deep"] |= {"dataset": "celeba64", "seeds": [0]}
    params["experiments"]["deep"]["evaluate"] |= {"features": "pytorch-fid", "batch": 2, "examples": 2}
    params["experiments"]["deep"]["model"] |= {"likelihood": "normal"}
    params["experiments"]["deep"]["priors"] = {"normal": {"method": "normal", "samplers": ["ancestral"]}}
    params["run"] = ["flat"]
    write_params(checkout, params)
    found = Pipeline(checkout).plan("deep")
    assert any("celeba64" in line and spec("celeba64").licence in line for line in found.missing)
    assert any("pytorch-fid" in line for line in found.missing)
    assert f"missing: {found.missing[0]}" in found.text()
    assert json.loads(found.json())["missing"] == found.missing


def of_images(folder):
    """The measurements of a flat model of colour images."""
    params = tiny()
    params["experiments"]["flat"] |= {"dataset": "cifar10", "model": {"name": "conv-vae", "latents": 2, "widths": [4, 4, 4]}}
    params["experiments"]["flat"]["priors"]["ncp"]["checks"] = 1
    write_params(folder, params)
    measuring = planning._Measuring(Pipeline(folder)._seeds("flat")[1][0], Machine())
    measuring.seconds_per_flop = 0.0
    return measuring


@pytest.mark.parametrize("prepared", [False, True])
def test_a_step_of_stage_2_is_one_whose_images_were_encoded_before(prepared, checkout, quick, monkeypatch):
    measuring = of_images(checkout)
    encoded, encode = [], ConvVAE.encode
    monkeypatch.setattr(ConvVAE, "encode", lambda model, x: encoded.append(x) or encode(model, x))
    steps = []

    def ten_steps(run):
        def report(*_):
            steps.append(len(steps))
            if len(steps) == 10:
                raise StopIteration

        with suppress(StopIteration):
            run(report)
        return 1.0

    monkeypatch.setattr(planning, "_paced", ten_steps)
    if prepared:
        levels = torch.zeros(164, 3, 32, 32, dtype=torch.uint8)
        splits = dict(zip(("train", "validation", "test"), levels.split([160, 2, 2]), strict=True))
        measuring.stored.dataset = Dataset("cifar10", splits, "")
    measuring._prior_step("ncp", measuring.experiment.priors["ncp"], [])
    assert len(steps) == 10
    assert [len(x) for x in encoded if not x.is_meta] == [16]


def test_the_first_epochs_encode_and_the_others_do_not(checkout, unit, monkeypatch):
    measuring = of_images(checkout)
    options = measuring.experiment.priors["ncp"]  # sixteen images a step
    views, floats = measuring.stored.dataset.views, 2 * measuring.experiment.model.latents
    assert measuring._first_sight(options, 3) == (3, 4 * floats * views)
    assert measuring._first_sight(options, 10**6) == (views / 16, 4 * floats * views)
    monkeypatch.setattr(TrainingBatches, "KEPT_BYTES", 0)
    assert measuring._first_sight(options, 3) == (0, 0)


def test_an_unknown_experiment_is_refused(checkout):
    with pytest.raises(UserError, match="flat"):
        Pipeline(checkout).plan("falt")
