"""The error of a pool's normalisers against the spread that many pools show."""

import math

import numpy as np
import pytest
import torch

from metrics.likelihood import Pool

SIZE, REPEATS = 4096, 300


def log_normal_pool(repeat, width, size=SIZE):
    """log r ~ N(0, width²): r's effective sample size is exp(−width²) of the samples."""
    return Pool(width * torch.randn(size, generator=torch.Generator().manual_seed(repeat)))


def spread_and_errors(width, count, size=SIZE):
    """The spread over pools of the mean of log Σ r over examples, and the errors that the pools state."""
    examples = torch.arange(3 * (size // count))  # each block serves three
    pools = [log_normal_pool(repeat, width, size) for repeat in range(REPEATS)]
    means = [pool.log_sums(count, examples).double().mean().item() for pool in pools]
    return np.std(means, ddof=1), np.array([pool.error(count) for pool in pools])


# Blocks too few to be compared with each other are among them: 4, 2 and 1.
@pytest.mark.parametrize("count", [64, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("width", [0.3, 1.0])
def test_the_error_is_the_spread_over_pools(width, count):
    spread, errors = spread_and_errors(width, count)
    assert 0.9 < errors.mean() / spread < 1.3


@pytest.mark.parametrize("count", [1, 4, 16, 64, 256, 1024, 4096])
@pytest.mark.parametrize("width", [1.5, 2.0])
def test_the_error_is_not_understated_where_few_weights_count(width, count):
    spread, errors = spread_and_errors(width, count)
    assert errors.mean() / spread > 0.85


@pytest.mark.parametrize("count", [1000, 1500])
def test_what_does_not_fill_a_block_is_left_out_of_both(count):
    spread, errors = spread_and_errors(1.0, count, size=3100)
    assert 0.85 < errors.mean() / spread < 1.3


def test_more_samples_lower_the_error_as_their_root():
    small, large = (np.mean([log_normal_pool(repeat, 1.0, n).error(64) for repeat in range(50)]) for n in (2048, 32768))
    assert small / large == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("count", [1, 64, SIZE])
def test_equal_weights_have_no_error_whatever_their_size(count):
    for level in (-80.0, 0.0, 80.0):
        pool = Pool(torch.full((SIZE,), level))
        assert pool.error(count) == pytest.approx(0, abs=1e-5)
        assert pool.log_sums(count, torch.arange(5)).tolist() == pytest.approx([level + math.log(count)] * 5, abs=1e-4)


def test_a_common_factor_of_the_weights_does_not_enter_the_error():
    pool = log_normal_pool(0, 1.0)
    for count in (16, 1024):
        assert Pool(pool.log_r + 200).error(count) == pytest.approx(pool.error(count), rel=1e-3)
