"""FID, sFID, KID, Inception Score, precision and recall as formulas over features.

The conventions are those of the ADM evaluation suite (Dhariwal and Nichol, arXiv 2105.05233). All arithmetic
is float64. Where the features come from does not matter here.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.streams import rng
from models.ops.precision import tf32

NEIGHBOURS = 3  # k of precision and recall
SPLIT = 5000  # images per split of the Inception Score; the last split may be smaller
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
BLOCK = 1024  # rows of a distance matrix in memory at a time


@dataclass(frozen=True, eq=False)
class Gaussian:
    """The normal distribution with the mean and the covariance of a set of features."""

    mean: np.ndarray  # (D,)
    covariance: np.ndarray  # (D, D), unbiased
    count: int | None  # images behind the statistics, where it is known


class Moments:
    """Mean and covariance of rows that arrive in parts.

    Parts are merged around their own means (Chan, Golub and LeVeque 1983): a large mean costs no digits.
    """

    def __init__(self, width: int):
        self.count = 0
        self.mean = np.zeros(width)
        self.scatter = np.zeros((width, width))  # sum of (x - mean) (x - mean)^T

    def add(self, rows: np.ndarray) -> None:
        """rows: (n, D), n > 0."""
        rows = rows.astype(np.float64)
        mean = rows.mean(0)
        centred = rows - mean
        step = mean - self.mean
        total = self.count + len(rows)

        # Scatter within the new rows, and between them and the rows so far
        within = centred.T @ centred
        between = np.outer(step, step) * (self.count * len(rows) / total)
        self.scatter += within + between
        self.mean += step * (len(rows) / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """The statistics of all rows, of which there must be at least two."""
        return Gaussian(self.mean, self.scatter / (self.count - 1), self.count)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians: |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)).

    FID (Heusel et al. 2017, arXiv 1706.08500, equation 6) is this distance of pooled Inception features. sFID
    (Nash et al. 2021, arXiv 2103.03841) takes a spatial feature map in their place.

    With factors C = F F^T, the last trace is the sum of the singular values of F_a^T F_b. This needs no
    matrix square root of a product that is not symmetric, and is exact for covariances without full rank.
    """
    root_trace = np.linalg.svd(_factor(a.covariance).T @ _factor(b.covariance), compute_uv=False).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * root_trace
    shift = np.square(a.mean - b.mean).sum()
    # Rounding may leave a little less than nothing
    return max(float(shift + spread), 0.0)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """F (D, rank) with F F^T = covariance. Eigenvalues that rounding cannot tell from zero count as zero."""
    values, vectors = np.linalg.eigh(covariance)  # ascending
    threshold = len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
    positive = values > threshold
    return vectors[:, positive] * np.sqrt(values[positive])


class KernelDistance(NamedTuple):
    """KID over random subsets."""

    mean: float
    std: float | None  # of one subset's estimate; None where a side has no more images than a subset


def kernel_distance(
    reference: np.ndarray, samples: np.ndarray, device: torch.device | str = "cpu"
) -> KernelDistance:
    """KID (Bińkowski et al. 2018, arXiv 1801.01401): squared MMD with the kernel (x.y / D + 1)^3.

    It is the mean of the unbiased estimator over 100 pairs of random subsets. A subset has 1000 images, or all
    those of the smaller side if it has fewer. The expectation does not depend on the number of images, and a
    value may be negative.

    Args:
        reference: (M, D), M > 1. samples: (N, D), N > 1.
        device: must support float64.
    """
    known = torch.from_numpy(reference).double().to(device)
    drawn = torch.from_numpy(samples).double().to(device)
    size = min(KID_SUBSET_SIZE, len(known), len(drawn))
    # Where no side has more images than a subset, all subsets are the same
    subsets = 1 if size == len(known) == len(drawn) else KID_SUBSETS
    draw = rng(0, "KID")
    estimates = []
    for _ in range(subsets):
        one = torch.from_numpy(draw.permutation(len(known))[:size]).to(device)
        other = torch.from_numpy(draw.permutation(len(drawn))[:size]).to(device)
        estimates.append(squared_mmd(known[one], drawn[other]))
    has_spread = size < min(len(known), len(drawn))
    return KernelDistance(float(np.mean(estimates)), float(np.std(estimates)) if has_spread else None)


def squared_mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased estimator of the squared MMD of (n, D) and (m, D): no image is paired with itself."""
    within = 0.0
    for rows in (a, b):
        kernel = polynomial_kernel(rows, rows)
        pairs = len(rows) * (len(rows) - 1)
        within += ((kernel.sum() - kernel.trace()) / pairs).item()
    return within - 2 * polynomial_kernel(a, b).mean().item()


def polynomial_kernel(a: Tensor, b: Tensor) -> Tensor:
    """(x.y / D + 1)^3 for all pairs: (n, D), (m, D) -> (n, m)."""
    with tf32(False):
        products = a @ b.T
    return (products / a.shape[1] + 1) ** 3


def inception_score(logits: np.ndarray) -> float:
    """exp(E_x KL(p(y|x) || p(y))), averaged over splits of 5000 images.

    Source: Salimans et al. 2016, arXiv 1606.03498.

    Args:
        logits: (N, K) in the order of the samples.
    """
    scores = []
    for part in torch.from_numpy(logits).double().split(SPLIT):
        log_p = part.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - np.log(len(part))
        divergence = (log_p.exp() * (log_p - log_marginal)).sum(1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores))


def class_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of the samples that the classifier assigns to the class they were sampled for.

    Args:
        logits: (N, K). labels: (N,).
    """
    return float((logits.argmax(1) == labels).mean())


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, equations 1 and 2).

    The manifold of a set is the union of balls around its members, each of which reaches to the member's k-th
    nearest neighbour. Precision is the share of the samples on the reference's manifold. Recall is the share
    of the reference on the samples' manifold.

    Args:
        reference: (M, D), M > NEIGHBOURS. samples: (N, D), N > NEIGHBOURS.
        device: must support float64.
    """
    # Distances do not depend on the origin, and rounding is smallest around the mean
    centre = torch.from_numpy(reference).double().mean(0)
    known = (torch.from_numpy(reference).double() - centre).to(device)
    drawn = (torch.from_numpy(samples).double() - centre).to(device)
    precision = covered(drawn, known, squared_radii(known))
    recall = covered(known, drawn, squared_radii(drawn))
    return precision, recall


def squared_radii(points: Tensor) -> Tensor:
    """Squared distance of each point (N, D) to its k-th nearest neighbour: (N,)."""
    radii = []
    for part in points.split(BLOCK):
        # One more than k, because every point is the nearest to itself
        nearest = squared_distances(part, points).topk(NEIGHBOURS + 1, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def covered(points: Tensor, centres: Tensor, squared_radii: Tensor) -> float:
    """Share of the points (N, D) in any of the closed balls with centres (M, D) and squared radii (M,)."""
    inside = []
    for part in points.split(BLOCK):
        within = squared_distances(part, centres) <= squared_radii
        inside.append(within.any(1))
    return torch.cat(inside).double().mean().item()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m)."""
    with tf32(False):
        products = a @ b.T
    distances = a.square().sum(1)[:, None] - 2 * products + b.square().sum(1)
    return distances.clamp(min=0)
