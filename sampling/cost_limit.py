"""From a limit on the cost of an image to the fraction of tokens to drop."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import UserError
from models.flops import TokenCounts, total_flops
from models.types import Architecture
from sampling.accounting import StepCounts
from sampling.budgets import Budget

# The largest fraction that is tried: of up to 1000 tokens it leaves the two ends.
LARGEST_FRACTION = 0.999


class CostPrediction(NamedTuple):
    """Mean TFLOP per image over all steps."""

    conditional: float
    unconditional: float

    @property
    def total(self) -> float:
        return self.conditional + self.unconditional


@dataclass(frozen=True)
class CostModel:
    """Predicts the cost of images under any budget from a few samples of which nothing was dropped."""

    network: Architecture
    undropped: list[StepCounts]  # what the router kept of these samples, at some timesteps by falling t
    timesteps: np.ndarray  # of the sampler whose cost is predicted
    guidance_interval: tuple[float, float] | None = None

    def predict(self, budget: Budget, uncond: Budget | None = None) -> CostPrediction:
        """Cost where each branch has its budget; without `uncond` both have the same."""
        low, high = self.guidance_interval or (-math.inf, math.inf)
        guided = self.timesteps[(low <= self.timesteps) & (self.timesteps <= high)]
        conditional = []
        unconditional = []
        for step in self.undropped:
            if step.conditional is not None:
                conditional.append(step.conditional)
            if step.unconditional is not None:
                unconditional.append(step.unconditional)
        # Samples without a class have the unconditional branch at every t
        if not conditional:
            return CostPrediction(0.0, self._branch_cost(unconditional, budget, self.timesteps))
        cost = self._branch_cost(conditional, budget, self.timesteps)
        if not unconditional:
            return CostPrediction(cost, 0.0)
        return CostPrediction(cost, self._branch_cost(unconditional, uncond or budget, guided))

    def _branch_cost(self, undropped: list[Tensor], budget: Budget, timesteps: np.ndarray) -> float:
        """TFLOP per image of one branch over these timesteps: what the samples cost, interpolated over t."""
        seen = torch.tensor([step.t for step in self.undropped])
        counts = torch.stack(undropped, 1).cpu()  # (samples, steps seen)
        kept = budget.kept_tokens(counts, seen.expand_as(counts)).double()
        if budget.token_count is None and self.network.min_tokens is not None:
            kept = kept.clamp(min=self.network.min_tokens)
        # Cost of one forward pass at each timestep that was seen
        cost = []
        for k in range(len(seen)):
            mean = kept[:, k].mean().item()
            mean_square = kept[:, k].square().mean().item()
            cost.append(total_flops(self.network, TokenCounts(mean, mean_square)))
        return float(np.interp(timesteps, seen.flip(0).numpy(), cost[::-1]).sum()) / 1e12


def smallest_fraction(cost: Callable[[float], float], limit: float, option: str) -> float:
    """The smallest fraction to drop, to three digits, at which `cost` (falling) does not exceed the limit.

    Raises:
        UserError: the limit is below the lowest cost; the message gives the range.
    """
    lowest = cost(LARGEST_FRACTION)
    if limit < lowest:
        full = cost(0.0)
        raise UserError(
            f"{option} {limit:g}: must be at least {lowest:.4g}; dropping nothing costs {full:.4g}"
        )
    # Bisection in thousandths: at `fits` the cost is within the limit, at `exceeds` it is above
    exceeds = -1
    fits = round(LARGEST_FRACTION * 1000)
    while fits - exceeds > 1:
        middle = (exceeds + fits) // 2
        if cost(middle / 1000) <= limit:
            fits = middle
        else:
            exceeds = middle
    return fits / 1000


def choose_fractions(model: CostModel, budget: Budget, uncond: Budget | None) -> tuple[Budget, Budget | None]:
    """The budgets of both branches with fractions in place of limits on the cost.

    The unconditional branch's own limit comes first; the image's limit then holds for both branches together.
    """
    if uncond is not None and uncond.unit == "tflops":
        # The conditional branch does not matter here
        fraction = smallest_fraction(
            lambda dropped: model.predict(Budget.fraction(dropped)).unconditional,
            float(uncond.value),
            uncond.option(unconditional=True),
        )
        uncond = Budget.fraction(fraction)
    if budget.unit == "tflops":
        fraction = smallest_fraction(
            lambda dropped: model.predict(Budget.fraction(dropped), uncond).total,
            float(budget.value),
            budget.option(),
        )
        budget = Budget.fraction(fraction)
    return budget, uncond
