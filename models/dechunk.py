"""Dechunk: smooth the kept tokens over space, plug each grid cell with its nearest kept token, keep the router trainable.

Smoothing uses that the Gaussian kernel over a grid is a product of a row and a column kernel: kept tokens are put on the
grid and two (S, S) matrix products give exactly the sum over all pairs of kept tokens, with no (T, T) matrix.
"""

import torch
from torch import Tensor, nn

from models.packing import unpack
from models.types import Packing, Routing

PROB_MARGIN = 1e-4  # p is clamped to [margin, 1 - margin] as a mixing weight


class Dechunk(nn.Module):
    """Processed tokens (T, D) -> (B, L, D)."""

    def __init__(self, side: int, sigma: float):
        super().__init__()
        offset = torch.arange(side, dtype=torch.float64)
        kernel = torch.exp(-((offset[:, None] - offset) ** 2) / (2 * sigma**2))
        self.register_buffer("kernel", kernel.float(), persistent=False)  # (S, S), symmetric

    def forward(self, tokens: Tensor, routing: Routing, packing: Packing) -> Tensor:
        prob = routing.prob.flatten()[packing.index].clamp(PROB_MARGIN, 1 - PROB_MARGIN)[:, None]  # (T, 1)
        smooth = self.smooth(prob * tokens, packing) / (self.smooth(prob, packing) + 1e-8)
        mixed = prob * tokens + (1 - prob) * smooth
        plugged = mixed[nearest_token(routing.keep)]  # (B, L, D)
        return plugged * straight_through(routing)[:, :, None]

    def smooth(self, values: Tensor, packing: Packing) -> Tensor:
        """Gaussian sum over the kept tokens of the same sample: (T, D) -> (T, D)."""
        side = len(self.kernel)
        grid = unpack(values, packing, side * side)
        grid = self.kernel @ grid.view(-1, side, side * values.shape[1])  # over rows
        grid = self.kernel @ grid.view(-1, side, values.shape[1])  # over columns
        return grid.flatten(0, 1)[packing.index]


def straight_through(routing: Routing) -> Tensor:
    """Exactly 1 (B, L), with the gradient of the confidence in each token's own decision: p where kept, else 1 - p."""
    confidence = torch.where(routing.natural, routing.prob, 1 - routing.prob)
    return 1 + (confidence - confidence.detach())


def nearest_token(keep: Tensor) -> Tensor:
    """For each grid cell the packed number of its nearest kept token: (B, L) bool -> (B, L) int64."""
    batch, length = keep.shape
    number = keep.flatten().cumsum(0) - 1  # packed number of each kept cell
    first = torch.arange(batch, device=keep.device)[:, None] * length
    return number[first + nearest_kept(keep)]


@torch.no_grad()
def nearest_kept(keep: Tensor) -> Tensor:
    """Raster index of the nearest kept cell, Euclidean, ties to the lowest index: (B, L) bool -> (B, L) int64.

    An exact distance transform in two passes: the nearest kept row within each column, then the best column. Distance and
    index travel in one integer, distance^2 * L + index, so that its minimum decides both.
    """
    batch, length = keep.shape
    side = int(length**0.5)
    place = torch.arange(side, device=keep.device)
    row = place[:, None]
    keep = keep.view(batch, side, side)
    far = 4 * side  # further than any two cells are apart: marks an empty column
    above = torch.where(keep, row, -far).cummax(1).values
    below = torch.where(keep, row, far + side).flip(1).cummin(1).values.flip(1)
    nearest = torch.where(row - above <= below - row, above, below)  # ties: the upper row has the lower index
    key = (nearest - row) ** 2 * length + nearest.clamp(0, side - 1) * side + place  # (B, row, column)
    across = (place[:, None] - place) ** 2 * length  # (column, candidate column)
    return ((key[:, :, None, :] + across).amin(-1) % length).flatten(1)
