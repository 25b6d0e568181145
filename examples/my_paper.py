"""A router, an objective, a loss term and an average of the weights of one's own.

    python train.py --import examples.my_paper --config configs/shapes.yaml --set model.router=centre

tries the router. docs/extending.md explains them all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import plugins
from diffusion.flow import euler, respaced
from diffusion.process import Objective, Process
from models.router import ControlRouter
from models.types import DenoiserOutput
from schema import NonNegativeInt
from training.batches import Batch
from training.losses import Term
from weights.averages import Average, AverageSettings


class CentreRouter(ControlRouter):
    """The tokens nearest to the centre."""

    def importance(self, features: Tensor, draw: Tensor) -> Tensor:
        batch, _, rows, columns = features.shape
        y = torch.linspace(-1, 1, rows, device=features.device)
        x = torch.linspace(-1, 1, columns, device=features.device)
        distance = (y[:, None] ** 2 + x**2) / 2
        return (1 - distance).flatten().expand(batch, -1)


def build_steep_flow(diffusion_steps: int, sampling_steps: int | None, **_: Any) -> Process:
    """A flow that spends most of its path in the noise."""
    return respaced(diffusion_steps, 5.0, sampling_steps)


class ConfidenceTerm(Term):
    """Pushes every token's probability away from 1/2."""

    def forward(self, output: DenoiserOutput, batch: Batch, step: int) -> Tensor:
        prob = output.routing.prob  # (B, L)
        return (prob * (1 - prob)).mean(1)


@dataclass(kw_only=True)
class MeanSettings(AverageSettings):
    """Settings of `MeanAverage`."""

    start: NonNegativeInt  # optimizer steps whose weights are left out


class MeanAverage(Average):
    """The mean of the weights after every step beyond `start` (SWA, arXiv 1803.05407)."""

    settings_type = MeanSettings

    def __init__(self, settings: MeanSettings, parameters: Mapping[str, Tensor]):
        super().__init__(settings, parameters)
        self.first_step = settings.start

    def update(self, parameters: Mapping[str, Tensor], step: int) -> None:
        for name, value in parameters.items():
            self.weights[name].lerp_(value, 1 / (step - self.first_step))


plugins.add_router("centre", CentreRouter)
plugins.add_term("confidence", ConfidenceTerm)
plugins.add_average("mean", MeanAverage)
plugins.add_objective(
    "steep_flow",
    Objective(build_steep_flow, {"steep-euler": euler}, default="steep-euler", fast="steep-euler"),
)
