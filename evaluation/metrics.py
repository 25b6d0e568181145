"""FID, sFID, Inception Score, precision and recall as formulas over features, with the conventions of the ADM evaluation suite
(Dhariwal and Nichol, arXiv 2105.05233). Everything is float64; where features come from is not this module's matter.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS = 3  # k of precision and recall
SPLIT = 5000  # images per split of the Inception Score; the last split may be smaller
BLOCK = 1024  # rows of a distance matrix in memory at a time


class Gaussian(NamedTuple):
    """Mean (D,) and unbiased covariance (D, D) of features, and the number of images behind them where it is known."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None


class Moments:
    """Mean and covariance of rows that arrive in parts.

    The parts are merged around their own means (Chan, Golub and LeVeque 1983), so that a large mean costs no digits.
    """

    def __init__(self, width: int):
        self.count, self.mean, self.scatter = 0, np.zeros(width), np.zeros((width, width))

    def add(self, rows: np.ndarray) -> None:
        """rows: (n, D), n > 0."""
        rows = rows.astype(np.float64)
        mean, total = rows.mean(0), self.count + len(rows)
        centred, step = rows - mean, mean - self.mean
        self.scatter += centred.T @ centred + np.outer(step, step) * (self.count * len(rows) / total)
        self.mean += step * (len(rows) / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Of at least two rows."""
        return Gaussian(self.mean, self.scatter / (self.count - 1), self.count)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)) (Heusel et al., arXiv 1706.08500).

    With factors C = F F^T the last trace is the sum of the singular values of F_a^T F_b: no matrix square root of a product
    that is not symmetric, and exact for covariances without full rank.
    """
    cross = np.linalg.svd(_factor(a.covariance).T @ _factor(b.covariance), compute_uv=False).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return float(np.square(a.mean - b.mean).sum() + spread)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """F (D, rank) with F F^T = covariance; eigenvalues that rounding cannot tell from zero are zero."""
    values, vectors = np.linalg.eigh(covariance)
    positive = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
    return vectors[:, positive] * np.sqrt(values[positive])


def inception_score(logits: np.ndarray) -> float:
    """exp of the mean KL divergence from the average class distribution, averaged over splits (Salimans et al., 1606.03498).

    logits: (N, K) in the order of the samples.
    """
    scores = []
    for part in torch.from_numpy(logits).double().split(SPLIT):
        log_p = part.log_softmax(1)
        log_mean = log_p.logsumexp(0) - np.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp().item())
    return float(np.mean(scores))


def class_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of samples that a classifier puts into the class they were asked for."""
    return float((logits.argmax(1) == labels).mean())


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991).

    A set's manifold is the union of balls around its members that reach to their k-th nearest neighbours. Precision is the
    share of samples on the reference's manifold, recall the share of the reference on the samples'.

    Args:
        reference: (M, D), M > NEIGHBOURS. samples: (N, D), N > NEIGHBOURS.
        device: one that knows float64.
    """
    centre = (
        torch.from_numpy(reference).double().mean(0)
    )  # distances do not see it, and rounding gets smaller
    a, b = ((torch.from_numpy(x).double() - centre).to(device) for x in (reference, samples))
    return covered(b, a, radii(a)), covered(a, b, radii(b))


def radii(points: Tensor) -> Tensor:
    """Squared distance of each point (N, D) to its k-th nearest neighbour, (N,)."""
    nearest = [
        squared_distances(part, points).topk(NEIGHBOURS + 1, largest=False).values
        for part in points.split(BLOCK)
    ]
    return torch.cat([distances[:, -1] for distances in nearest])  # a point is the nearest to itself


def covered(points: Tensor, centres: Tensor, squared_radii: Tensor) -> float:
    """Share of the points that lie in any of the balls, rims included."""
    inside = [(squared_distances(part, centres) <= squared_radii).any(1) for part in points.split(BLOCK)]
    return torch.cat(inside).double().mean().item()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m)."""
    return (a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)).clamp(min=0)
