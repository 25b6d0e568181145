"""A router, an objective and a loss term of one's own. Try them:

python train.py --import examples.my_paper --config configs/shapes.yaml --set model.router=centre
"""

from typing import Any

import torch
from torch import Tensor

import plugins
from diffusion.flow import euler, respaced
from diffusion.process import Objective, Process
from models.router import ControlRouter
from models.types import DenoiserOutput
from training.batches import Batch
from training.losses import Term


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


plugins.add_router("centre", CentreRouter)
plugins.add_term("confidence", ConfidenceTerm)
plugins.add_objective(
    "steep_flow",
    Objective(build_steep_flow, {"steep-euler": euler}, default="steep-euler", fast="steep-euler"),
)
