"""Stage 2 on a simulated cluster of two nodes."""

import pytest
from tiny import tiny, write_params

from pipelines.fanout import Machine
from pipelines.stages import Pipeline
from pipelines.work import Seeded
from runtime import checkpoints

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes with a CPU each, named by RAY_ADDRESS."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def stage(checkout):
    """A checkout before stage 2, and the classifiers that an undisturbed stage 2 learns there, as digests."""
    params = tiny()
    del params["experiments"]["deep"]["seeds"][1]
    write_params(checkout, params)
    pipeline = Pipeline(checkout)
    for name in ("fetch", "train_vae", "train_prior"):
        getattr(pipeline, name)("deep")
    expected = digests(checkout)
    for path in (checkout / "artifacts" / "deep" / "priors" / "ncp").rglob("*.safetensors"):
        path.unlink()
    return Seeded(params, "deep", 0, checkout), expected


def digests(folder):
    paths = sorted((folder / "artifacts" / "deep" / "priors" / "ncp").rglob("k*.safetensors"))
    return {path.name: checkpoints.load(path, "")[1]["digest"] for path in paths}


def test_two_nodes_learn_the_classifiers_that_one_process_learns(cluster, stage):
    at, expected = stage
    Pipeline(at.root, Machine(shards=3)).train_prior("deep")
    assert digests(at.root) == expected
