"""Every stage on a simulated cluster of two nodes: the same numbers, whatever is killed or taken away meanwhile."""

import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from outcome import made, numbers, same
from tiny import tiny, write_params

from pipelines.fanout import Machine
from pipelines.stages import Pipeline
from runtime import checkpoints
from runtime.errors import UserError

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

pytestmark = pytest.mark.clusters

SOON = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
"""A node that refuses connections is given up after about a second, not fifteen; one that is slow is still waited for."""


@pytest.fixture(scope="module")
def nodes():
    """Two nodes with a CPU each; the second can be removed, if another is put in its place."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": SOON})
    cluster.second = cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def cluster(nodes, monkeypatch):
    """They are named by RAY_ADDRESS."""
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    return nodes


@pytest.fixture
def stages(done, stages_alone):
    """A checkout where one process did every stage of ``deep``, with more to do in each; what it made, and its table."""
    params = tiny()
    deep = params["experiments"]["deep"]
    deep["train"]["steps"] = 150
    deep["priors"]["ncp"]["steps"] = 100
    deep |= {"sample": deep["sample"] | {"images": 60, "rows_per_file": 20, "batch": 5}}
    write_params(done, params)
    table = None
    for stage in STAGES:
        clear(done, stage)
        table = getattr(Pipeline(done), stage)("deep")
    return done, made(done), numbers(table)


STAGES = {"train_vae": ["vae"], "train_prior": ["priors"], "sample": ["samples"], "evaluate": ["measured", "evaluation"]}
"""And what each makes, of an experiment's artifacts."""


def clear(folder, stage):
    for output in STAGES[stage]:
        shutil.rmtree(folder / "artifacts" / "deep" / output)


TOGETHER = "ray::RayTrainWorker"


def workers(node, title="ray::_elsewhere"):
    """Processes of a node that run a task now: children of its raylet, titled so by Ray."""
    raylet, found = node.all_processes["raylet"][0].process.pid, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, parent = (folder / "cmdline").read_text(), int((folder / "stat").read_text().rsplit(")")[-1].split()[1])
        except OSError:
            continue
        if name.startswith(title) and parent == raylet:
            found.append(int(folder.name))
    return found


def progress(folder):
    """What the tasks have written of their progress so far; the folder comes and goes meanwhile."""
    try:
        return {path: path.read_text() for path in folder.rglob("*.json")}
    except FileNotFoundError:
        return None


def disturbed(cluster, folder, stage, *disturbances):
    """A stage, with each of ``disturbances(worker)`` called in turn once the second node's worker is at work.

    The first node's worker is held until then: else it might do everything before the second node's has started.
    """
    left = list(disturbances)
    over = threading.Event()

    def wait():
        held, seen = [], None
        while left and not over.is_set():
            for worker in set(workers(cluster.head_node)) - set(held):
                os.kill(worker, signal.SIGSTOP)
                held.append(worker)
                seen = None  # what it wrote before it was held says nothing of the second node's
            written = progress(folder / "artifacts" / ".progress")
            running = workers(cluster.second)
            if running and seen is not None and written != seen:
                left.pop(0)(running[0])
            seen = written
            time.sleep(0.02)
        for worker in held:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)

    waiting = threading.Thread(target=wait)
    waiting.start()
    try:
        return getattr(Pipeline(folder, Machine(ray=True, shards=2)), stage)("deep")
    finally:
        over.set()
        waiting.join()
        assert not left, "it ended before it could be disturbed"


@pytest.mark.timeout(1200)  # four stages, each disturbed twice
def test_every_stage_outlives_a_killed_worker_and_a_lost_node(stages, cluster):
    folder, expected, table = stages
    found = None
    for stage in STAGES:
        clear(folder, stage)
        found = disturbed(
            cluster,
            folder,
            stage,
            lambda worker: os.kill(worker, signal.SIGKILL),
            lambda _: cluster.remove_node(cluster.second, allow_graceful=False),
        )
        cluster.second = cluster.add_node(num_cpus=1)
    assert same(expected, made(folder))
    assert numbers(found).equals(table)


def together(cluster, folder, disturb):
    """Stage 1 by a process on each node, of which ``disturb`` is called with one once there is progress."""

    def wait():
        while not (processes := workers(cluster.second, TOGETHER)) or not progress(folder / "artifacts" / ".progress"):
            time.sleep(0.02)
        disturb(processes[0])

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    Pipeline(folder, Machine(ray=True, processes=2)).train_vae("deep")
    waiting.join(1)
    assert not waiting.is_alive(), "it ended before it could be disturbed"


@pytest.fixture
def fetched(checkout):
    """A checkout before stage 1 of ``deep``, of one seed."""
    params = tiny()
    params["experiments"]["deep"] |= {"seeds": [0]}
    params["experiments"]["deep"]["train"]["steps"] = 150
    write_params(checkout, params)
    Pipeline(checkout).fetch("deep")
    return checkout, params


def test_two_processes_train_a_vae_and_outlive_one_of_them(fetched, cluster):
    folder, _ = fetched
    path = folder / "artifacts" / "deep" / "vae" / "seed-0.safetensors"
    Pipeline(folder).train_vae("deep")
    alone = checkpoints.load(path, "")[1]["history"]
    clear(folder, "train_vae")
    together(cluster, folder, lambda process: os.kill(process, signal.SIGKILL))
    history = checkpoints.load(path, "")[1]["history"]
    assert [step for step, _ in history] == [step for step, _ in alone]
    assert all(abs(loss - other) < 1e-3 for (_, loss), (_, other) in zip(history, alone, strict=True))


def test_errors_of_several_processes_are_said_in_one_line(fetched, cluster):
    folder, params = fetched
    with pytest.raises(UserError, match="4 processes ask for 4 CPU, the cluster has 2; lower --threads or --processes"):
        Pipeline(folder, Machine(ray=True, processes=4)).train_vae("deep")
    with pytest.raises(UserError, match="a batch of 16 cannot be shared equally by 3 processes"):
        Pipeline(folder, Machine(ray=True, processes=3)).train_vae("deep")
    params["experiments"]["deep"]["train"] |= {"learning_rate": 1e30, "clip": None}
    write_params(folder, params)
    with pytest.raises(UserError, match="is not finite at step"):
        Pipeline(folder, Machine(ray=True, processes=2)).train_vae("deep")
