"""Mirror stages into MLflow while they run. Files are the truth: whatever goes wrong here is a warning.

A stage is a run, its seeds are runs inside it, all in the MLflow experiment of the experiment's name. One thread of the
driver writes: it reads the progress files of the tasks, wherever these run.
"""

import hashlib
import json
import logging
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from runtime.errors import UserError, first_line
from runtime.files import exclusive
from runtime.identity import revision

PATIENCE = 10  # seconds that a server or a database has for an answer
POLL_SECONDS = 5.0
POINTS = 200  # that a curve gets while its stage takes e times as long; never more often than POLL_SECONDS
MOST = 100  # parameters that MLflow takes at once


@dataclass(frozen=True)
class Watched:
    """A task: the progress file it writes, its seed, what its curves are called after, and the images of a step, if any."""

    progress: Path
    seed: int
    name: str = ""
    batch: int | None = None


@dataclass
class Stage:
    """What is known of a stage while it runs.

    Attributes:
        root: the workspace; its dvc.lock is named by digest, and the default store lies in it.
        name, experiment: tags, and the runs' names.
        settings: nested, logged flat.
        dataset: its name, its digest, and the file that names them.
        tasks: what is watched.
        runs: for each seed, its metrics in the end. A number is logged as is; a list of (step, value) as a curve.
        pictures: draws files into a folder, to be kept with the run.
        error: why it failed.
        began: seconds since the epoch.
    """

    root: Path
    name: str
    experiment: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    dataset: tuple[str, str, Path] | None = None
    tasks: list[Watched] = field(default_factory=list)
    runs: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    pictures: Callable[[Path], Any] | None = None
    error: str | None = None
    began: float = field(default_factory=time.time)


_current: ContextVar["_Mirror | None"] = ContextVar("stage", default=None)


def store(root: Path) -> str:
    """The tracking store: MLFLOW_TRACKING_URI, or an SQLite file in the workspace.

    ``dvc exp run --temp`` and DVC's queue work in a copy that is deleted afterwards: their store is that of the checkout
    that they were started from, which DVC names.
    """
    from sqlalchemy.engine import URL  # which quotes what a path may hold and an address may not

    if named := os.environ.get("MLFLOW_TRACKING_URI"):
        return named
    return URL.create("sqlite+pysqlite", database=str(_kept(root) / "mlruns.db")).render_as_string()


def _kept(root: Path) -> Path:
    """The checkout in which a workspace's records are kept."""
    origin = Path(os.environ.get("DVC_ROOT", root)).resolve()
    return origin if root.resolve().is_relative_to(origin / ".dvc" / "tmp" / "exps") else root.resolve()


@contextmanager
def stage(root: Path, name: str, experiment: str) -> Iterator[None]:
    """Around a stage: it is mirrored from when it watches its first tasks, and fails there if it fails here."""
    mirror = _Mirror(Stage(root, name, experiment))
    before = _current.set(mirror)
    try:
        yield
    except Exception as error:
        mirror.stage.error = first_line(error)
        raise
    finally:
        _current.reset(before)
        mirror.end()


def watch(tasks: Sequence[Watched], settings: Mapping[str, Any], dataset: tuple[str, str, Path] | None) -> None:
    """From now on, the current stage's tasks are these; without a stage, nothing is mirrored."""
    if (mirror := _current.get()) is not None:
        mirror.stage.tasks, mirror.stage.settings, mirror.stage.dataset = list(tasks), settings, dataset
        mirror.start()


def record(runs: Mapping[int, Mapping[str, Any]], pictures: Callable[[Path], Any] | None = None) -> None:
    """What the current stage comes to (:class:`Stage`); without a stage, nothing is mirrored."""
    if (mirror := _current.get()) is not None:
        mirror.stage.runs, mirror.stage.pictures = runs, pictures


class _Mirror:
    """Writes one stage, in a thread of its own while that runs."""

    def __init__(self, stage: Stage):
        self.stage = stage
        self._ended = threading.Event()
        self._failure: str | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, unless it was begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._in_thread, name="mlflow", daemon=True)
            self._thread.start()

    def _in_thread(self) -> None:
        try:
            self.write()
        except BaseException as error:  # a full disk, an unreachable server, a broken store: the stage's files are safe
            self._failure = first_line(error)

    def end(self) -> None:
        """The stage has ended: so does the mirror, with a warning if it could not write of a whole one."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            if self._failure is not None and self.stage.error is None:  # a failed stage has its own line, of the same disk
                print(f"warning: this stage was not recorded in MLflow: {self._failure}", file=sys.stderr)

    def write(self) -> None:
        """Write until the stage has ended."""
        written = _Written(self.stage)
        while not self._ended.wait(max(POLL_SECONDS, (time.time() - self.stage.began) / POINTS)):
            written.look()
        written.look()
        written.finish()


class _Written:
    """The runs of one stage in the store."""

    def __init__(self, stage: Stage):
        self._stage = stage
        self._client, self._experiment = _client(stage)
        self._children: dict[int, str] = {}
        self._steps: dict[tuple[str, str], set[int]] = {}
        self._seen: dict[int, int] = {}  # by seed, when its files last changed, ms since the epoch
        self._looked = stage.began  # what is seen for the first time began after that
        self._resumed = False
        self._parent = self._continued() or self._create(stage.name, {}, stage.began)

    def _tags(self) -> dict[str, str]:
        stage, lock = self._stage, self._stage.root / "dvc.lock"
        return {
            "experiment": stage.experiment,
            "dvc.stage": f"{stage.name}@{stage.experiment}",
            "dvc.lock": hashlib.md5(lock.read_bytes()).hexdigest() if lock.exists() else "none",
            "git.revision": revision(),
            "mlflow.source.name": f"priorhole {stage.name} {stage.experiment}",
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": revision(),
            "priorhole.settings": _digest([str(stage.root.resolve()), stage.settings, (stage.dataset or ("", ""))[:2]]),
            "priorhole.process": _process(),
        }

    def _continued(self) -> str | None:
        """The run of the same stage that was killed or failed, taken up again; runs of dead processes are ended."""
        tags, found = self._tags(), None
        where = f"tags.`dvc.stage` = '{tags['dvc.stage']}' and attributes.status != 'FINISHED'"
        for run in self._client.search_runs([self._experiment], where, order_by=["attributes.start_time DESC"]):
            if _alive(run.data.tags.get("priorhole.process", "")):
                continue
            same = run.data.tags.get("priorhole.settings") == tags["priorhole.settings"]
            parent = run.data.tags.get("mlflow.parentRunId")
            if same and parent is None and found is None:
                found = run.info.run_id
            elif run.info.status == "RUNNING" and not same:
                self._client.set_terminated(run.info.run_id, "KILLED")
        if found is None:
            return None
        self._resumed = True
        inside = f"tags.`mlflow.parentRunId` = '{found}'"
        children = self._client.search_runs([self._experiment], inside)
        self._children = {int(run.data.tags["seed"]): run.info.run_id for run in children}
        for identifier in (found, *self._children.values()):
            self._client.update_run(identifier, status="RUNNING")
            self._client.set_tag(identifier, "priorhole.process", tags["priorhole.process"])
        return found

    def _create(self, name: str, tags: Mapping[str, str], began: float) -> str:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        run = self._client.create_run(self._experiment, round(began * 1000), {**self._tags(), **tags}, name)
        identifier = str(run.info.run_id)
        settings = [Param(key, value) for key, value in _flat(self._stage.settings)]
        for first in range(0, len(settings), MOST):
            self._client.log_batch(identifier, params=settings[first : first + MOST])
        if self._stage.dataset is not None:
            dataset, digest, source = self._stage.dataset
            known = Dataset(dataset, digest[:36], "local", json.dumps({"uri": source.as_uri()}))
            purpose = InputTag("mlflow.data.context", "evaluation" if self._stage.name == "evaluate" else "training")
            self._client.log_inputs(identifier, [DatasetInput(known, [purpose])])
        return identifier

    def _child(self, seed: int) -> str:
        if seed not in self._children:
            tags = {"seed": str(seed), "mlflow.parentRunId": self._parent}
            self._children[seed] = self._create(f"{self._stage.name} seed {seed}", tags, self._looked)
        return self._children[seed]

    def look(self) -> None:
        """Log what the tasks' progress files say now."""
        for task in self._stage.tasks:
            try:
                state, changed = json.loads(task.progress.read_text()), task.progress.stat().st_mtime
            except (OSError, ValueError):
                continue
            self._seen[task.seed] = max(self._seen.get(task.seed, 0), round(changed * 1000))
            if state["total"]:
                self._log(self._child(task.seed), dict(_curves(task, state)), max(0, state["done"] - 1))
        self._looked = time.time()

    def _log(self, identifier: str, values: Mapping[str, Any], step: int = 0) -> None:
        """Log numbers at a step, and lists of (step, value), as far as they are not there."""
        from mlflow.entities import Metric

        now, found = round(time.time() * 1000), []
        for key, value in values.items():
            for at, number in [(step, value)] if not isinstance(value, list) else value:
                steps = self._known(identifier, key)
                if at not in steps:
                    steps.add(at)
                    found.append(Metric(_name(key), float(number), now, int(at)))
        for first in range(0, len(found), 1000):
            self._client.log_batch(identifier, found[first : first + 1000])

    def _known(self, identifier: str, key: str) -> set[int]:
        """The steps of a curve that are there."""
        if (identifier, key) not in self._steps:
            there = self._client.get_metric_history(identifier, _name(key)) if self._resumed else []
            self._steps[identifier, key] = {point.step for point in there}
        return self._steps[identifier, key]

    def finish(self) -> None:
        """Log what the stage comes to, and end its runs."""
        stage, now = self._stage, round(time.time() * 1000)
        self._looked = stage.began
        for seed, values in stage.runs.items():
            self._log(self._child(seed), values)
        if stage.pictures is not None:
            with TemporaryDirectory() as folder:
                stage.pictures(Path(folder))
                self._client.log_artifacts(self._parent, folder, "samples")
        if stage.error is not None:
            self._client.set_tag(self._parent, "mlflow.note.content", stage.error)
        status = "FINISHED" if stage.error is None else "FAILED"
        for seed, identifier in self._children.items():
            self._client.set_terminated(identifier, status, self._seen.get(seed, now))
        self._client.set_terminated(self._parent, status, now)


def attach(root: Path, pictures: Mapping[str, Sequence[Path]]) -> None:
    """Keep an experiment's figures with the last run of its evaluation, where there is one; what goes wrong is a warning."""
    uri = store(root)
    if uri.startswith("sqlite") and not (_kept(root) / "mlruns.db").exists():
        return
    try:
        with _opened(uri):
            client = _ready(uri)
        for experiment, paths in pictures.items():
            found = client.get_experiment_by_name(experiment)
            where = f"tags.`dvc.stage` = 'evaluate@{experiment}' and attributes.status = 'FINISHED'"
            runs = [] if found is None else client.search_runs([found.experiment_id], where, max_results=50)
            for run in [run for run in runs if "mlflow.parentRunId" not in run.data.tags][:1]:
                for path in paths:
                    client.log_artifact(run.info.run_id, str(path), "figures")
    except Exception as error:
        print(f"warning: the figures were not kept in MLflow: {first_line(error)}", file=sys.stderr)


def _curves(task: Watched, state: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number of a progress file that is drawn, by its name in the run."""
    prefix = f"{task.name}/" if task.name else ""
    for of, values in state["curves"].items():
        suffix = f"/k{int(of.removeprefix('group ')):02d}" if of.startswith("group ") else ""
        yield from ((f"{prefix}{name}{suffix}", value) for name, value in values.items())
    if state["pace"] is not None and task.batch is not None:
        yield f"{prefix}images-a-second", state["pace"] * task.batch
    yield f"{prefix}progress", state["done"] / state["total"]


def _process() -> str:
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.0f}"


def _alive(process: str) -> bool:
    """Whether a process of this machine, as :func:`_process` names it, is another one that still runs."""
    host, _, rest = process.partition(" ")
    number, _, began = rest.partition(" ")
    if host != socket.gethostname() or not number.isdigit() or process == _process():
        return False
    try:
        return f"{psutil.Process(int(number)).create_time():.0f}" == began
    except psutil.NoSuchProcess:
        return False


def _digest(document: Any) -> str:
    return hashlib.blake2b(json.dumps(document, sort_keys=True).encode(), digest_size=8).hexdigest()


def _ready(uri: str) -> Any:
    """A client of the store."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # a checkout without git is fine
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", f"{PATIENCE}")  # left alone, it takes minutes to give up
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    import mlflow

    for chatty, level in (("alembic", logging.WARNING), ("mlflow", logging.CRITICAL), ("urllib3", logging.ERROR)):
        logging.getLogger(chatty).setLevel(level)
    return mlflow.MlflowClient(uri)


def _client(stage: Stage) -> tuple[Any, str]:
    """A client, and the identifier of the experiment, which is made if it is not there."""
    uri = store(stage.root)
    with _opened(uri):  # two first users of a new store would break its migration
        client = _ready(uri)
        found = client.get_experiment_by_name(stage.experiment)
        identifier = found.experiment_id if found else _new_experiment(client, stage)
    if found and found.lifecycle_stage != "active":
        where = "" if os.environ.get("MLFLOW_TRACKING_URI") else f"MLFLOW_TRACKING_URI={shlex.quote(uri)} "
        raise UserError(
            f"its experiment {stage.experiment} was deleted there; to record it again: "
            f"{where}mlflow experiments restore --experiment-id {identifier}"
        )
    return client, str(identifier)


def _new_experiment(client: Any, stage: Stage) -> str:
    artifacts = (_kept(stage.root) / "mlruns").as_uri()
    # Its pages are those of model training, not of assistants.
    return client.create_experiment(stage.experiment, artifacts, {"mlflow.experimentKind": "custom_model_development"})


@contextmanager
def _opened(uri: str) -> Iterator[None]:
    """Around the first use of a store: a database has answered, and one in a file is this process's alone.

    Raises:
        Exception: the database's own, at once. MLflow would try ten times, for minutes.
    """
    from mlflow.store.db.db_types import DATABASE_ENGINES, MYSQL, POSTGRES, SQLITE
    from sqlalchemy import create_engine, inspect, make_url

    kind = uri.partition(":")[0].partition("+")[0]
    if kind not in DATABASE_ENGINES:
        yield
        return
    url = make_url(uri)
    with ExitStack() as alone:
        if kind == SQLITE and url.database not in (None, "", ":memory:") and "uri" not in url.query:
            path = Path(url.database).resolve()
            alone.enter_context(exclusive(path.parent, path.name, wait=60))
        engine = create_engine(url, connect_args={"connect_timeout": PATIENCE} if kind in (POSTGRES, MYSQL) else {})
        inspect(engine)
        engine.dispose()
        yield


def _name(key: str) -> str:
    """MLflow allows fewer characters in a name than our metrics use."""
    return key.replace("+", " ")


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(tree, Mapping):
        return [pair for key, value in tree.items() for pair in _flat(value, f"{prefix}{key}.")]
    return [(prefix.rstrip("."), str(tree))]
