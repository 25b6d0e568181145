"""Averages of the weights whose length is chosen after training (EDM2, arXiv 2312.02696, section 3).

A power-function average weighs the weights of step s, seen from step t, by (s / t)^gamma. Its length is the
standard deviation of that profile relative to t. Training tracks a few such averages and writes snapshots of them.
From these, any other length is put together by least squares between the profiles.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from config import UserError
from data.files import write_file

FOLDER = "posthoc"  # in the folder of a run
LONGEST = 0.28  # the uniform average has 1 / sqrt(12) = 0.289


class Snapshot(NamedTuple):
    """One average at one step."""

    step: int
    std: float


class PowerAverages:
    """Power-function averages of a model in training, one for each relative standard deviation."""

    def __init__(self, model: nn.Module, stds: Sequence[float]):
        self.exponents = {std: exponent(std) for std in stds}
        self.weights: dict[float, dict[str, Tensor]] = {}
        for std in stds:
            self.weights[std] = {name: value.detach().clone() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Follow the weights after optimizer step number `step`, counted from 1."""
        current = [value.detach() for _, value in model.named_parameters()]
        for std, weights in self.weights.items():
            kept = (1 - 1 / step) ** (self.exponents[std] + 1)
            torch._foreach_lerp_(list(weights.values()), current, 1 - kept)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Standard deviation as text -> the weights."""
        return {str(std): weights for std, weights in self.weights.items()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Continue from `state_dict`. Raises UserError for an average that the checkpoint does not have."""
        for std, weights in self.weights.items():
            if str(std) not in state:
                raise UserError(
                    f"training.posthoc_ema_stds: {std} is not tracked in the checkpoint, and an average cannot "
                    f"start in the middle; it has {[float(known) for known in state]}"
                )
            for name, value in state[str(std)].items():
                weights[name].copy_(value)

    def save_snapshot(self, run: Path, step: int) -> None:
        """Write all averages in half precision; reconstruction needs many of them, and they are never removed."""
        folder = run / FOLDER
        if self.weights:
            folder.mkdir(exist_ok=True)
        for std, weights in self.weights.items():
            halves = {name: value.half() for name, value in weights.items()}
            write = functools.partial(torch.save, halves)
            write_file(folder / f"{step:07d}-{std}.pt", write)


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


def mixture(snapshots: Sequence[Snapshot], target: Snapshot) -> np.ndarray:
    """Weights of the snapshots whose sum comes nearest to the target profile: (n,) float64."""
    products = np.array([[overlap(one, other) for other in snapshots] for one in snapshots])
    with_target = np.array([overlap(one, target) for one in snapshots])
    return np.linalg.lstsq(products, with_target, rcond=1e-12)[0]


def residual(snapshots: Sequence[Snapshot], target: Snapshot) -> float:
    """Distance of the best mixture to the target profile, relative to the target's norm."""
    weights = mixture(snapshots, target)
    products = np.array([[overlap(one, other) for other in snapshots] for one in snapshots])
    with_target = np.array([overlap(one, target) for one in snapshots])
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
