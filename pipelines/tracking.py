"""Mirror finished stages into MLflow. Files are the truth: whatever goes wrong here is a warning."""

import hashlib
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from runtime.errors import UserError, first_line
from runtime.files import exclusive
from runtime.identity import revision

PATIENCE = 10  # seconds that a server or a database has for an answer


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


def record(
    root: Path, stage: str, experiment: str, runs: Mapping[int, Mapping[str, Any]], params: Mapping[str, Any]
) -> None:
    """Log one run per seed.

    Args:
        root: the workspace; its dvc.lock is named by digest, and the default store lies in it.
        stage, experiment: tags, and the runs' name.
        runs: for each seed, its metrics. A number is logged as is; a list of (step, value) as a curve.
        params: nested settings, logged flat.
    """
    try:
        _record(root, stage, experiment, runs, params)
    except Exception as error:  # a full disk, an unreachable server, a broken store: the stage's files are safe
        print(f"warning: this stage was not recorded in MLflow: {first_line(error)}", file=sys.stderr)


def _record(
    root: Path, stage: str, experiment: str, runs: Mapping[int, Mapping[str, Any]], params: Mapping[str, Any]
) -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # a checkout without git is fine
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", f"{PATIENCE}")  # left alone, it takes minutes to give up
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    import mlflow
    from mlflow.entities import Metric, Param, RunTag

    for chatty, level in (("alembic", logging.WARNING), ("mlflow", logging.WARNING), ("urllib3", logging.ERROR)):
        logging.getLogger(chatty).setLevel(level)
    lock = root / "dvc.lock"
    tags = {
        "dvc.stage": f"{stage}@{experiment}",
        "dvc.lock": hashlib.md5(lock.read_bytes()).hexdigest() if lock.exists() else "none",
        "git.revision": revision(),
    }
    uri = store(root)
    with _opened(uri):  # two first users of a new store would break its migration
        client = mlflow.MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        identifier = (
            found.experiment_id if found else client.create_experiment(experiment, (_kept(root) / "mlruns").as_uri())
        )
    if found and found.lifecycle_stage != "active":
        where = "" if os.environ.get("MLFLOW_TRACKING_URI") else f"MLFLOW_TRACKING_URI={shlex.quote(uri)} "
        raise UserError(
            f"its experiment {experiment} was deleted there; to record it again: "
            f"{where}mlflow experiments restore --experiment-id {identifier}"
        )
    for seed, values in runs.items():
        run = client.create_run(identifier, run_name=f"{stage} seed {seed}", tags=tags | {"seed": str(seed)})
        metrics = [Metric(_name(key), value, 0, step) for key, points in values.items() for step, value in _points(points)]
        settings = [Param(key, value) for key, value in _flat(params)]
        client.log_batch(run.info.run_id, metrics, settings, [RunTag("experiment", experiment)])
        client.set_terminated(run.info.run_id)


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


def _points(value: Any) -> list[tuple[int, float]]:
    return [(int(step), float(at)) for step, at in value] if isinstance(value, list) else [(0, float(value))]


def _name(key: str) -> str:
    """MLflow allows fewer characters in a name than our metrics use."""
    return key.replace("+", " ")


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(tree, Mapping):
        return [pair for key, value in tree.items() for pair in _flat(value, f"{prefix}{key}.")]
    return [(prefix.rstrip("."), str(tree))]
