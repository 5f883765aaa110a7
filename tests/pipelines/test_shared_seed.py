"""Two workers, or two nodes, share one seed's work in every stage: the same numbers, and no two tasks share a GPU."""

import shutil

import pytest
import torch
from tiny import tiny, write_params

from metrics.features import OwnClassifier
from pipelines import blueprint, fanout, results, tracking
from pipelines.fanout import Machine
from pipelines.stages import Pipeline
from runtime import checkpoints


@pytest.fixture
def sampled(checkout, monkeypatch):
    """A checkout in which one process has done all of ``deep``, and what it made by file."""
    monkeypatch.setattr(OwnClassifier, "steps", 5)
    monkeypatch.setattr(tracking, "record", lambda *_: None)
    monkeypatch.setattr(blueprint, "check", lambda *_: None)
    params = tiny()
    deep = params["experiments"]["deep"]
    deep |= {"seeds": [0], "sample": deep["sample"] | {"images": 130, "rows_per_file": 100}}
    write_params(checkout, params)
    pipeline = Pipeline(checkout)
    for stage in ("fetch", "train_vae", "train_prior", "sample"):
        getattr(pipeline, stage)("deep")
    table = numbers(pipeline.evaluate("deep"))
    return checkout, table, made(checkout)


def made(folder):
    paths = [*(folder / "artifacts" / "deep").rglob("*.safetensors"), *(folder / "data" / "features").rglob("*.safetensors")]
    found = {}
    for path in paths:
        tensors = checkpoints.load(path, "")[0]
        tensors.pop("seconds", None)
        found[path.relative_to(folder)] = tensors
    return found


def numbers(path):
    table = results.read(path, "")
    return table[~table.metric.str.contains("seconds")].drop(columns=["seconds", "revision"]).reset_index(drop=True)


def again(folder, machine):
    """Sampling and measuring once more, from nothing but what was trained."""
    for gone in ("samples", "evaluation", "measured"):
        shutil.rmtree(folder / "artifacts" / "deep" / gone)
    pipeline = Pipeline(folder, machine)
    pipeline.sample("deep")
    return numbers(pipeline.evaluate("deep"))


def test_two_workers_share_the_work_of_one_seed(sampled):
    folder, table, before = sampled
    assert again(folder, Machine(workers=2)).equals(table)
    after = made(folder)
    assert after.keys() == before.keys()
    assert all(
        torch.equal(tensor, after[path][name]) for path, tensors in before.items() for name, tensor in tensors.items()
    )


def test_two_workers_that_start_anew_find_all_of_it_done(sampled, monkeypatch):
    folder, table, _ = sampled
    files = {path: path.stat().st_mtime_ns for path in (folder / "artifacts" / "deep").rglob("*.safetensors")}
    monkeypatch.setattr(fanout, "_in_processes", lambda calls, *_: [fanout._call(*call) for call in calls])
    pipeline = Pipeline(folder, Machine(workers=2))
    pipeline.sample("deep")
    assert numbers(pipeline.evaluate("deep")).equals(table)
    assert {path: path.stat().st_mtime_ns for path in (folder / "artifacts" / "deep").rglob("*.safetensors")} == files
