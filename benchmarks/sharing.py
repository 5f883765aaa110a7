"""Sampling and measuring one seed by two workers against one: the seconds of each, and their ratio."""

import shutil
import sys
import time
from pathlib import Path

from timing import processor

from pipelines.fanout import Machine
from pipelines.stages import Pipeline


def main() -> None:
    """Do both stages anew for an experiment that is trained in the current folder: what they made before is deleted."""
    name, folder = sys.argv[1], Path.cwd()
    experiment = Pipeline(folder, Machine()).config.experiment(name)
    print(f"{processor()}; {len(experiment.seeds)} seeds, {experiment.sample.images} images by each sampler")
    for stage, outputs in (("sample", ("samples",)), ("evaluate", ("evaluation", "measured"))):
        seconds = {}
        for workers in (1, 2):
            for output in outputs:
                shutil.rmtree(folder / "artifacts" / name / output, ignore_errors=True)
            started = time.monotonic()
            getattr(Pipeline(folder, Machine(workers=workers)), stage)(name)
            seconds[workers] = time.monotonic() - started
        print(f"{stage}: one worker {seconds[1]:.1f} s, two {seconds[2]:.1f} s: {seconds[2] / seconds[1]:.2f}")


if __name__ == "__main__":
    main()
