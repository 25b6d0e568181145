"""Averages of the weights whose length is chosen after training (EDM2, arXiv 2312.02696, section 3).

A power-function average weighs the weights of step s, seen from step t, by (s / t)^gamma. Its length is the
standard deviation of that profile relative to t. Training tracks a few such averages and writes snapshots of them.
From these, any other length is put together by least squares between the profiles.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import UserError

FOLDER = "posthoc"  # in the folder of a run
LONGEST = 0.28  # the uniform average has 1 / sqrt(12) = 0.289


class Snapshot(NamedTuple):
    """One average at one step."""

    step: int
    std: float


def exponent(std: float) -> float:
    """gamma of the profile with this relative standard deviation.

    std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)); the positive root of this cubic is the only one of use.
    """
    inverse = std**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots.real.max())


def overlap(one: Snapshot, other: Snapshot) -> float:
    """The integral of the product of two profiles (each integrates to 1)."""
    a = exponent(one.std)
    b = exponent(other.std)
    # Profiles are (g + 1) s^g / t^(g + 1) up to t. In logarithms, because steps to such powers overflow
    least = min(one.step, other.step)
    logarithm = np.log(a + 1) + np.log(b + 1) - np.log(a + b + 1)
    logarithm += (a + b + 1) * np.log(least) - (a + 1) * np.log(one.step) - (b + 1) * np.log(other.step)
    return float(np.exp(logarithm))


def overlaps(snapshots: Sequence[Snapshot], target: Snapshot) -> tuple[np.ndarray, np.ndarray]:
    """Overlaps of the snapshots with each other (n, n), and with the target (n,)."""
    products = np.array([[overlap(one, other) for other in snapshots] for one in snapshots])
    with_target = np.array([overlap(one, target) for one in snapshots])
    return products, with_target


def mixture(snapshots: Sequence[Snapshot], target: Snapshot) -> np.ndarray:
    """Weights of the snapshots whose sum comes nearest to the target profile: (n,) float64."""
    products, with_target = overlaps(snapshots, target)
    return np.linalg.lstsq(products, with_target, rcond=1e-12)[0]


def residual(snapshots: Sequence[Snapshot], target: Snapshot) -> float:
    """Distance of the best mixture to the target profile, relative to the target's norm."""
    weights = mixture(snapshots, target)
    products, with_target = overlaps(snapshots, target)
    norm = overlap(target, target)
    square = norm - 2 * weights @ with_target + weights @ products @ weights
    return float(max(square, 0) / norm) ** 0.5


def list_snapshots(run: Path, last_step: int | None = None) -> dict[Snapshot, Path]:
    """The snapshots of a run up to a step, by step and length.

    Raises:
        UserError: there are none.
    """
    found = {}
    for path in sorted((run / FOLDER).glob("*.pt")):
        match = re.fullmatch(r"(\d{7,})-([\d.]+)", path.stem)
        if match and (last_step is None or int(match[1]) <= last_step):
            found[Snapshot(int(match[1]), float(match[2]))] = path
    if not found:
        raise UserError(
            f"'{run}' has no snapshots in {FOLDER}/; train with training.posthoc_ema_stds, e.g. [0.05, 0.1]"
        )
    return found


def reconstruct(files: dict[Snapshot, Path], target: Snapshot) -> dict[str, Tensor]:
    """The average with the target's length at the target's step: name -> float32 weights."""
    total: dict[str, Tensor] = {}
    for weight, path in zip(mixture(list(files), target), files.values()):
        content = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in content.items():
            share = weight * value.double()
            total[name] = total[name] + share if name in total else share
    return {name: value.float() for name, value in total.items()}
