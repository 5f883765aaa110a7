import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from filelock import FileLock
from tiny import tiny, write_params

ROOT = Path(__file__).resolve().parents[2]


def shared(tmp_path_factory, name, make):
    """A folder that one of the test processes makes, once, and that all of them copy."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not Path(f"{folder}.made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            Path(f"{folder}.made").touch()
    return folder


def furnish(folder):
    write_params(folder, tiny())
    (folder / "reports").mkdir()
    for name in ("targets.yaml", "tables.yaml"):
        shutil.copy(ROOT / "reports" / name, folder / "reports")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An MLflow store without runs: to make one takes MLflow longer than most tests."""

    def make(folder):
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        SqlAlchemyStore(f"sqlite:///{folder}/mlruns.db", (folder / "mlruns").as_uri())

    return shared(tmp_path_factory, "store", make) / "mlruns.db"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, store):
    """A checkout in which every stage of both tiny experiments is done, and the report."""

    def make(folder):
        from metrics.features import OwnClassifier
        from pipelines.stages import Pipeline

        furnish(folder)
        shutil.copy(store, folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OwnClassifier, "steps", 20)
            patch.chdir(folder)
            pipeline = Pipeline(folder)
            for name in ("flat", "deep"):
                for stage in ("fetch", "train_vae", "train_prior", "sample", "evaluate"):
                    getattr(pipeline, stage)(name)
            pipeline.report()

    return shared(tmp_path_factory, "finished", make)


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """The current folder, and features that take no time to train."""
    from metrics.features import OwnClassifier

    monkeypatch.setattr(OwnClassifier, "steps", 20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def checkout(begun, store):
    """A folder that looks like a checkout with tiny experiments; it is the current folder."""
    furnish(begun)
    shutil.copy(store, begun)
    return begun


@pytest.fixture
def done(begun, finished):
    """A copy of ``finished`` to change; it is the current folder."""
    return shutil.copytree(finished, begun, dirs_exist_ok=True)


@pytest.fixture
def stages_alone(monkeypatch):
    """Stages without their mirror in MLflow and without the check of shapes before them."""
    from pipelines import blueprint, tracking

    monkeypatch.setattr(tracking, "stage", lambda *_: nullcontext())
    monkeypatch.setattr(tracking, "record", lambda *_: None)
    monkeypatch.setattr(blueprint, "check", lambda *_: None)
