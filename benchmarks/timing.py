"""Time alternatives side by side: alternating runs, medians, ratios to the first."""

import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from runtime import hardware


def compare(alternatives: Mapping[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Print the median seconds of each alternative, and how many times as fast as the first one it is.

    Args:
        alternatives: by name; each is called once to warm up, then once a round, in turn.
        rounds: number of rounds.

    Returns:
        The medians, seconds.
    """
    for run in alternatives.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, run in alternatives.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    first = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"{name:40s} {median * 1e3:10.2f} ms   {first / median:6.2f} x")
    return medians


def processor() -> str:
    """What it runs on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names and not torch.cuda.is_available() else hardware.device_name()
