"""Kill the pipeline at random moments of all its stages, and hold its results against those of an undisturbed run.

In a temporary workspace, with the tests' two tiny experiments, each stage of fetch, train-vae, train-prior, sample, evaluate
and report is killed at moments drawn evenly over the time it takes undisturbed, then run to its end. After every kill no
process may be left of those that were started. Run it with ``tests/support`` in PYTHONPATH.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from started import as_in_a_terminal, marked, survivors
from timing import processor
from tiny import tiny, write_params

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ("flat", "deep")
STAGES = [f"{stage} {name}" for name in EXPERIMENTS for stage in ("fetch", "train-vae", "train-prior", "sample", "evaluate")]
STAGES.append("report")
NOT_COMPARED = ["seconds", "revision"]
TIMES = ("train-seconds", "seconds-per-image")
SIGNALS = (signal.SIGKILL, signal.SIGINT)
LEFT_SECONDS = 5.0


def workspace(folder: Path) -> Path:
    """An empty one with the tiny experiments."""
    params = tiny()
    del params["experiments"]["deep"]["evaluate"]["features"]  # the feature network alone takes minutes
    folder.mkdir()
    write_params(folder, params)
    (folder / "reports").mkdir()
    for name in ("targets.yaml", "tables.yaml"):
        shutil.copy(ROOT / "reports" / name, folder / "reports")
    return folder


def run(folder: Path, stage: str, workers: int, kill: tuple[signal.Signals, float] | None = None) -> int | None:
    """Run a stage; its exit code, or None where it had ended before the kill, which is (signal, seconds after its start)."""
    environment, mark = marked()
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PRIORHOLE_WORKERS": str(workers)}
    command = [sys.executable, "-m", "pipelines", *stage.split()]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=said, stderr=said, preexec_fn=as_in_a_terminal
        )
        try:
            code = process.wait(None if kill is None else kill[1])
        except subprocess.TimeoutExpired:
            assert kill is not None
            process.send_signal(kill[0])
            code = process.wait(60)
        else:
            if code:
                said.seek(0)
                sys.exit(f"{stage} ended with {code}: {said.read().decode()}")
            code = 0 if kill is None else None
    if left := survivors(mark, LEFT_SECONDS):
        sys.exit(f"{stage}, {kill}: still there after {LEFT_SECONDS:g} s: {left}")
    return code


def results(folder: Path) -> pd.DataFrame:
    """The table, but for what is not compared."""
    table = pd.read_csv(folder / "reports" / "results.csv", dtype=str, keep_default_na=False).drop(columns=NOT_COMPARED)
    table.loc[table.metric.str.startswith(TIMES), ["value", "stderr"]] = ""
    return table


def undisturbed(folder: Path, workers: int) -> dict[str, float]:
    """Run all stages; the seconds that each takes."""
    seconds = {}
    for stage in STAGES:
        started = time.monotonic()
        run(folder, stage, workers)
        seconds[stage] = time.monotonic() - started
    return seconds


def disturbed(folder: Path, workers: int, kills: list[tuple[str, signal.Signals]], seconds: dict[str, float]) -> None:
    """Run all stages, each killed as often as ``kills`` names it before it is left alone."""
    for stage in STAGES:
        for number in (number for name, number in kills if name == stage):
            code, at = None, 0.0
            while code is None:  # it may have had less left to do than it once had
                at = random.uniform(0, seconds[stage])
                code = run(folder, stage, workers, (number, at))
            print(
                f"{workers} workers  {stage:18s} {number.name} after {at:5.2f} s of {seconds[stage]:5.2f}: exit code {code}"
            )
        run(folder, stage, workers)


def main() -> None:
    """Half of the kills with one worker, half with two; each number of workers meets every stage and both signals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each signal")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    print(f"{processor()}, {os.cpu_count()} cores, seed {options.seed}, {options.kills} kills of each signal")
    print(f"not compared: the columns {', '.join(NOT_COMPARED)}; value and stderr of {', '.join(TIMES)}")
    with tempfile.TemporaryDirectory() as temporary:
        alone = workspace(Path(temporary) / "undisturbed")
        seconds = undisturbed(alone, 1)
        expected = results(alone)
        for workers in (1, 2):
            kills = []
            for number in SIGNALS:
                stages = random.sample(STAGES, len(STAGES))
                kills += [(stages[index % len(stages)], number) for index in range(options.kills // 2)]
            folder = workspace(Path(temporary) / f"workers-{workers}")
            disturbed(folder, workers, kills, seconds)
            pd.testing.assert_frame_equal(results(folder), expected)
            same = f"{len(expected)} rows of results.csv, all the same; no survivors"
            print(f"{workers} workers, killed {len(kills)} times: {same}")


if __name__ == "__main__":
    main()
