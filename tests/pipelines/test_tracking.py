"""Recording in MLflow: nothing is lost to a race or an odd path, and what fails costs seconds and one line."""

import contextlib
import json
import os
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from pipelines import tracking
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RUN = {0: {"loss": [[0, 1.5]]}}
SCRIPT = """
import sys
from pathlib import Path
from pipelines import tracking
with tracking.stage(Path.cwd(), "train-vae", sys.argv[1]):
    tracking.watch([], {}, None)
    tracking.record({0: {"loss": [[0, 1.5]]}})
"""


def record(folder, experiment):
    with tracking.stage(folder, "train-vae", experiment):
        tracking.watch([], {}, None)
        tracking.record(RUN)


def start(folder, experiment):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, experiment], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )


def recorded(folder):
    """Names of the experiments of the stages in a folder's store, sorted."""
    inside = "select run_uuid from tags where key = 'mlflow.parentRunId'"
    query = f"select e.name from runs r join experiments e using (experiment_id) where run_uuid not in ({inside}) order by 1"
    with sqlite3.connect(folder / "mlruns.db") as store:
        return [name for (name,) in store.execute(query)]


@pytest.fixture(autouse=True)
def no_store_named(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        os.environ.pop(name, None)


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """A store with one run, to be copied: to make one takes MLflow seconds."""
    folder = tmp_path_factory.mktemp("used")
    assert not start(folder, "flat").communicate(timeout=200)[1]
    return folder / "mlruns.db"


def warned(capsys):
    """What the one warning says."""
    (line,) = capsys.readouterr().err.splitlines()
    prefix = "warning: this stage was not recorded in MLflow: "
    assert line.startswith(prefix)
    return line.removeprefix(prefix)


def test_two_first_stages_at_once_are_both_recorded(tmp_path):
    stages = [start(tmp_path, name) for name in ("deep", "flat")]
    assert [stage.communicate(timeout=200)[1] for stage in stages] == ["", ""]
    assert recorded(tmp_path) == ["deep", "flat"]


@pytest.mark.parametrize("name", ["plain", "a?b", "a%20b", "a%3Fb", "a#b", "a b+c", "ä:@"])
@pytest.mark.parametrize("variable", [None, ""])
def test_the_store_lies_in_the_checkout_whatever_its_path(name, variable, used, tmp_path, monkeypatch, capsys):
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(used, folder / "mlruns.db")
    monkeypatch.chdir(folder)
    if variable is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    record(folder, "deep")
    assert not capsys.readouterr().err
    assert recorded(folder) == ["deep", "flat"]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert {path.name for path in folder.iterdir()} <= {"mlruns.db", "mlruns.db.lock"}


def test_an_experiment_deleted_in_the_ui_is_recorded_again_by_the_command_that_the_warning_names(used, tmp_path, capsys):
    import mlflow

    shutil.copy(used, tmp_path / "mlruns.db")
    client = mlflow.MlflowClient(tracking.store(tmp_path))
    client.delete_experiment(client.get_experiment_by_name("flat").experiment_id)
    record(tmp_path, "flat")
    says, _, command = warned(capsys).partition(": ")
    assert says == "its experiment flat was deleted there; to record it again"
    subprocess.run(command.replace("mlflow ", f"{shlex.quote(sys.executable)} -m mlflow "), shell=True, check=True)
    before = recorded(tmp_path)
    record(tmp_path, "flat")
    assert recorded(tmp_path) == [*before, "flat"]


@pytest.fixture
def silent():
    """The address of a server that takes connections and closes them without an answer, and a list of those."""
    server, taken = socket.create_server(("127.0.0.1", 0)), []

    def take():
        while True:
            try:
                connection = server.accept()[0]
            except OSError:
                return
            taken.append(connection)
            connection.close()

    threading.Thread(target=take, daemon=True).start()
    yield server.getsockname()[1], taken
    server.close()


def test_a_server_without_answers_is_asked_twice_at_most(silent, tmp_path, monkeypatch, capsys):
    port, taken = silent
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    record(tmp_path, "flat")
    warned(capsys)
    assert 1 <= len(taken) <= 2
    assert int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]) <= 30


@pytest.mark.parametrize("damage", ["text", "folder", "parent"])
def test_a_broken_store_is_tried_once(damage, tmp_path, monkeypatch, capsys):
    import mlflow.store.db.utils

    monkeypatch.setattr(mlflow.store.db.utils.time, "sleep", lambda _: pytest.fail("MLflow tries again"))
    path = tmp_path / "mlruns.db"
    if damage == "text":
        path.write_text("no database, whatever its name says, and longer than the header of one " * 20)
    elif damage == "folder":
        path.mkdir()
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/mlruns.db")
    record(tmp_path, "flat")
    assert "MLflow tries again" not in warned(capsys)


def test_a_stage_of_an_experiment_that_dvc_runs_in_a_copy_is_recorded_in_the_checkout(used, tmp_path):
    (tmp_path / "stage.py").write_text(SCRIPT)
    (tmp_path / "dvc.yaml").write_text(f"stages:\n  one:\n    cmd: {sys.executable} stage.py deep\n")
    (tmp_path / ".gitignore").write_text("mlruns*\n")
    shutil.copy(used, tmp_path / "mlruns.db")
    person = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = os.environ | person | {"PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1"}
    for command in ("git init -q", "{dvc} init -q", "git add .", "git commit -qm x", "{dvc} exp run --temp"):
        words = command.format(dvc=f"{shlex.quote(sys.executable)} -m dvc")
        subprocess.run(words, shell=True, cwd=tmp_path, env=environment, check=True, timeout=200)
    assert recorded(tmp_path) == ["deep", "flat"]


def watched(folder, done):
    """A task of seed 0 that has made so many of 10 steps."""
    path = folder / "0.json"
    curves = {"vae": {"loss": 1 / done}, "group 3": {"loss": 2.0}}
    path.write_text(json.dumps({"done": done, "total": 10, "note": "", "curves": curves, "pace": 3.0, "remaining": 1.0}))
    return tracking.Watched(path, 0, "ncp", 4)


def mirrored(folder, done, error=None, settings=None):
    """A stage that ends after so many steps, well or by an error."""
    with contextlib.suppress(UserError), tracking.stage(folder, "train-prior", "flat"):
        tracking.watch([watched(folder, done)], settings or {"steps": 10}, None)
        if error is not None:
            raise UserError(error)


def test_a_stage_that_failed_says_why_and_goes_on_in_the_same_run(used, tmp_path):
    import mlflow

    shutil.copy(used, tmp_path / "mlruns.db")
    client = mlflow.MlflowClient(tracking.store(tmp_path))

    def runs():
        identifier = client.get_experiment_by_name("flat").experiment_id
        found = client.search_runs([identifier], "tags.`dvc.stage` = 'train-prior@flat'", order_by=["start_time"])
        return {run.info.run_name: run for run in found}

    mirrored(tmp_path, 4, "the loss is not finite\nat step 4")
    failed = runs()
    assert {run.info.status for run in failed.values()} == {"FAILED"}
    assert failed["train-prior"].data.tags["mlflow.note.content"].startswith("the loss is not finite")
    mirrored(tmp_path, 4, settings={"steps": 20})  # another one, which ends well
    mirrored(tmp_path, 10)
    again = client.get_run(failed["train-prior seed 0"].info.run_id)
    assert again.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(again.info.run_id, "ncp/loss")]
    assert sorted(steps) == [3, 9]
    assert again.data.metrics["ncp/loss/k03"] == 2.0
    assert again.data.metrics["ncp/images-a-second"] == 12.0
    assert len(client.search_runs([again.info.experiment_id], "tags.`dvc.stage` = 'train-prior@flat'")) == 4


def test_a_run_whose_process_was_killed_is_ended_unless_it_is_gone_on_with(used, tmp_path):
    import mlflow

    shutil.copy(used, tmp_path / "mlruns.db")
    client = mlflow.MlflowClient(tracking.store(tmp_path))
    identifier = client.get_experiment_by_name("flat").experiment_id
    dead = f"{socket.gethostname()} {2**22} 1"
    tags = {"dvc.stage": "train-prior@flat", "priorhole.process": dead, "priorhole.settings": "other"}
    killed = client.create_run(identifier, tags=tags).info.run_id
    running = client.create_run(identifier, tags=tags | {"priorhole.process": process_of(os.getppid())}).info.run_id
    mirrored(tmp_path, 10)
    assert client.get_run(killed).info.status == "KILLED"
    assert client.get_run(running).info.status == "RUNNING"


def process_of(number):
    return f"{socket.gethostname()} {number} {psutil.Process(number).create_time():.0f}"
