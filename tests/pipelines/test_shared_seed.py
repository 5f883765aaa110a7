"""Two workers share one seed's work in every stage: the same numbers. No two tasks, here or on two nodes, share a GPU."""

import os
import shutil
import sys
import time

import pytest
from outcome import made, numbers, same
from tiny import tiny, write_params

from pipelines import evaluation, fanout
from pipelines.fanout import Machine, Task
from pipelines.stages import Pipeline
from runtime import hardware, processes
from runtime.errors import UserError

DRAWN = ("samples", "measured", "evaluation")
"""Folders of what is made of trained files."""


@pytest.fixture
def sampled(done, stages_alone):
    """A checkout in which one process has done all of ``deep``, and what it made by file."""
    params = tiny()
    deep = params["experiments"]["deep"]
    deep |= {"seeds": [0], "sample": deep["sample"] | {"images": 130, "rows_per_file": 100}}
    write_params(done, params)
    for folder in DRAWN:
        shutil.rmtree(done / "artifacts" / "deep" / folder)
    pipeline = Pipeline(done)
    for stage in (pipeline.train_vae, pipeline.train_prior, pipeline.sample):  # what is of the other seed is moved aside
        stage("deep")
    table = numbers(pipeline.evaluate("deep"))
    return done, table, made(done)


def again(folder, machine):
    """Sampling and measuring once more, from nothing but what was trained."""
    for gone in DRAWN:
        shutil.rmtree(folder / "artifacts" / "deep" / gone)
    pipeline = Pipeline(folder, machine)
    pipeline.sample("deep")
    return numbers(pipeline.evaluate("deep"))


def test_two_workers_share_the_work_of_one_seed(sampled):
    folder, table, before = sampled
    assert again(folder, Machine(workers=2)).equals(table)
    assert same(before, made(folder))


def test_two_workers_that_start_anew_find_all_of_it_done(sampled, monkeypatch):
    folder, table, _ = sampled
    files = {path: path.stat().st_mtime_ns for path in (folder / "artifacts" / "deep").rglob("*.safetensors")}
    monkeypatch.setattr(fanout, "_in_processes", lambda calls, *_: [fanout._call(*call) for call in calls])
    pipeline = Pipeline(folder, Machine(workers=2))
    pipeline.sample("deep")
    monkeypatch.setattr(evaluation, "log_likelihoods", None)
    assert numbers(pipeline.evaluate("deep")).equals(table)
    assert {path: path.stat().st_mtime_ns for path in (folder / "artifacts" / "deep").rglob("*.safetensors")} == files


def seen_gpus(report, folder, name, seconds=1.0):
    """What a task sees of the GPUs; it stays until another one is there too, or for ``seconds``."""
    import ray

    if ray.is_initialized():
        here = ray.get_runtime_context()
        gpus = f"{','.join(here.get_accelerator_ids()['GPU'])} of {here.get_node_id()}"
    else:
        gpus = os.environ["CUDA_VISIBLE_DEVICES"]
    (folder / name).touch()
    until = time.monotonic() + seconds
    while len(list(folder.iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    return gpus


def gpu_tasks(folder, count=2):
    folder.mkdir()
    return [Task(f"task {n}", seen_gpus, {"folder": folder, "name": str(n), "seconds": 60.0}) for n in range(count)]


def test_workers_here_have_a_gpu_each(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "gpus", lambda: ["3", "5"])
    assert sorted(fanout.run(gpu_tasks(tmp_path / "a"), Machine(workers=8), tmp_path / "p")) == ["3", "5"]


@pytest.mark.parametrize(
    ("present", "gpus", "places"),
    [
        ([], 0, []),
        (["0", "1"], 0, ["0", "1"]),
        (["0", "1"], 0.5, ["0", "1", "0", "1"]),
        (["0", "1", "4", "5", "6"], 2, ["0,1", "4,5"]),
    ],
)
def test_places_of_workers(present, gpus, places):
    assert fanout._places(present, Machine(gpus=gpus)) == places


@pytest.mark.parametrize(
    ("present", "gpus", "tasks"), [([], 0.0, 8), (["0"], 0.0, 1), (["0"], 0.25, 4), (["0", "1"], 0.0, 2), ([], 1.0, 8)]
)
def test_as_many_tasks_are_planned_side_by_side_as_have_a_place(monkeypatch, present, gpus, tasks):
    """Cores of a machine with one GPU do not make its work any faster."""
    monkeypatch.setattr(hardware, "gpus", lambda: present)
    assert fanout.at_once(Machine(workers=8, gpus=gpus)) == tasks


def test_workers_are_of_the_cores_that_a_scheduler_left(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7})
    assert processes.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert processes.cores() == 2


def test_gpus_that_this_machine_lacks_are_said_at_once(tmp_path):
    with pytest.raises(UserError, match="each task asks for 1 GPU, this machine has 0"):
        fanout.run([Task("a", seen_gpus, {})], Machine(gpus=1), tmp_path)


def failing(report):
    raise UserError("it failed")


def test_what_comes_after_a_failed_task_is_not_begun(tmp_path):
    tasks = [Task("a", failing, {}), Task("b", seen_gpus, {}, after=[0]), Task("c", seen_gpus, {}, after=[1])]
    with pytest.raises(UserError, match="it failed"):
        fanout.run(tasks, Machine(workers=2), tmp_path / "p")


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes with a CPU and a logical GPU each, named by RAY_ADDRESS."""
    cluster = pytest.importorskip("ray.cluster_utils").Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1}
    )
    cluster.add_node(num_cpus=1, num_gpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


def test_tasks_of_a_gpu_each_share_none(cluster, tmp_path):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the nodes do not have the tests on their path
    # Each of two tasks waits for the other: both run at a time, on GPUs of different nodes.
    assert len(set(fanout.run(gpu_tasks(tmp_path / "gpus"), Machine(ray=True, gpus=1), tmp_path / "p"))) == 2
