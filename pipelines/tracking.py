"""Mirror finished stages into MLflow. Files are the truth: whatever goes wrong here is a warning."""

import hashlib
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.errors import first_line
from runtime.files import exclusive
from runtime.identity import revision


def store(root: Path) -> str:
    """The tracking store: MLFLOW_TRACKING_URI, or an SQLite file in the workspace."""
    return os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlruns.db'}")


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
    import mlflow
    from mlflow.entities import Metric, Param, RunTag

    for chatty in ("alembic", "mlflow"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    lock = root / "dvc.lock"
    tags = {
        "dvc.stage": f"{stage}@{experiment}",
        "dvc.lock": hashlib.md5(lock.read_bytes()).hexdigest() if lock.exists() else "none",
        "git.revision": revision(),
    }
    client = mlflow.MlflowClient(store(root))
    with exclusive(root / "artifacts" / ".locks", "mlflow"):  # two first users of a new store would break its migration
        found = client.get_experiment_by_name(experiment)
        identifier = found.experiment_id if found else client.create_experiment(experiment, str(root / "mlruns"))
    for seed, values in runs.items():
        run = client.create_run(identifier, run_name=f"{stage} seed {seed}", tags=tags | {"seed": str(seed)})
        metrics = [Metric(_name(key), value, 0, step) for key, points in values.items() for step, value in _points(points)]
        settings = [Param(key, value) for key, value in _flat(params)]
        client.log_batch(run.info.run_id, metrics, settings, [RunTag("experiment", experiment)])
        client.set_terminated(run.info.run_id)


def _points(value: Any) -> list[tuple[int, float]]:
    return [(int(step), float(at)) for step, at in value] if isinstance(value, list) else [(0, float(value))]


def _name(key: str) -> str:
    """MLflow allows fewer characters in a name than our metrics use."""
    return key.replace("+", " ")


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(tree, Mapping):
        return [pair for key, value in tree.items() for pair in _flat(value, f"{prefix}{key}.")]
    return [(prefix.rstrip("."), str(tree))]
