"""Disks, users, streams, terminals and clusters as they are found: one line and exit code 2, or work that goes on."""

import json
import os
import pprint
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from started import PROGRESS
from tiny import tiny, write_params

from pipelines import fanout, stages
from pipelines.fanout import Machine, Task
from pipelines.stages import Pipeline
from runtime import progress
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PRIORHOLE = shlex.join([sys.executable, "-m", "pipelines"])
EACH = shlex.join([sys.executable, str(ROOT / "tests" / "support" / "each.py")])
STRANGER = (  # who may read everything, the interpreter in someone's home among it, and write nothing
    "setpriv --reuid 54321 --regid 54321 --clear-groups --inh-caps=+dac_read_search --ambient-caps=+dac_read_search "
)
WRITING = {
    "fetch flat": "data",
    "train-vae flat": "artifacts/flat/vae",
    "train-prior flat": "artifacts/flat/priors",
    "sample flat": "artifacts/flat/samples",
    "evaluate flat": "artifacts/flat/evaluation",
    "publish flat": "pretrained",
    "report": "reports/figures",
}
"""Commands that write, and a folder that each writes to."""
READING = ["compare", "list", "--help", "train-vae flat --dry-run"]


def usable(command):
    return subprocess.run(["bash", "-c", command], capture_output=True, check=False).returncode == 0


mounts = pytest.mark.skipif(not usable("unshare -m mount -t tmpfs none /mnt"), reason="mounting needs root")
strangers = pytest.mark.skipif(not usable(f"{STRANGER} true"), reason="to be another user needs root")


def run(command, folder, **environment):
    """A shell's command in a folder; PRIORHOLE stands for this project's. Variables that are None are unset."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PRIORHOLE_WORKERS": "1", **environment}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command.replace("PRIORHOLE ", f"{PRIORHOLE} ")],
        cwd=folder,
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        timeout=300,
    )


def refused(done):
    """The one line of a refusal."""
    lines = done.stderr.decode().splitlines()
    assert (done.returncode, len(lines)) == (2, 1), done.stderr.decode()
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A checkout in which every stage of one experiment is done."""
    folder, params = tmp_path_factory.mktemp("finished"), tiny()
    flat = params["experiments"]["flat"]
    flat["seeds"], flat["priors"] = [0], {name: flat["priors"][name] for name in ("normal", "ncp")}
    params["experiments"], params["run"] = {"flat": flat}, ["flat"]
    write_params(folder, params)
    (folder / "reports").mkdir()
    for name in ("targets.yaml", "tables.yaml"):
        shutil.copy(ROOT / "reports" / name, folder / "reports")
    pipeline = Pipeline(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.tracking, "stage", lambda *_: nullcontext())
        patch.setattr(stages.tracking, "record", lambda *_: None)
        for stage in ("fetch", "train_vae", "train_prior", "sample", "evaluate", "publish"):
            getattr(pipeline, stage)("flat")
        pipeline.report()
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def outcomes(pairs, first="", by=""):
    """What each command of ``pairs`` of a folder and a command comes to, after a script, run ``by`` somebody."""
    script = f"{first}exec {by}{EACH} {shlex.quote(json.dumps([(str(folder), command) for folder, command in pairs]))}"
    done = run(f"unshare -m bash -c {shlex.quote(script)}" if "mount" in first else script, "/")
    assert done.returncode == 0, done.stderr.decode()
    return {
        command: subprocess.CompletedProcess(command, code, output.encode(), errors.encode())
        for (_, command), (code, output, errors) in zip(pairs, json.loads(done.stdout), strict=True)
    }


def writes_nothing(found, reason):
    """Commands that only read do so; the others are refused for a reason."""
    for command in READING:
        assert (command, found[command].returncode, found[command].stderr) == (command, 0, b"")
    for command in WRITING:
        assert reason in refused(found[command]), command


@mounts
def test_a_read_only_file_system(finished):
    here = shlex.quote(str(finished))
    first = f"mount --bind {here} {here} && mount -o remount,ro,bind {here} && "
    writes_nothing(outcomes([(finished, command) for command in [*WRITING, *READING]], first), "(Read-only file system)")


@strangers
def test_a_folder_of_another_user(finished):
    pairs = [(finished, command) for command in [*WRITING, *READING]]
    writes_nothing(outcomes(pairs, by=STRANGER), "(Permission denied)")


@strangers
def test_one_output_of_another_user_is_found_before_the_work(finished, tmp_path):
    pairs, before = [], {}
    for place, (command, folder) in enumerate(WRITING.items()):
        copy = shutil.copytree(finished, tmp_path / str(place))
        shutil.rmtree(copy / folder)
        (copy / folder).mkdir()
        pairs.append((copy, command))
        before[copy] = sorted(copy.rglob("*"))
        run(f"chown -R 54321:54321 . && chown -R root {folder} && chmod 755 {folder}", copy)
    found = outcomes(pairs, by=STRANGER)
    for copy, command in pairs:
        assert WRITING[command] in refused(found[command])
        assert sorted(copy.rglob("*")) == before[copy]


def on_full_disks(finished, tmp_path, commands):
    """What commands come to, each on a full disk of its own; from it was removed, before, what they map to."""
    first = ""
    for place, removed in enumerate(commands.values()):
        disk = tmp_path / str(place)
        disk.mkdir()
        here, there = shlex.quote(str(finished)), shlex.quote(str(disk))
        first += f"mount -t tmpfs -o size=16m none {there} && cp -r {here}/. {there} && cd {there} && "
        first += f"rm -rf {removed} && {{ (cat /dev/zero > filler; true) 2> /dev/null; }} && "
    return outcomes([(tmp_path / str(place), command) for place, command in enumerate(commands)], first)


@mounts
def test_a_full_disk(finished, tmp_path):
    removed = {command: f"{folder} reports/results.csv" for command, folder in WRITING.items()}
    for done in on_full_disks(finished, tmp_path, removed).values():
        assert "no space left on the device; free some and run the same command again" in refused(done)


@mounts
def test_neither_progress_nor_a_record_stops_what_is_done_when_a_disk_is_full(finished, tmp_path):
    done_before = ["train-vae flat", "train-prior flat", "sample flat"]
    for done in on_full_disks(finished, tmp_path, dict.fromkeys(done_before, "")).values():
        (line,) = done.stderr.decode().splitlines()
        assert line.startswith("warning: this stage was not recorded in MLflow: ")
        assert done.returncode == 0


def test_progress_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").touch()
    progress.to_file(tmp_path / "file" / "task.json")(1, 1, "")
    assert (tmp_path / "file").is_file()


def test_a_lock_that_cannot_be_made(copy):
    shutil.rmtree(copy / "artifacts" / ".locks")
    (copy / "artifacts" / ".locks").touch()
    locking = ["fetch flat", "train-vae flat", "train-prior flat", "sample flat", "evaluate flat"]
    for done in outcomes([(copy, command) for command in locking]).values():
        assert "artifacts/.locks" in refused(done)


def test_a_folder_that_is_gone(tmp_path):
    done = run("mkdir gone && cd gone && rmdir ../gone && PRIORHOLE list", tmp_path)
    assert "the current folder is gone" in refused(done)


@pytest.mark.parametrize("buffered", [None, "1"])
def test_output_that_is_abandoned_or_refused(buffered, finished):
    def ended(shell):
        return run(shell, finished, PYTHONUNBUFFERED=buffered)

    abandoned = ended("PRIORHOLE compare | true")
    assert (abandoned.returncode, abandoned.stdout, abandoned.stderr) == (0, b"", b"")
    assert "standard output cannot be written (No space left on device)" in refused(ended("PRIORHOLE compare > /dev/full"))


def test_streams_that_are_closed_or_full(finished):
    def ended(shell):
        done = run(shell, finished, PYTHONUNBUFFERED=None)
        return done.returncode, done.stdout, done.stderr

    usual = ended("PRIORHOLE list")
    assert usual[0] == 0
    assert ended("PYTHONIOENCODING=ascii PRIORHOLE list | true") == (0, b"", b"")
    assert ended("PRIORHOLE list >&-") == (0, b"", b"")
    assert ended("PRIORHOLE list <&- 2>&-") == usual
    assert ended("PRIORHOLE list 2> /dev/full") == usual


@pytest.mark.parametrize("stream", ["2>&-", "2> /dev/full", "2> >(true)"])
def test_an_error_that_nobody_can_see_is_still_an_exit_code(stream, finished):
    done = run(f"PRIORHOLE fetch nothing {stream}", finished)
    assert (done.returncode, done.stdout) == (2, b"")


def test_a_claim_that_failed_is_told_from_a_terminal_that_cannot_show_it(copy):
    claim = {
        "id": "one", "paper": "NCP-VAE", "statement": "log Ẑ ± 1", "source": "a table", "standing": "seed",
        "experiment": "flat", "subject": {"prior": "ncp", "metric": "loglik-sampler", "proposals": 20}, "kind": "absolute",
        "direction": "higher", "value": 1e6, "tolerance": {"value": 0, "reason": "r"}, "criterion": {"after_result": "r"},
    }  # fmt: skip
    targets = copy / "reports" / "targets.yaml"
    for value, code, encoding in ((1e6, 1, "cp1252"), (-1e6, 0, "utf-8")):
        targets.write_text(yaml.safe_dump({"claims": [claim | {"value": value}]}))
        done = run("PRIORHOLE compare", copy, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr) == (code, b"")
        assert ("log Ẑ" if encoding == "utf-8" else r"log \u1e90") in done.stdout.decode(encoding)
        assert run("PRIORHOLE compare | true", copy).returncode == code
        assert run("PRIORHOLE compare >&-", copy).returncode == code


@strangers
@pytest.mark.parametrize("home", [None, "/nonexistent/home"])
def test_a_user_whom_the_system_does_not_know(home, copy):
    run("chown -R 54321:54321 . && rm -r artifacts/flat/priors", copy)
    nobody = {"HOME": home, "USER": None, "LOGNAME": None, "TMPDIR": None}
    for command in ("train-prior flat --shards 2", "report") if home is None else ("train-prior flat",):
        done = run(f"{STRANGER} PRIORHOLE {command}", copy, **nobody)
        said = [line for line in done.stderr.decode().splitlines() if not PROGRESS.match(line)]
        assert (done.returncode, said) == (0, [])


TASKS = [Task(name, pprint.pformat, {"width": 80}) for name in "ab"]
"""Tasks that another process can import, whatever its path is."""


def test_a_temporary_folder_too_long_for_sockets(tmp_path, monkeypatch):
    folder = tmp_path / ("job" * 40)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    found = fanout.run(TASKS, Machine(shards=2, workers=2), tmp_path / "progress")
    assert [text.startswith("<function") for text in found] == [True, True]


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "[::1]:{port}", "ray://127.0.0.1:{port}"])
def test_an_address_where_nothing_listens_is_found_before_ray_looks(address, tmp_path, monkeypatch):
    import socket

    import ray

    with socket.create_server(("127.0.0.1", 0)) as server:
        named = address.format(port=server.getsockname()[1])
    monkeypatch.setenv("RAY_ADDRESS", named)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray looks for minutes"))
    with pytest.raises(UserError) as error:
        fanout.run(TASKS, Machine(shards=2), tmp_path / "progress")
    assert str(error.value).startswith(f"no Ray cluster answers at RAY_ADDRESS={named} (")


def test_an_address_where_nobody_answers_is_found_before_ray_waits(tmp_path, monkeypatch):
    import socket

    import ray

    monkeypatch.setattr(fanout, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray waits for minutes"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        named = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", named)
        with pytest.raises(UserError) as error:
            fanout.run(TASKS, Machine(shards=2), tmp_path / "progress")
    assert str(error.value) == f"no Ray cluster answers at RAY_ADDRESS={named} (timed out); start one or unset it"


def test_ray_killing_for_memory_ends(copy):
    shutil.rmtree(copy / "artifacts" / "flat" / "priors")
    greedy = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100", "RAY_ADDRESS": None}
    done = run("PRIORHOLE train-prior flat --shards 2", copy, **greedy)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert done.stderr.decode().splitlines()[-1].startswith("error: there is too little memory for the shards")
