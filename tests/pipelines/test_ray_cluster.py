"""Stage 2 on a simulated cluster of two nodes: the same classifiers, whatever is killed or taken away meanwhile."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from tiny import tiny, write_params

from pipelines.fanout import Machine
from pipelines.recipe import Recipe
from pipelines.stages import Pipeline
from pipelines.stored import Stored
from runtime import checkpoints

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes with a CPU each, named by RAY_ADDRESS; the second can be removed."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.second = cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def stage(checkout):
    """A checkout before stage 2, and the classifiers that an undisturbed stage 2 learns there, as digests."""
    params = tiny()
    del params["experiments"]["deep"]["seeds"][1]
    params["experiments"]["deep"]["priors"]["ncp"] |= {"steps": 100}  # long enough to be disturbed
    write_params(checkout, params)
    pipeline = Pipeline(checkout)
    for name in ("fetch", "train_vae", "train_prior"):
        getattr(pipeline, name)("deep")
    expected = digests(checkout)
    for path in (checkout / "artifacts" / "deep" / "priors" / "ncp").rglob("*.safetensors"):
        path.unlink()
    return Stored(Recipe(params, "deep", 0, checkout)), expected


def digests(folder):
    paths = sorted((folder / "artifacts" / "deep" / "priors" / "ncp").rglob("k*.safetensors"))
    return {path.name: checkpoints.load(path, "")[1]["digest"] for path in paths}


def test_two_nodes_learn_the_classifiers_that_one_process_learns(cluster, stage):
    stored, expected = stage
    Pipeline(stored.recipe.root, Machine(shards=3)).train_prior("deep")
    assert digests(stored.recipe.root) == expected


def workers(node):
    """Processes of a node that run a task now: children of its raylet, titled so by Ray."""
    raylet, found = node.all_processes["raylet"][0].process.pid, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title, parent = (folder / "cmdline").read_text(), int((folder / "stat").read_text().rsplit(")")[-1].split()[1])
        except OSError:
            continue
        if title.startswith("ray::_elsewhere") and parent == raylet:
            found.append(int(folder.name))
    return found


def progress(folder):
    """What the tasks have written of their progress so far; the folder comes and goes meanwhile."""
    try:
        return {path: path.read_text() for path in folder.rglob("*.json")}
    except FileNotFoundError:
        return None


def disturbed(cluster, stored, disturb):
    """Stage 2 in two shards, with ``disturb(worker)`` called once the second node's worker is training.

    The first node's worker is held until then: else it might do both shards before the second node's has started.
    """
    called = threading.Event()

    def wait():
        held, seen, deadline = [], None, time.monotonic() + 120
        while time.monotonic() < deadline and not called.is_set():
            for worker in set(workers(cluster.head_node)) - set(held):
                os.kill(worker, signal.SIGSTOP)
                held.append(worker)
                seen = None  # what it wrote before it was held says nothing of the second node's
            written = progress(stored.recipe.root / "artifacts" / ".progress")
            running = workers(cluster.second)
            if running and seen is not None and written != seen:
                disturb(running[0])
                called.set()
            seen = written
            time.sleep(0.02)
        for worker in held:
            os.kill(worker, signal.SIGCONT)

    waiting = threading.Thread(target=wait)
    waiting.start()
    Pipeline(stored.recipe.root, Machine(shards=2)).train_prior("deep")
    waiting.join()
    assert called.is_set(), "it ended before it could be disturbed"


def test_a_killed_worker_is_replaced(cluster, stage):
    stored, expected = stage
    disturbed(cluster, stored, lambda worker: os.kill(worker, signal.SIGKILL))
    assert digests(stored.recipe.root) == expected


def test_a_lost_node_is_survived(cluster, stage):
    stored, expected = stage
    disturbed(cluster, stored, lambda worker: cluster.remove_node(cluster.second, allow_graceful=False))
    assert digests(stored.recipe.root) == expected
