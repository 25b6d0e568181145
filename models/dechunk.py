"""Dechunk: smooth the kept tokens over space, give each grid cell its nearest one, keep the router trainable.

The 2-D form of H-Net's smoothing module and upsampler (arXiv 2507.07955, equations 5 to 9; DC-DiT, section 3).
The plain form is `dechunk` in models/reference.py; how the steps are made fast is in models/ops/smoothing.py and
models/ops/distance.py.
"""

import torch
from torch import Tensor, nn

from grid import Grid
from models.ops.distance import nearest_token
from models.ops.smoothing import SpatialSmoothing, smooth_and_plug
from models.types import Packing, Routing

PROB_MARGIN = 1e-4  # as a weight, p is clamped to [margin, 1 - margin]


class Dechunk(nn.Module):
    """Processed tokens (T, D) and the residual (B, L, D) -> (B, L, D)."""

    def __init__(self, grid: Grid, sigma: float):
        super().__init__()
        self.grid = grid
        self.smoothing = SpatialSmoothing(grid, sigma)

    def forward(self, tokens: Tensor, residual: Tensor, routing: Routing, packing: Packing) -> Tensor:
        # How much of a kept token's value is its own, and how much comes from its neighbours
        prob = routing.prob.flatten()[packing.token_index]
        prob = prob.clamp(PROB_MARGIN, 1 - PROB_MARGIN)
        prob = prob[:, None].to(tokens.dtype)  # (T, 1)

        # The router's confidence in its own decision, whether or not a budget dropped the token. The output is
        # multiplied by it straight through: by 1, with the gradient of a factor
        confidence = torch.where(routing.boundary, routing.prob, 1 - routing.prob)  # (B, L)

        # Each cell takes the smoothed value of its nearest kept token
        nearest = nearest_token(routing.keep, self.grid)  # (B, L)
        gaussian_sum = self.smoothing.prepare(packing)
        return smooth_and_plug(tokens, residual, prob, confidence, nearest, gaussian_sum)
