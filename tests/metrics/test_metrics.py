import math

import numpy as np
import pytest
import torch
from scipy import linalg

from metrics import frechet, kid, mmd, modes
from metrics.frechet import Moments, frechet_distance
from runtime.errors import UserError


def normal(n, d, seed, mean=0.0, std=1.0):
    return mean + std * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(mean, covariance):
    """Moments that stand for exactly this mean and covariance."""
    n = 2
    return Moments(n, n * mean, (n - 1) * covariance + n * torch.outer(mean, mean))


def test_frechet_distance_of_equal_covariances_is_the_squared_distance_of_the_means():
    covariance = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    a, b = moments(torch.zeros(3).double(), covariance), moments(torch.tensor([1.0, -2.0, 0.5]).double(), covariance)
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 0.25, abs=1e-10)


def test_frechet_distance_of_commuting_covariances_is_that_of_the_standard_deviations():
    first, second = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 0.0]).double()
    zero = torch.zeros(3).double()
    expected = ((first.sqrt() - second.sqrt()) ** 2).sum().item()  # the last pair is rank-deficient
    assert frechet_distance(moments(zero, first.diag()), moments(zero, second.diag())) == pytest.approx(expected, abs=1e-10)


def test_frechet_distance_agrees_with_a_general_matrix_root():
    a, b = normal(50, 6, 0), normal(50, 6, 1, 0.3, 2.0) @ normal(6, 6, 2)
    root = linalg.sqrtm(np.cov(a.T.numpy()) @ np.cov(b.T.numpy()))
    traces = np.trace(np.cov(a.T.numpy())) + np.trace(np.cov(b.T.numpy()))
    expected = float(((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * np.trace(root).real)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-8)


def from_rows(rows, d):
    """Features of falling scale; fewer rows than ``d`` make a singular covariance."""
    return normal(rows, d, rows) * torch.logspace(0, -2, d, dtype=torch.float64)


@pytest.mark.parametrize(("rows", "others"), [(90, 120), (90, 20), (20, 90), (20, 25)])
def test_cholesky_factors_give_the_distance_of_eigenvectors_whichever_covariance_is_singular(monkeypatch, rows, others):
    a, b = Moments.of(from_rows(rows, 40)), Moments.of(0.2 + from_rows(others, 40))
    expected = frechet_distance(a, b)
    roots, root = [], frechet._root
    monkeypatch.setattr(frechet, "_root", lambda covariance: roots.append(1) or root(covariance))
    monkeypatch.setattr(frechet, "EIGEN_ROOT", 39)
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-7)
    assert not roots or max(rows, others) < 40  # no eigenvectors but where both are singular


def test_a_fid_by_cholesky_factors_has_the_same_standard_error(monkeypatch):
    a, b = from_rows(2000, 32), 0.1 + from_rows(2100, 32)
    value, stderr = frechet.fid(a, b, 0)
    monkeypatch.setattr(frechet, "EIGEN_ROOT", 1)
    assert frechet.fid(a, b, 0) == (pytest.approx(value, rel=1e-9), pytest.approx(stderr, rel=1e-6))


def test_a_fid_never_holds_all_rows_in_float64(monkeypatch):
    rows = normal(4000, 16, 0).float()
    whole, held, of = frechet.fid(rows, rows + 0.1, 0), [], Moments.of
    monkeypatch.setattr(frechet, "ROWS_AT_ONCE", 64)
    monkeypatch.setattr(Moments, "of", lambda part: held.append(len(part)) or of(part))
    assert frechet.fid(rows, rows + 0.1, 0) == pytest.approx(whole, rel=1e-6)
    assert sum(held) == 8000
    assert max(held) <= 64


def test_moments_of_parts_add_up():
    rows = normal(101, 4, 0)
    whole, parts = Moments.of(rows), Moments.of(rows[:37]) + Moments.of(rows[37:])
    assert torch.allclose(whole.mean, parts.mean)
    assert torch.allclose(whole.covariance, torch.cov(rows.T))
    assert torch.allclose(parts.covariance, torch.cov(rows.T))


def test_fid_of_too_few_images_is_refused_or_warned_about():
    with pytest.warns(UserWarning, match="singular"):
        frechet.fid(normal(50, 60, 0), normal(90, 60, 1), 0)
    with pytest.raises(UserError, match="at least 4 images"):
        frechet.fid(normal(3, 2, 0), normal(50, 2, 1), 0)
    with pytest.raises(UserError, match="at least 2 images"):
        frechet_distance(Moments.of(normal(1, 8, 0)), Moments.of(normal(50, 8, 1)))


@pytest.mark.parametrize(("d", "shift"), [(2, 1.0), (32, 0.0), (32, 0.3)])
def test_fid_has_the_standard_error_that_repetition_shows(d, shift):
    found = [frechet.fid(normal(400, d, 2 * s), normal(400, d, 2 * s + 1, shift), 0) for s in range(120)]
    spread = np.std([value for value, _ in found], ddof=1)
    ratio = np.mean([error for _, error in found]) / spread  # about √2 at distance 0, 1 far from it
    assert 0.8 < ratio < (1.25 if shift else 1.7)
    if d == 2:
        assert np.mean([value for value, _ in found]) == pytest.approx(2.0, abs=0.1)


def rbf_between_normals(distance, variance, width, d):
    """E exp(−|x − y|²/2w²) for x − y ~ N(distance, variance I) in d dimensions."""
    scale = width**2 + variance
    return (width**2 / scale) ** (d / 2) * math.exp(-(distance**2) / (2 * scale))


def test_mmd_is_unbiased_for_its_closed_form():
    d, shift, width = 2, 1.0, 1.3
    expected = 2 * rbf_between_normals(0, 2, width, d) - 2 * rbf_between_normals(shift, 2, width, d)
    offset = torch.tensor([shift, 0.0]).double()
    found = [mmd.mmd(normal(100, d, 2 * s), normal(100, d, 2 * s + 1) + offset, [width]) for s in range(150)]
    values = np.array([one.value for one in found])
    assert values.mean() == pytest.approx(expected, abs=3.5 * values.std() / math.sqrt(len(values)))
    assert np.mean([one.stderr for one in found]) == pytest.approx(values.std(ddof=1), rel=0.2)


def test_mmd_of_equal_distributions_is_zero_on_average_with_a_calibrated_error():
    found = [mmd.mmd(normal(100, 3, 2 * s), normal(100, 3, 2 * s + 1)) for s in range(150)]
    values = np.array([one.value for one in found])
    assert abs(values.mean()) < 3.5 * values.std() / math.sqrt(len(values))
    assert np.mean([one.stderr for one in found]) == pytest.approx(values.std(ddof=1), rel=0.3)
    assert found[0].bandwidths == [scale * mmd.median_distance(normal(100, 3, 0)) for scale in mmd.SCALES]


def test_kid_agrees_with_its_sums_written_out():
    n, x, y = 7, normal(7, 3, 0), normal(7, 3, 1, 0.5)

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    expected = sum(k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in pairs) / len(pairs)
    assert mmd.unbiased_mmd2(x, y, kid.cubic)[0] == pytest.approx(expected, rel=1e-10)


def test_kid_of_equal_distributions_is_zero_on_average_with_a_calibrated_error_over_blocks(monkeypatch):
    monkeypatch.setattr(kid, "ROWS", 100)
    found = np.array([kid.kid(normal(250, 3, 2 * s), normal(400, 3, 2 * s + 1), 0) for s in range(100)])
    spread = found[:, 0].std(ddof=1)
    assert abs(found[:, 0].mean()) < 3.5 * spread / 10
    assert found[:, 1].mean() == pytest.approx(spread, rel=0.3)


def test_mmd_refuses_a_single_sample():
    with pytest.raises(UserError, match="at least 2"):
        mmd.mmd(torch.zeros(1, 2), torch.zeros(5, 2), [1.0])


def test_off_mode_share_of_the_truth_is_known():
    means, sigma = torch.tensor([[0.0, 0.0], [5.0, 0.0]]), 0.1
    x = means[torch.arange(400_000) % 2] + sigma * normal(400_000, 2, 0)
    share, error = modes.off_mode_share(x, means, sigma)
    assert share == pytest.approx(math.exp(-8), abs=4 * error)
    assert modes.modes_hit(x[::2], means, sigma) == 1
    assert modes.modes_hit(x, means, sigma) == 2
    assert modes.off_mode_share(torch.full((10, 2), 2.5), means, sigma) == (1.0, 0.0)
