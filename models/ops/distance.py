"""The nearest kept cell of every cell: an exact distance transform. Twin: `nearest_kept` in models/reference.py."""

import torch
from torch import Tensor

from grid import Grid


def nearest_token(keep: Tensor, grid: Grid) -> Tensor:
    """For each grid cell the packed number of its nearest kept token: (B, L) bool -> (B, L) int64."""
    batch, length = keep.shape
    packed_number = keep.flatten().cumsum(0) - 1  # of each kept cell
    first_cell = torch.arange(batch, device=keep.device)[:, None] * length
    return packed_number[first_cell + nearest_kept(keep, grid)]


@torch.no_grad()
def nearest_kept(keep: Tensor, grid: Grid) -> Tensor:
    """Raster index of the nearest kept cell, Euclidean, ties to the lowest index: (B, L) bool -> (B, L) int64.

    Two passes: the nearest kept row within each column, then the best column for each cell. Distance and
    index travel in one integer, key = distance^2 * L + index, so that the smallest key decides both.

    Example: 2 rows, 2 columns, kept cells 0 (row 0, column 0) and 3 (row 1, column 1). The cell in row 1, column 0:
        first pass, column 0: row 0 is kept, key 1^2 * 4 + 0 = 4
        first pass, column 1: row 1 is kept, key 0^2 * 4 + 3 = 3
        second pass: its own column has 4, column 1 is one further and has 3 + 1^2 * 4 = 7
        the smallest is 4, and 4 % L = 0: cell 0 is nearest, and the tie with cell 3 went to the lower index
    """
    rows, columns = grid
    length = grid.cells
    keep = keep.view(-1, rows, columns)
    # An empty column is `far` away: its square is more than any distance^2
    longest = max(grid)
    far = longest + longest // 2
    # Keys stay below (far + rows)^2 L for an empty column plus columns^2 L across
    largest_key = ((far + rows) ** 2 + columns**2) * length
    dtype = torch.int32 if largest_key < 2**31 else torch.int64
    row = torch.arange(rows, device=keep.device, dtype=dtype)[:, None]
    column = torch.arange(columns, device=keep.device, dtype=dtype)

    # The nearest kept row within each column
    above = torch.where(keep, row, -far).cummax(1).values
    from_below = torch.where(keep, row, far + rows).flip(1)
    below = from_below.cummin(1).values.flip(1)
    # A tie goes to the upper row, whose index is lower
    nearest = torch.where(row - above <= below - row, above, below)
    row_distance = nearest - row
    index = nearest.clamp(0, rows - 1) * columns + column
    key = row_distance**2 * length + index  # (B, row, column)

    # The best column for each cell
    column_distance = column[:, None] - column
    across = column_distance**2 * length  # (column, candidate column)
    candidates = key[:, :, None, :] + across  # (B, row, column, candidate column)
    best = candidates.amin(-1)

    # The index is what remains of the key without its distance
    nearest_index = best % length
    return nearest_index.flatten(1).long()
