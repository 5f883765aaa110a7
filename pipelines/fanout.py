"""Run tasks: here, in processes side by side, or as Ray tasks on this machine or a cluster.

Seeds, shards of groups, files of rows and blocks of likelihoods are the axes of fan-out. Every task writes its own files and
draws its own randomness, so where it runs never changes what it makes. A task begins once those that it comes after have
ended, and not before. Where there are GPUs, tasks run in processes of their own, each of which sees its own GPUs alone; the
process that shares the tasks out uses none.
"""

import json
import logging
import math
import os
import pickle
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import hardware, interruption, processes, progress
from runtime.errors import UserError, first_line
from runtime.identity import ROOT

POLL_SECONDS = 0.5
LINE_SECONDS = 15.0
PATIENCE_SECONDS = 10.0
RETRIES = 3
"""How often what Ray runs is begun again, where its worker or its node was lost."""
ROWS_SHOWN = 20
"""Bars of more tasks are shown while these run."""
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # with no settings (RFC 9113, 3.4)
UNIX_BYTES = 103  # of a socket's path; Linux allows four more
SOCKET_BYTES = 70  # of that, /ray/session_2026-11-25_09-41-45_788082_4194304/sockets/plasma_store and a little more


@dataclass(frozen=True)
class Machine:
    """Where tasks may run. None of it enters a result, but ``threads`` and ``processes`` can change its last bits.

    Attributes:
        threads: CPU threads of each task, or of each of its processes.
        workers: tasks side by side on this machine.
        shards: parts into which the groups of a prior are dealt; more than one starts Ray.
        processes: how many train one VAE together; more than one start Ray.
        gpus: GPUs of each task, or of each of its processes; a part of one lets several tasks share it. 0: one where this
            machine has GPUs, none on Ray.
        ray: whether tasks go to Ray even where there is one shard.
    """

    threads: int = 1
    workers: int = 1
    shards: int = 1
    processes: int = 1
    gpus: float = 0.0
    ray: bool = False

    @property
    def on_ray(self) -> bool:
        """Whether tasks are Ray's."""
        return self.ray or self.shards > 1 or self.processes > 1

    @property
    def shares(self) -> bool:
        """Whether more than one task can run at a time."""
        return self.on_ray or self.workers > 1


@dataclass(frozen=True)
class Task:
    """``function(report, **arguments)``; the function is a module's, and it and its arguments can be pickled.

    ``after`` are the positions, in the list of tasks, of earlier ones whose files it reads. Where ``processes`` is more than
    one, the function is called by so many at a time, in a process group of torch.distributed; the first one's report and
    result count.
    """

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    after: Sequence[int] = ()
    processes: int = 1


def progress_file(folder: Path, index: int) -> Path:
    """What the task of that position in the list writes its progress to."""
    return folder / f"{index}.json"


def run(tasks: Sequence[Task], machine: Machine, folder: Path) -> list[Any]:
    """Run all tasks and return their results in order.

    Args:
        tasks: each listed behind those that it comes after.
        machine: where and how many at a time.
        folder: progress files are kept there meanwhile.

    Raises:
        UserError: from a task, once the others have ended; or a worker was killed; or the cluster lacks the GPUs.
    """
    shutil.rmtree(folder, ignore_errors=True)
    calls = [(task, progress_file(folder, index), machine.threads) for index, task in enumerate(tasks)]
    places = [] if machine.on_ray else _places(hardware.gpus(), machine)
    with _shown([(task.name, path) for task, path, _ in calls]):
        if machine.on_ray:
            return _on_ray(calls, machine)
        if not places and (len(tasks) == 1 or machine.workers == 1):
            return [_call(*call) for call in calls]
        return _in_processes(calls, machine.workers, places)


def at_once(machine: Machine) -> int:
    """How many tasks run side by side on a machine: of a cluster, or with GPUs that are not here, as many as asked for."""
    present = hardware.gpus()
    places = [] if machine.on_ray or machine.gpus > len(present) else _places(present, machine)
    return min(machine.workers, len(places)) if places else machine.workers


def _places(present: Sequence[str], machine: Machine) -> list[str]:
    """What each worker of this machine is to see of its GPUs: whole ones of its own, or its part of one.

    Raises:
        UserError: a task asks for more GPUs than there are.
    """
    wanted = machine.gpus or float(bool(present))
    if wanted > len(present):
        raise UserError(f"each task asks for {wanted:g} GPU, this machine has {len(present)}; lower --gpus")
    if wanted <= 0:
        return []
    if wanted < 1:
        return [gpu for _ in range(int(1 / wanted)) for gpu in present]
    each = math.ceil(wanted)
    return [",".join(present[first : first + each]) for first in range(0, len(present) - each + 1, each)]


def _call(task: Task, path: Path, threads: int, gpus: float = 0.0, *_: Any) -> Any:
    try:
        if task.processes > 1:
            found = _by_several(task, path, threads, gpus)
        else:
            found = _run_here(task, progress.to_file(path), threads)
    except BaseException:
        _mark(path, "failed")
        raise
    _mark(path, "done")
    return found


def _run_here(task: Task, report: progress.Report, threads: int) -> Any:
    hardware.reproducible(threads)
    hardware.keep_freed_memory()
    return task.function(report, **task.arguments)


def _by_several(task: Task, path: Path, threads: int, gpus: float) -> Any:
    """A task of several processes, which Ray Train places and, if one of them is lost, starts anew together."""
    from ray import train
    from ray.train.torch import TorchTrainer

    each = {"CPU": float(threads)} | ({"GPU": gpus} if gpus else {})
    trainer = TorchTrainer(
        _by_one_of_several,
        train_loop_config={"task": task, "path": path, "threads": threads},
        scaling_config=train.ScalingConfig(num_workers=task.processes, use_gpu=gpus > 0, resources_per_worker=each),
        run_config=train.RunConfig(
            name=path.stem,
            storage_path=str(path.parent.resolve()),
            failure_config=train.FailureConfig(max_failures=RETRIES),
        ),
    )
    try:
        trainer.fit()
    except train.TrainingFailedError as error:
        if not _outcome(path).exists():
            raise UserError(
                f"{task.name}: one of its processes was lost repeatedly ({first_line(error)}); "
                "run the same command again: it goes on from its checkpoint"
            ) from error
    found, known = pickle.loads(_outcome(path).read_bytes())
    if known is not None:
        raise known
    return found


def _by_one_of_several(config: dict[str, Any]) -> None:
    """What each of the processes does."""
    import torch
    from ray import train
    from ray.train.torch import get_device

    task, path = config["task"], config["path"]
    if _outcome(path).exists():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(get_device())  # Ray lets the processes of a node see all of their GPUs
    first = train.get_context().get_world_rank() == 0
    try:
        found = _run_here(task, progress.to_file(path) if first else progress.silent, config["threads"])
    except UserError as error:
        _outcome(path).write_bytes(pickle.dumps((None, error)))
        torch.distributed.destroy_process_group()  # who waits for this one fails, and is begun again to end above
    else:
        if first:
            _outcome(path).write_bytes(pickle.dumps((found, None)))


def _outcome(path: Path) -> Path:
    """What a task of several processes came to: the result of the first, or an error that a retry would bring again."""
    return path.with_suffix(".outcome")


def _mark(path: Path, how: str) -> None:
    """Tell whoever shows the progress how a task ended."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(f".{how}").touch()


def _elsewhere(*call: Any) -> Any:
    """:func:`_call` in a process that does nothing else: what one task has loaded, the next may find there."""
    processes.OF_ONE_RUN = True
    return _call(*call)


def _in_processes(calls: Sequence[tuple[Task, Path, int]], workers: int, places: Sequence[str] = ()) -> list[Any]:
    """The calls, a worker each; as many workers as places if there are such."""
    workers = min(workers, len(places)) if places else workers
    with processes.pool(workers, places[:workers]) as pool:
        futures: dict[int, Future] = {}
        waiting = dict(enumerate(calls))
        while True:
            ended = {index for index, future in futures.items() if future.done()}
            lost = {index for index in ended if futures[index].exception() is not None}
            ready = [index for index, call in waiting.items() if ended.issuperset(call[0].after)]
            with interruption.left_to_this_process():  # workers are started as tasks are submitted
                for index in ready:
                    call = waiting.pop(index)
                    cause = next((before for before in call[0].after if before in lost), None)
                    futures[index] = futures[cause] if cause is not None else pool.submit(_elsewhere, *call)
            running = {future for future in futures.values() if not future.done()}
            if not running and not waiting:
                return [futures[index].result() for index in range(len(calls))]
            if running:
                wait(running, return_when=FIRST_COMPLETED)


def _on_ray(calls: Sequence[tuple[Task, Path, int]], machine: Machine) -> list[Any]:
    address = os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_task_oom_retries", "3")  # left alone, a shard that is too large is killed and begun for ever
    if not address:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())  # Ray would write one into the home folder
    import ray

    with ExitStack() as folder:
        try:
            _require_listener(address)
            ray.init(
                address=address or "local",  # by default Ray would join any cluster that it finds on this machine
                num_cpus=None if address else max(machine.workers, machine.processes) * machine.threads,
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=None if address else folder.enter_context(_socket_folder()),
                runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(machine.threads)}},
            )
        except Exception as error:  # of many kinds, Ray's own among them
            if address:
                refused = f"no Ray cluster answers at RAY_ADDRESS={address} ({first_line(error)}); start one or unset it"
            else:
                refused = f"Ray does not start on this machine ({first_line(error)}); mend that, or do without --shards"
            raise UserError(refused) from error
        except SystemExit:  # Ray's own handler, in place while it starts
            interruption.end(signal.SIGTERM)
        folder.callback(ray.shutdown)
        interruption.end_at_signals()
        present, together = ray.cluster_resources(), max(task.processes for task, _, _ in calls)
        for kind, each in (("GPU", machine.gpus), ("CPU", float(machine.threads))):  # Ray itself would wait for ever
            if each * together > present.get(kind, 0):
                asks = f"{together} processes ask" if together > 1 else "each task asks"
                lower = " or --processes" if together > 1 else ""
                raise UserError(
                    f"{asks} for {each * together:g} {kind}, the cluster has {present.get(kind, 0):g}; "
                    f"lower {'--gpus' if kind == 'GPU' else '--threads'}{lower}, or add a node"
                )
        remote = ray.remote(num_cpus=machine.threads, num_gpus=machine.gpus, max_retries=RETRIES)(_elsewhere)
        waiting = remote.options(num_cpus=0, num_gpus=0)  # for processes that have CPUs and GPUs of their own
        references: list[Any] = []
        for call in calls:  # a task that is handed another's result waits for it
            place = waiting if call[0].processes > 1 else remote
            references.append(place.remote(*call, machine.gpus, *(references[before] for before in call[0].after)))
        ray.wait(references, num_returns=len(references))
        try:
            return ray.get(references)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.WorkerCrashedError as error:
            raise UserError(
                "a shard was killed repeatedly; run the same command again: it goes on from its checkpoints"
            ) from error
        except ray.exceptions.OutOfMemoryError as error:
            raise UserError(
                "there is too little memory for the shards, and Ray killed one repeatedly; run the same command again "
                "with fewer --workers: it goes on from its checkpoints"
            ) from error


def _require_listener(address: str | None) -> None:
    """That a server answers at ``host:port``, which Ray takes minutes to give up on. Raises OSError in seconds if not.

    Ray's speak gRPC, so they answer a greeting of HTTP/2; one that wants TLS hangs up on it, which is an answer too.
    """
    if found := re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address or ""):
        with socket.create_connection((found[1], int(found[2])), timeout=PATIENCE_SECONDS) as connection:
            connection.sendall(GREETING)
            connection.recv(1)


@contextmanager
def _socket_folder() -> Iterator[str | None]:
    """Where Ray is to keep its sockets: its own choice, unless their paths get too long for Unix, as in a job's folder."""
    chosen = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR", "/tmp")
    if len(os.fsencode(chosen)) + SOCKET_BYTES <= UNIX_BYTES:
        yield None
    else:
        with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as short:
            yield short


@contextmanager
def _shown(tasks: Sequence[tuple[str, Path]]) -> Iterator[None]:
    """Show the tasks' progress while the block runs: bars on a terminal, a line now and then elsewhere."""
    stop = threading.Event()
    show = _bars if sys.stderr.isatty() else _lines
    thread = threading.Thread(target=show, args=(tasks, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _state(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _overall(paths: Sequence[Path], seconds: float) -> tuple[int, int, int, float | None]:
    """Of all tasks: how many are done, running and failed, and the seconds that the rest takes.

    That is at the pace so far, but no less than a running task needs: the first that end may be the short ones.
    """
    done, failed = ({path for path in paths if path.with_suffix(f".{how}").exists()} for how in ("done", "failed"))
    states = [state for path in paths if path not in done | failed and (state := _state(path))]
    made = len(done) + len(failed) + sum(state["done"] / max(1, state["total"]) for state in states)
    left = [state["remaining"] for state in states if state["remaining"] is not None]
    if made:
        left.append(seconds / made * (len(paths) - made))
    return len(done), len(states), len(failed), max(left, default=None)


def _left(seconds: float | None) -> str:
    """The time left, in a unit that suits it."""
    if seconds is None:
        return ""
    amount, unit = next(
        (seconds / size, unit) for size, unit in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= 2 * size or unit == "s"
    )
    return f" (about {amount:.{int(unit == 'h')}f} {unit} left)"


def _bars(tasks: Sequence[tuple[str, Path]], stop: threading.Event) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}{task.fields[left]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        every = bars.add_task("all tasks", total=len(tasks), note="", left="", visible=len(tasks) > 1)
        rows = [(bars.add_task(name, total=None, note="", left="", visible=False), path) for name, path in tasks]
        started = time.monotonic()
        while True:
            ended = stop.wait(POLL_SECONDS)
            for row, path in rows:
                over = path.with_suffix(".done").exists()
                if state := _state(path):
                    shown = len(tasks) <= ROWS_SHOWN or not over
                    rest = _left(None if over else state["remaining"])
                    bars.update(
                        row, completed=state["done"], total=state["total"], note=state["note"], left=rest, visible=shown
                    )
            done, running, failed, left = _overall([path for _, path in tasks], time.monotonic() - started)
            note = f"{running} running" + (f", {failed} failed" if failed else "")
            bars.update(every, completed=done + failed, note=note, left=_left(None if ended else left))
            if ended:
                return


def _lines(tasks: Sequence[tuple[str, Path]], stop: threading.Event) -> None:
    started = time.monotonic()
    while not stop.wait(LINE_SECONDS):
        if len(tasks) > 1:
            done, running, failed, left = _overall([path for _, path in tasks], time.monotonic() - started)
            broken = f", {failed} failed" if failed else ""
            shown = f"{done}/{len(tasks)} done, {running} running{broken}{_left(left)}"
            print(f"all tasks: {shown}", file=sys.stderr, flush=True)
        for name, path in tasks:
            state = _state(path)
            if state and state["done"] < state["total"]:
                shown = f"{state['done']}/{state['total']} {state['note']}{_left(state['remaining'])}"
                print(f"{name}: {shown}", file=sys.stderr, flush=True)
