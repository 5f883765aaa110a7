"""What `priorhole plan` says of the default set against what it takes: processor time of every stage, and the ratio.

For a checkout in which nothing is done yet: it plans each experiment there, then has DVC reproduce stage after stage.
"""

import json
import os
import resource
import subprocess
from collections import defaultdict

from timing import processor

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PRIORHOLE_WORKERS": "1"}


def lines(*command: str) -> list[str]:
    """What a command prints."""
    return subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()


def processor_time(*command: str) -> float:
    """Seconds of processor time of a command and all that it starts."""

    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    before = used()
    lines(*command)
    return used() - before


def main() -> None:
    """Print a line a stage, of all experiments together."""
    print(f"{processor()}; seconds of processor time, with one worker")
    stages = [tuple(name.split("@")) for name in lines("dvc", "stage", "list", "--name-only") if "@" in name]
    planned, taken = defaultdict[str, float](float), defaultdict[str, float](float)
    for experiment in dict.fromkeys(experiment for _, experiment in stages):
        for stage in json.loads("\n".join(lines("priorhole", "plan", experiment, "--json")))["stages"]:
            planned[stage["stage"]] += stage["seconds"]
    starting = processor_time("dvc", "--version")
    for stage, experiment in stages:
        taken[stage] += processor_time("dvc", "repro", "--single-item", f"{stage}@{experiment}") - starting
    for stage, seconds in taken.items():
        print(f"{stage:12} planned {planned[stage]:7.0f}   took {seconds:7.0f}   {planned[stage] / seconds:.2f}")
    total, took = sum(planned[stage] for stage in taken), sum(taken.values())
    print(f"{'in all':12} planned {total:7.0f}   took {took:7.0f}   {total / took:.2f}")


if __name__ == "__main__":
    main()
