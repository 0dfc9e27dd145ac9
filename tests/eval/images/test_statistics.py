"""Distances and scores against values that are known in closed form or computed another way."""

import math

import numpy as np
import pytest

from metamorph_jax.errors import DataError, FileError
from metamorph_jax.eval.images import statistics
from metamorph_jax.eval.images.statistics import Gaussian, frechet_distance, inception_score

from .conftest import ORACLE

RNG = np.random.default_rng(0)


def gaussian(mean, covariance, count=100):
    return Gaussian(count, np.asarray(mean, float), np.asarray(covariance, float) * (count - 1))


def test_batches_add_up_to_the_whole_set():
    x = RNG.normal(size=(50, 6)).astype(np.float32) + 1e4  # far from zero: digits would be lost
    whole = Gaussian.empty(6)
    for part in np.split(x, [1, 8, 30]):
        whole = whole.merged(Gaussian.of(part))
    assert whole.count == 50
    exact = x.astype(np.float64)
    np.testing.assert_allclose(whole.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(exact, rowvar=False), rtol=1e-9)
    # A part that another process saw, or that saw nothing, changes nothing but the count.
    same = Gaussian.empty(6).merged(whole).merged(Gaussian.empty(6))
    np.testing.assert_array_equal(same.mean, whole.mean)
    np.testing.assert_array_equal(same.scatter, whole.scatter)


def test_distance_of_diagonal_gaussians():
    """Where covariances commute, it is |m1 - m2|^2 + sum (s1 - s2)^2."""
    a = gaussian([0.0, 1.0, 2.0], np.diag([1.0, 4.0, 9.0]))
    b = gaussian([1.0, 1.0, 0.0], np.diag([4.0, 4.0, 1.0]))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (1 + 0 + 4), rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_distance_by_eigenvalues():
    """Tr (AB)^(1/2) is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2)."""
    from scipy.linalg import sqrtm

    a, b = (Gaussian.of(RNG.normal(size=(40, 5)) @ RNG.normal(size=(5, 5))) for _ in range(2))
    root = sqrtm(a.covariance).real
    eigen = np.linalg.eigvalsh(root @ b.covariance @ root)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance)
    expected -= 2 * np.sqrt(eigen.clip(0)).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_distance_of_few_images_is_finite_and_noted():
    few, more = Gaussian.of(RNG.normal(size=(3, 8))), Gaussian.of(RNG.normal(size=(20, 8)))
    assert "3 images for 8 features" in few.note and not more.note
    assert 0 < frechet_distance(few, more) < 100
    flat = gaussian(np.zeros(8), np.zeros((8, 8)))  # all images the same
    assert frechet_distance(flat, gaussian(np.ones(8), np.zeros((8, 8)))) == pytest.approx(8)


def test_distance_of_a_few_images_from_their_features():
    for n, m, width in ((5, 5, 40), (3, 5, 40), (30, 20, 6)):
        a, b = RNG.normal(size=(n, width)), RNG.normal(size=(m, width)) * 2 + 1
        exact = frechet_distance(Gaussian.of(a), Gaussian.of(b))
        assert statistics.frechet_distance_of_few(a, b) == pytest.approx(exact, rel=1e-6)
    assert statistics.frechet_distance_of_few(a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(DataError, match="at least 2 images, not 1"):
        statistics.frechet_distance_of_few(a, b[:1])
    with pytest.raises(DataError, match="6 features against 5"):
        statistics.frechet_distance_of_few(a, b[:, :5])


def test_what_has_no_distance():
    one = Gaussian.of(np.ones((1, 3)))
    with pytest.raises(DataError, match="at least 2 images, not 1"):
        frechet_distance(one, one)
    with pytest.raises(DataError, match="3 features against 4"):
        frechet_distance(gaussian(np.zeros(3), np.eye(3)), gaussian(np.zeros(4), np.eye(4)))


def test_inception_score_in_closed_form():
    sure = np.tile(np.eye(4) * 100, (5, 1))  # each part of 4 has each of 4 classes once
    assert inception_score(sure, 5, None) == pytest.approx((4, 0))
    assert inception_score(np.zeros((20, 4)), 5) == pytest.approx((1, 0))
    # Parts are contiguous: sorted by class, each part has one class only, unless shuffled.
    ordered = sure[np.argsort(sure.argmax(1))][:, :4]
    assert inception_score(ordered, 4, None)[0] == pytest.approx(1)
    assert inception_score(ordered, 4, seed=0)[0] > 2


def test_inception_score_takes_the_population_deviation_over_uneven_parts():
    logits = RNG.normal(size=(11, 3)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for part in (p[0:3], p[3:7], p[7:11]):
        mean = part.mean(0)
        each = [sum(x * math.log(x / m) for x, m in zip(row, mean, strict=True)) for row in part]
        scores.append(math.exp(sum(each) / len(each)))
    mean, std = inception_score(logits, 3, None)
    assert mean == pytest.approx(sum(scores) / 3)
    assert std == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in scores) / 3))
    with pytest.raises(DataError, match="10 parts"):
        inception_score(logits[:9])


def test_cosines_and_clipscore():
    a = np.array([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0]], np.float32)
    b = np.array([[6.0, 8.0], [-2.0, 0.0], [1.0, 0.0]], np.float32)
    found = statistics.cosines(a, b)
    np.testing.assert_allclose(found, [1, -1, math.sqrt(0.5)], rtol=1e-12)
    np.testing.assert_allclose(statistics.clipscore(found), [2.5, 0, 2.5 * math.sqrt(0.5)])


def test_interval_is_around_the_mean_and_shrinks():
    values = RNG.normal(0.3, 0.1, 400)
    low, high = statistics.interval(values)
    assert low < values.mean() < high and (high - low) == pytest.approx(4 * 0.005, rel=0.2)
    assert statistics.interval(np.ones(5)) == (1, 1)


def test_an_interval_draws_units_whole():
    """Images that are alike inside stories: as sure as one image of each."""
    values = RNG.normal(0.3, 0.1, 100)
    units = [str(k) for k in range(100)]
    alone, low_high = statistics.interval(values), statistics.interval(values, units=units)
    assert low_high == pytest.approx(alone, abs=0.004)
    five = statistics.interval(np.repeat(values, 5), units=np.repeat(units, 5))
    assert five == pytest.approx(low_high)
    assert statistics.interval(np.repeat(values, 5))[0] > five[0]
    low, high = statistics.interval([1, 1, 1, 0], units="aaab")  # the mean of all, not of units
    assert (low, high) == (0, 1)


def test_statistics_in_files(tmp_path):
    """Those of pytorch-fid have no count."""
    one = Gaussian.of(RNG.normal(size=(30, 4)))
    statistics.write_gaussian(tmp_path / "own.npz", one)
    np.savez(tmp_path / "theirs.npz", mu=one.mean, sigma=one.covariance)
    other = Gaussian.of(RNG.normal(size=(20, 4)) + 1)
    for name, count in (("own.npz", 30), ("theirs.npz", 5)):
        found = statistics.read_gaussian(tmp_path / name)
        assert found.count == count and not found.note
        exact = frechet_distance(one, other)
        assert frechet_distance(found, other) == pytest.approx(exact, rel=1e-9)
    np.savez(tmp_path / "shapes.npz", mu=one.mean, sigma=one.covariance[:2])
    np.savez(tmp_path / "names.npz", mean=one.mean)
    (tmp_path / "text.npz").write_text("mu sigma")
    for name in ("shapes", "names", "text"):
        with pytest.raises(FileError, match=f"{name}.npz"):
            statistics.read_gaussian(tmp_path / f"{name}.npz")


def test_statistics_of_images_that_were_not_cut(tmp_path):
    one = Gaussian.of(RNG.normal(size=(30, 4)))
    statistics.write_gaussian(tmp_path / "whole.npz", one, 256, whole=True)
    assert statistics.read_gaussian(tmp_path / "whole.npz", 256, whole=True).count == 30
    with pytest.raises(FileError, match="at fid_size 256, not cut, not 256$"):
        statistics.read_gaussian(tmp_path / "whole.npz", 256)
    np.savez(tmp_path / "theirs.npz", mu=one.mean, sigma=one.covariance)
    statistics.read_gaussian(tmp_path / "theirs.npz", 256, whole=True)


def test_running_sums_of_torchmetrics(tmp_path):
    """[sum, sum of outer products, number], as MiniGPT-5 keeps those of CC3M."""
    torch = pytest.importorskip("torch", reason=ORACLE)
    x = RNG.normal(size=(30, 4)) + 3
    sums = [torch.tensor(x.sum(0)), torch.tensor(x.T @ x), torch.tensor(len(x))]
    torch.save(sums, tmp_path / "real.pt")
    found, exact = statistics.read_gaussian(tmp_path / "real.pt", 256, True), Gaussian.of(x)
    assert found.count == 30
    np.testing.assert_allclose(found.mean, exact.mean)
    np.testing.assert_allclose(found.covariance, exact.covariance)
    torch.save(sums[:2], tmp_path / "two.pt")
    torch.save([sums[1], sums[0], sums[2]], tmp_path / "swapped.pt")
    for name, message in (("two", "no running sums"), ("swapped", "are no statistics")):
        with pytest.raises(FileError, match=message):
            statistics.read_gaussian(tmp_path / f"{name}.pt")
