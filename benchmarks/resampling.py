"""The likelihood of mnist-nvae-lite under its published classifiers, with normalisers for all importance samples or a few.

Prints seconds an image, and what the gain over the base is by each: see metrics/likelihood.py for why a few are enough.
"""

import time
from pathlib import Path

import torch
from timing import processor

from metrics.likelihood import LikelihoodOptions, fill_pool, log_likelihoods, mean_and_error
from models.folding import folded
from pipelines.aggregate import spread
from pipelines.config import read
from pipelines.recipe import Recipe
from pipelines.results import BASELINE
from pipelines.stored import Stored
from runtime import hardware

EXPERIMENT, PRIOR, IMAGES, PROPOSALS = "mnist-nvae-lite", "ncp", 60, 50
CASES = ((50, 50), (50, 16), (50, 4), (500, 16))  # S, T; S and T alike: every sample has normalisers of its own


def main() -> None:
    """All cases on the same images, in turn, one thread."""
    hardware.reproducible(1)
    hardware.keep_freed_memory()
    stored = Stored(Recipe(read(Path("params.yaml")), EXPERIMENT, 0, Path.cwd()))
    model = folded(stored.vae)
    priors = {name: stored.prior(name, model) for name in (BASELINE, PRIOR)}
    pools = {PRIOR: fill_pool(model, priors[PRIOR], 0, 2**16)}
    gains: dict[tuple[int, int], list[torch.Tensor]] = {case: [] for case in CASES}
    seconds = dict.fromkeys(CASES, 0.0)
    for row, x in enumerate(stored.dataset.examples("test", spread(stored.dataset.size("test"), IMAGES))[:, None]):
        for case in CASES:
            size, resamples = case
            options = LikelihoodOptions(
                samples=[size], normaliser=[PROPOSALS], proposals=[PROPOSALS], resamples=resamples, pool=2**16
            )
            started = time.perf_counter()
            found = log_likelihoods(model, priors, pools, x, [row], 0, options)
            seconds[case] += time.perf_counter() - started
            gains[case].append(found[f"{PRIOR}/sampler/{PROPOSALS}/{size}"] - found[f"{BASELINE}/{size}"])
    print(f"{processor()}, one thread; {IMAGES} test images, M = {PROPOSALS}")
    first = torch.cat(gains[CASES[0]])
    for (size, resamples), values in gains.items():
        gain, error, _ = mean_and_error(torch.cat(values))
        change, paired, _ = mean_and_error(torch.cat(values) - first)
        cost, ratio = seconds[size, resamples] / IMAGES, seconds[CASES[0]] / seconds[size, resamples]
        print(
            f"S = {size:4d}, normalisers of {resamples:3d}: {cost:6.2f} s an image, {ratio:5.2f} x; gain {gain:.3f} ± "
            f"{error:.3f}, against the first {change:+.3f} ± {paired:.3f} (standard errors)"
        )


if __name__ == "__main__":
    main()
