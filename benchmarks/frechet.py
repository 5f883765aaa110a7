"""The FID of 2 048 features: its root by Cholesky factors, against the eigenvectors that it took before; threads; memory."""

import resource
import time
from unittest import mock

import torch
from timing import compare, processor

from metrics import frechet
from metrics.frechet import Moments, fid, frechet_distance

FEATURES, ROWS = 2048, 6_000


def main() -> None:
    """One distance both ways, with one thread and two, then a whole FID with its standard error."""
    # Rectified and of falling scale, as a network's pooled features are.
    scales = torch.logspace(0, -2, FEATURES)
    ours, reference = (
        (torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(seed)) + 0.1 * seed).relu() * scales
        for seed in (0, 1)
    )
    a, b = Moments.of(ours), Moments.of(reference)

    def by_eigenvectors() -> float:
        with mock.patch.object(frechet, "EIGEN_ROOT", FEATURES):
            return frechet_distance(a, b)

    print(f"{processor()}; {FEATURES} features")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        print(f"one distance, threads: {threads}")
        compare({"by eigenvectors": by_eigenvectors, "by Cholesky factors": lambda: frechet_distance(a, b)}, rounds=3)
    print(f"the two differ by {abs(by_eigenvectors() - frechet_distance(a, b)):.1e} of {frechet_distance(a, b):.3f}")
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    value, stderr = fid(ours, reference, 0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"a FID of {ROWS} rows, {1 + frechet.BLOCKS} distances, 2 threads: {time.perf_counter() - started:.0f} s", end="")
    print(f" ({value:.3f} ± {stderr:.3f}), {grown / 2**20:.1f} GB more memory than the features")


if __name__ == "__main__":
    main()
