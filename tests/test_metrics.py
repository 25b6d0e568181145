"""Every metric against an independent computation of its definition."""

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch

from evaluation import metrics
from evaluation.metrics import (
    Gaussian,
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

NUMBERS = np.random.default_rng(0)


def covariance(width: int, images: int) -> np.ndarray:
    return np.cov(NUMBERS.standard_normal((images, width)) * np.linspace(0.1, 3, width), rowvar=False)


def gaussian(width: int, images: int) -> Gaussian:
    return Gaussian(NUMBERS.standard_normal(width), covariance(width, images), images)


def test_frechet_distance_of_independent_features():
    """Diagonal covariances: |m_a - m_b|^2 + sum of (std_a - std_b)^2."""
    a, b = ((NUMBERS.standard_normal(50), NUMBERS.uniform(0.1, 4, 50)) for _ in range(2))
    expected = np.square(a[0] - b[0]).sum() + np.square(a[1] - b[1]).sum()
    ours = frechet_distance(*(Gaussian(mean, np.diag(std**2), None) for mean, std in (a, b)))
    assert ours == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_two_features():
    """2 x 2: tr (AB)^(1/2) = (tr AB + 2 (det AB)^(1/2))^(1/2), for covariances that do not commute."""
    for _ in range(10):
        a, b = gaussian(2, 10), gaussian(2, 10)
        product = a.covariance @ b.covariance
        root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
        expected = (
            np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root
        )
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_equals_the_matrix_square_root():
    a, b = gaussian(120, 500), gaussian(120, 400)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-12)


def test_frechet_distance_without_full_rank():
    """Fewer images than features: equal to the distance within the space that they span."""
    low, turn = (
        [gaussian(5, 40) for _ in range(2)],
        scipy.linalg.qr(NUMBERS.standard_normal((60, 60)))[0][:, :5],
    )
    high = [Gaussian(turn @ a.mean, turn @ a.covariance @ turn.T, a.count) for a in low]
    assert frechet_distance(*high) == pytest.approx(frechet_distance(*low), rel=1e-9)


@pytest.mark.parametrize("images", [20, 300])
def test_a_set_has_no_distance_from_itself(images):
    a = gaussian(100, images)
    assert abs(frechet_distance(a, a)) < 1e-10 * np.trace(a.covariance)


def test_moments_in_parts_are_those_at_once():
    rows = (NUMBERS.standard_normal((1000, 30)) + 100).astype(np.float32)
    moments = Moments(30)
    for part in np.split(rows, [1, 2, 50, 700]):
        moments.add(part)
    ours = moments.gaussian()
    assert ours.count == 1000
    assert np.abs(ours.mean - rows.astype(np.float64).mean(0)).max() < 1e-12
    assert np.abs(ours.covariance - np.cov(rows.astype(np.float64), rowvar=False)).max() < 1e-12


def test_inception_score_by_its_definition():
    """exp(E KL(p(y|x) || p(y))) in splits of 5000; the last one is shorter."""
    logits = (3 * NUMBERS.standard_normal((12_000, 20))).astype(np.float32)
    p = scipy.special.softmax(logits.astype(np.float64), axis=1)
    scores = []
    for part in (p[:5000], p[5000:10_000], p[10_000:]):
        scores.append(np.exp(scipy.stats.entropy(part, part.mean(0)[None], axis=1).mean()))
    assert inception_score(logits) == pytest.approx(np.mean(scores), rel=1e-10)
    assert inception_score(1000 * np.eye(7, dtype=np.float32)) == pytest.approx(
        7
    )  # probabilities of exactly 0 and 1
    assert inception_score(np.ones((9, 7), dtype=np.float32)) == pytest.approx(1)


def kernel(x: np.ndarray, y: np.ndarray) -> float:
    return (float(x @ y) / len(x) + 1) ** 3


def squared_mmd_by_pairs(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased estimator with one pair at a time."""
    within = 0.0
    for rows in (a, b):
        others = [kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        within += sum(others) / len(others)
    between = [kernel(x, y) for x in a for y in b]
    return within - 2 * sum(between) / len(between)


def test_kid_of_all_images_equals_a_sum_over_pairs():
    reference = NUMBERS.standard_normal((23, 5)).astype(np.float32)
    samples = (0.5 + NUMBERS.standard_normal((23, 5))).astype(np.float32)
    found = kernel_distance(reference, samples)
    expected = squared_mmd_by_pairs(reference.astype(np.float64), samples.astype(np.float64))
    assert found.mean == pytest.approx(expected, rel=1e-12)
    assert found.std is None
    # The smaller side has no spread, but the subsets of the larger one differ
    fewer = kernel_distance(reference[:9], samples)
    assert fewer.std is None and fewer.mean != kernel_distance(reference[:9], samples[:9]).mean


def test_kid_is_unbiased():
    """Two halves of one set: the mean over subsets is near 0, and single estimates lie on both sides."""
    estimates = []
    for _ in range(60):
        rows = torch.from_numpy(NUMBERS.standard_normal((40, 8)))
        estimates.append(metrics.squared_mmd(rows[:20], rows[20:]))
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates)) < 3 * error
    assert min(estimates) < 0 < max(estimates)


def test_kid_of_subsets_is_that_of_all_images(monkeypatch):
    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", 200)
    reference = NUMBERS.standard_normal((1500, 4))
    samples = NUMBERS.standard_normal((1200, 4)) + 0.5
    together = metrics.squared_mmd(torch.from_numpy(reference), torch.from_numpy(samples))
    found = kernel_distance(reference, samples)
    assert found.std is not None
    assert abs(found.mean - together) < 4 * found.std / np.sqrt(metrics.KID_SUBSETS)
    assert kernel_distance(reference, samples) == found


def brute_force(reference: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    """Precision and recall with one distance at a time."""

    def reach(points):  # distance to the third nearest other point
        return [
            sorted(np.linalg.norm(p - q) for j, q in enumerate(points) if j != i)[2]
            for i, p in enumerate(points)
        ]

    def share(points, centres):
        balls = list(zip(centres, reach(centres)))
        inside = [any(np.linalg.norm(p - centre) <= radius for centre, radius in balls) for p in points]
        return sum(inside) / len(inside)

    return share(samples, reference), share(reference, samples)


def test_precision_and_recall_equal_brute_force(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 7)  # several blocks, the last one smaller
    for shift in (0.0, 1.0, 3.0):
        reference = NUMBERS.standard_normal((40, 3)).astype(np.float32) + 50
        samples = (0.7 * NUMBERS.standard_normal((31, 3)) + 50 + shift).astype(np.float32)
        ours = precision_recall(reference, samples)
        assert ours == pytest.approx(
            brute_force(reference.astype(np.float64), samples.astype(np.float64)), abs=1e-12
        )
    assert ours[0] < 0.1  # three standard deviations away
    assert precision_recall(reference, reference) == (1.0, 1.0)


def test_precision_and_recall_tell_fidelity_from_coverage():
    centres = np.repeat([[0.0], [100.0]], 50, axis=0)
    reference = (centres + NUMBERS.standard_normal((100, 1))).astype(np.float32)
    one_mode = NUMBERS.standard_normal((100, 1)).astype(np.float32)
    precision, recall = precision_recall(reference, one_mode)
    assert precision > 0.9 and 0.4 < recall <= 0.5


def test_class_accuracy():
    assert metrics.class_accuracy(np.eye(4)[[0, 1, 2, 2]], np.array([0, 1, 3, 2])) == 0.75


def test_distances_to_a_far_away_cloud_keep_their_digits():
    a, b = (torch.from_numpy(NUMBERS.standard_normal((20, 4)) + 10) for _ in range(2))
    assert torch.allclose(metrics.squared_distances(a, b), torch.cdist(a, b).square(), atol=1e-11)
