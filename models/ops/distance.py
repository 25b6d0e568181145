"""The nearest kept cell of every cell: an exact distance transform. Twin: `nearest_kept` in models/reference.py."""

import torch
from torch import Tensor


def nearest_token(keep: Tensor) -> Tensor:
    """For each grid cell the packed number of its nearest kept token: (B, L) bool -> (B, L) int64."""
    batch, length = keep.shape
    packed_number = keep.flatten().cumsum(0) - 1  # of each kept cell
    first_cell = torch.arange(batch, device=keep.device)[:, None] * length
    return packed_number[first_cell + nearest_kept(keep)]


@torch.no_grad()
def nearest_kept(keep: Tensor) -> Tensor:
    """Raster index of the nearest kept cell, Euclidean, ties to the lowest index: (B, L) bool -> (B, L) int64.

    Two passes: the nearest kept row within each column, then the best column for each cell. Distance and
    index travel in one integer, key = distance^2 * L + index, so that the smallest key decides both.

    Example: S = 2, L = 4, kept cells 0 (row 0, column 0) and 3 (row 1, column 1). The cell in row 1, column 0:
        first pass, column 0: row 0 is kept, key 1^2 * 4 + 0 = 4
        first pass, column 1: row 1 is kept, key 0^2 * 4 + 3 = 3
        second pass: its own column has 4, column 1 is one further and has 3 + 1^2 * 4 = 7
        the smallest is 4, and 4 % L = 0: cell 0 is nearest, and the tie with cell 3 went to the lower index
    """
    batch, length = keep.shape
    side = int(length**0.5)
    # Keys stay below (2.5 S)^2 L for an empty column plus S^2 L across: 7.25 S^4, which int32 holds up to S = 128
    place = torch.arange(side, device=keep.device, dtype=torch.int32 if side <= 128 else torch.int64)
    row = place[:, None]
    keep = keep.view(batch, side, side)

    # The nearest kept row within each column. An empty column is `far` away: its square is more than any distance^2
    far = side + side // 2
    above = torch.where(keep, row, -far).cummax(1).values
    from_below = torch.where(keep, row, far + side).flip(1)
    below = from_below.cummin(1).values.flip(1)
    # A tie goes to the upper row, whose index is lower
    nearest = torch.where(row - above <= below - row, above, below)
    row_distance = nearest - row
    index = nearest.clamp(0, side - 1) * side + place
    key = row_distance**2 * length + index  # (B, row, column)

    # The best column for each cell
    column_distance = place[:, None] - place
    across = column_distance**2 * length  # (column, candidate column)
    candidates = key[:, :, None, :] + across  # (B, row, column, candidate column)
    best = candidates.amin(-1)

    # The index is what remains of the key without its distance
    nearest_index = best % length
    return nearest_index.flatten(1).long()
