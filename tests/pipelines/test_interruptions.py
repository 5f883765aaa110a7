"""A signal ends every command and all that it started, in one line, with its exit code."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from started import PROGRESS, as_in_a_terminal, living, marked, survivors, wait_until
from tiny import tiny, write_params

from pipelines.stages import Pipeline
from pipelines.workspace import Workspace

pytestmark = pytest.mark.clusters

ROOT = Path(__file__).resolve().parents[2]
RUN = "from pipelines.cli import main; main()"
COMMANDS = {
    "list": "config",
    "fetch flat": "fetch",
    "train-vae flat": "train_vae",
    "train-prior flat": "train_prior",
    "sample flat": "sample",
    "evaluate flat": "evaluate",
    "publish flat": "publish",
    "report": "report",
    "compare": "verdicts",
}
HANGING = """
import pathlib, subprocess, time
from pipelines.stages import Pipeline

class Swallowing:
    def __del__(self):  # Python prints what is raised here, and goes on
        pathlib.Path("begun").touch()
        time.sleep(120)

def hang(*_):
    subprocess.Popen(["sleep", "120"], start_new_session=True)
    Swallowing()
    return []

setattr(Pipeline, {method!r}, property(hang) if {method!r} == "config" else hang)
"""


@contextmanager
def started(folder, command, script=RUN, ignored=()):
    """A command in a process group of its own: (process, mark). Signals are as in a terminal, but for those ignored."""

    def start():
        as_in_a_terminal()
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    environment, mark = marked()
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [sys.executable, "-c", script, *command.split()],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=start,
    )
    try:
        yield process, mark
    finally:
        survivors(mark, 0)
        process.communicate()


def ends(process, mark, number):
    """It ends within a generous time, with its code and one line, and leaves nothing behind."""
    output, errors = process.communicate(timeout=60)
    name = signal.Signals(number).name
    assert process.returncode == 128 + number, errors
    *before, last = errors.splitlines()
    assert last == f"stopped by {name}; the same command goes on from what was finished or saved"
    assert [line for line in before if not PROGRESS.match(line)] == []
    assert survivors(mark) == []
    return output


# Each signal at every second command, and both at one.
SIGNALS = [(command, (signal.SIGINT, signal.SIGTERM)[place % 2]) for place, command in enumerate([*COMMANDS, "report"])]


@pytest.mark.parametrize(("command", "number"), SIGNALS)
def test_every_command_ends_wherever_it_is(command, number, checkout):
    script = HANGING.format(method=COMMANDS[command]) + RUN
    with started(checkout, command, script) as (process, mark):
        wait_until(lambda: (checkout / "begun").exists() or process.poll() is not None)
        process.send_signal(number)
        ends(process, mark, number)


def long(checkout, place):
    """Trainings that no test waits for: four VAEs, and three groups of each of their priors."""
    params = tiny()
    priors, vaes = (tiny()["experiments"]["deep"] | {"seeds": [0, 1, 2, 3]} for _ in range(2))
    ncp = priors["priors"]["ncp"] | {"steps": 10_000_000}
    priors["priors"] = {"ncp": ncp, "normal": priors["priors"]["normal"]}
    vaes["train"] = vaes["train"] | {"steps": 10_000_000}
    params["experiments"] |= {"endless": vaes, "endless-priors": priors}
    write_params(checkout, params)
    pipeline = Pipeline(checkout)
    pipeline.fetch("endless")
    if place == "on Ray":
        pipeline.fetch("endless-priors")
        pipeline.train_vae("endless-priors")
        shutil.rmtree(Workspace(checkout).progress)


def reports(checkout):
    """The progress files of the tasks that have begun."""
    return [path for path in Workspace(checkout).progress.rglob("*.json") if "endless" in path.parent.name]


PLACES = {
    "in the driver": ("train-vae endless --workers 1", 1, 1),
    "in workers": ("train-vae endless --workers 2", 2, 3),
    "on Ray": ("train-prior endless-priors --workers 2 --shards 3", 2, 5),
}


@pytest.mark.parametrize(
    ("place", "whole_group", "number"),
    [  # a terminal signals the whole group, anything else the driver alone
        ("in the driver", False, signal.SIGTERM),
        ("in workers", False, signal.SIGINT),
        ("in workers", True, signal.SIGHUP),
        ("on Ray", False, signal.SIGINT),
    ],
)
def test_tasks_end_wherever_they_run_and_no_other_begins(place, whole_group, number, checkout):
    long(checkout, place)
    command, running, processes = PLACES[place]
    with started(checkout, command) as (process, mark):
        wait_until(lambda: len(reports(checkout)) >= running or process.poll() is not None)
        assert len(living(mark)) >= processes
        (os.killpg if whole_group else os.kill)(process.pid, number)
        ends(process, mark, number)
        assert len(reports(checkout)) == running


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_driver_leaves_no_worker(workers, checkout):
    long(checkout, "")
    with started(checkout, f"train-vae endless --workers {workers}") as (process, mark):
        wait_until(lambda: reports(checkout) or process.poll() is not None)
        process.kill()
        process.wait(60)
        assert survivors(mark) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_was_ignored_at_the_start_stays_ignored(number, checkout):
    script = HANGING.format(method="report") + RUN
    with started(checkout, "report", script, [number]) as (process, mark):
        wait_until(lambda: (checkout / "begun").exists() or process.poll() is not None)
        process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.send_signal(signal.SIGTERM)
        ends(process, mark, signal.SIGTERM)


def test_a_signal_while_the_command_is_imported_has_no_traceback(tmp_path):
    (tmp_path / "typer.py").write_text("import pathlib, time; pathlib.Path('begun').touch(); time.sleep(120)")
    script = "import runpy; runpy.run_module('pipelines', run_name='__main__')"  # this folder's typer comes first
    with started(tmp_path, "list", script) as (process, _):
        wait_until(lambda: (tmp_path / "begun").exists() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == -signal.SIGINT


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except (OSError, urllib.error.URLError):
        return False


def test_the_server_ends_with_all_its_processes(checkout):
    port = free_port()
    with started(checkout, f"ui --port {port}") as (process, mark):
        wait_until(lambda: answers(port) or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert survivors(mark, 20) == []


def test_a_port_in_use_is_one_line_before_anything_starts(checkout):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (checkout / "mlruns.db").unlink()
        with started(checkout, f"ui --port {port}") as (process, _):
            output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    assert errors == f"error: port {port} cannot be used (Address already in use); choose another one with --port\n"
    assert not (checkout / "mlruns.db").exists()
