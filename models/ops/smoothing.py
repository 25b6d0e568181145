"""Smoothing and plug-back of the dechunk layer. Twins: `smooth` and `dechunk` in models/reference.py.

Smoothing is a Gaussian sum over the kept tokens of a sample. There are two ways, each fast on its device:
    neighbour lists (CPU)      for each token the kept tokens near it: all with a weight above float32's epsilon
    grid products (others)     the kernel is a product of a row and a column kernel: the kept tokens are put on the
                               grid, and a product per axis gives the sum over all pairs
Neither has a (T, T) matrix. The lists' length depends on the data, so a GPU would have to wait for it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grid import Grid
from models.packing import unpack
from models.types import Packing

REACH = 5.65  # radius of the neighbour lists in sigma: a weight beyond it is below 1.2e-7

# Values (T, D), factors (T, 1) -> (T, D): the Gaussian sum of values times factors over the kept tokens of a
# sample.
GaussianSum = Callable[[Tensor, Tensor], Tensor]


class SpatialSmoothing(nn.Module):
    """The Gaussian kernel between the cells of a grid, prepared for both ways of summing."""

    row_kernel: Tensor
    column_kernel: Tensor
    disc: Tensor

    def __init__(self, grid: Grid, sigma: float):
        super().__init__()
        self.grid = grid
        self.sigma = sigma  # in latent cells
        # Between rows (rows, rows) and between columns (columns, columns); both are symmetric
        self.register_buffer("row_kernel", gaussian_kernel(grid.rows, sigma).float(), persistent=False)
        self.register_buffer("column_kernel", gaussian_kernel(grid.columns, sigma).float(), persistent=False)

        # The rows of a disc around a token, up or down, and how many columns each reaches to either side
        radius = REACH * sigma
        height = min(int(radius), grid.rows - 1)
        disc = [(row, int((radius**2 - row**2) ** 0.5)) for row in range(-height, height + 1)]
        self.register_buffer("disc", torch.tensor(disc), persistent=False)  # (R, 2), R rows of the disc

    def prepare(self, packing: Packing) -> GaussianSum:
        """The Gaussian sum over these kept tokens, in the way that is fast on their device."""
        if self.sigma == 0:
            return torch.mul  # each token alone
        if packing.token_index.is_cpu:
            neighbours = find_neighbours(packing, self.row_kernel, self.column_kernel, self.disc)
            return functools.partial(sum_neighbours, neighbours)
        return functools.partial(self.sum_on_grid, packing)

    def sum_on_grid(self, packing: Packing, values: Tensor, factor: Tensor) -> Tensor:
        """Values (T, D), factors (T, 1) -> (T, D) by a product with the kernel of each axis on the full grid."""
        rows, columns = self.grid
        width = values.shape[1]
        cells = unpack(values * factor, packing, self.grid.cells)
        cells = self.row_kernel @ cells.view(-1, rows, columns * width)
        cells = self.column_kernel @ cells.view(-1, columns, width)
        sums = cells.flatten(0, 1).index_select(0, packing.token_index)
        return sums.to(values.dtype)  # autocast may have rounded the products


def gaussian_kernel(length: int, sigma: float) -> Tensor:
    """exp(-(i - j)^2 / (2 sigma^2)): (length, length); the identity at sigma 0."""
    place = torch.arange(length, dtype=torch.float64)
    distance = place[:, None] - place
    return torch.exp(-(distance**2) / (2 * sigma**2)) if sigma else torch.eye(length)


class Neighbours(NamedTuple):
    """For each of T kept tokens the kept tokens near it, itself included, one list after another."""

    neighbour: Tensor  # (pairs,) int32, packed numbers
    weight: Tensor  # (pairs,) float32, Gaussian weights
    start: Tensor  # (T + 1,) int32, where each list starts; the last entry is the end of all


@torch.no_grad()
def find_neighbours(packing: Packing, row_kernel: Tensor, column_kernel: Tensor, disc: Tensor) -> Neighbours:
    """The kept tokens of the same sample within `disc` (R, 2), weighted by the product of both kernels.

    row_kernel: (rows, rows). column_kernel: (columns, columns).

    Kept tokens are packed in raster order. Those in one row of the disc therefore have consecutive packed
    numbers, and a token's list is R runs of them, each given by its first number and its count.

    Example: a 3 x 3 grid keeps cells 0, 4, 5 and 8, which get the packed numbers 0, 1, 2 and 3. For cell 4
    (row 1, column 1) and a disc of 3 rows that reach 0, 1 and 0 columns, the runs are: row 0, column 1: none;
    row 1, columns 0 to 2: first 1, count 2; row 2, column 1: none. Its list is [1, 2], with the weights
    exp(0) and exp(-1 / (2 sigma^2)).
    """
    rows = len(row_kernel)
    columns = len(column_kernel)
    cells = len(packing.lengths) * packing.max_length
    disc_row, disc_reach = disc.unbind(1)  # (R,) each

    # How many kept tokens lie before each cell of the batch
    is_kept = torch.zeros(cells + 1, dtype=torch.int64)
    is_kept[packing.token_index + 1] = 1
    kept_before = is_kept.cumsum(0)

    # The cells of each run: a part of one row of the grid
    column = packing.token_index % columns  # (T,)
    row = (packing.token_index // columns % rows)[:, None] + disc_row  # (T, R)
    row_start = (packing.token_index - column)[:, None] + disc_row * columns
    left = (column[:, None] - disc_reach).clamp(min=0)
    right = (column[:, None] + disc_reach + 1).clamp(max=columns)

    # The kept tokens of each run; rows outside the grid have none
    first = kept_before.take((row_start + left).clamp(0, cells))
    count = kept_before.take((row_start + right).clamp(0, cells)) - first
    count = count.where((row >= 0) & (row < rows), 0)

    # Write the runs out, one list after another
    first = first.flatten()  # (T * R,)
    count = count.flatten()
    end = count.cumsum(0)
    run = torch.repeat_interleave(count)  # (pairs,): which run a pair belongs to
    neighbour = torch.arange(len(run)) + (first - end + count).index_select(0, run)

    # A pair's weight is the product of the kernel along columns and along rows
    own_column = column.repeat_interleave(len(disc)).index_select(0, run)
    across = (column.index_select(0, neighbour) - own_column).abs_()
    down_weight = row_kernel[0][disc_row.abs()].repeat(len(column)).index_select(0, run)
    weight = column_kernel[0].index_select(0, across).mul_(down_weight)

    list_ends = end[len(disc) - 1 :: len(disc)]
    return Neighbours(neighbour.int(), weight, F.pad(list_ends, (1, 0)).int())


def sum_neighbours(near: Neighbours, values: Tensor, factor: Tensor) -> Tensor:
    """Values (T, D), factors (T, 1) -> (T, D): each token's weighted sum over its list."""
    weight = factor.flatten().index_select(0, near.neighbour).mul_(near.weight)
    return F.embedding_bag(
        near.neighbour,
        values.detach(),  # with a gradient, embedding_bag would also prepare its own backward pass
        near.start,
        mode="sum",
        per_sample_weights=weight,
        include_last_offset=True,
    )


def smooth_and_plug(
    tokens: Tensor,
    residual: Tensor,
    prob: Tensor,
    confidence: Tensor,
    nearest: Tensor,
    gaussian_sum: GaussianSum,
) -> Tensor:
    """Mix each kept token with the smoothed ones by its probability, plug every cell, and add the residual.

    A cell's value is multiplied by its confidence "straight through" (H-Net, equation 7): by 1, with the
    gradient of a factor.

    Args:
        tokens: (T, D). residual: (B, L, D). prob: (T, 1), in the precision of tokens.
        confidence: (B, L). nearest: (B, L) int64, packed number of each cell's nearest kept token.

    Returns:
        (B, L, D).
    """
    return _SmoothAndPlug.apply(tokens, residual, prob, confidence, nearest, gaussian_sum)


class _SmoothAndPlug(torch.autograd.Function):
    """Smoothing, mixing and plug-back.

    With G the Gaussian kernel between kept tokens, p their probabilities, and w = G p:

        s = G (p u) / w                 smoothed tokens
        v = p u + (1 - p) s             mixed tokens
        h[cell] = v[nearest[cell]] + residual[cell]

    The backward pass is written out because next to nothing needs to be kept if it smooths once more, and
    because G is symmetric: the gradient of a Gaussian sum is a Gaussian sum again. With g the gradient of v,
    `share` = (1 - p) / w, and . the dot product over D:

        grad u = p (g + G (share g))
        grad p = g . (u - s) + u . G (share g) - G (share (g . s))
        grad confidence[cell] = grad h[cell] . v[nearest[cell]]
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        residual: Tensor,
        prob: Tensor,
        confidence: Tensor,
        nearest: Tensor,
        gaussian_sum: GaussianSum,
    ) -> Tensor:
        weight = gaussian_sum(torch.ones_like(prob), prob) + 1e-8
        smooth = gaussian_sum(tokens, prob).div_(weight)
        mixed = smooth.lerp_(tokens, prob)
        plugged = mixed.index_select(0, nearest.flatten()).view(*nearest.shape, -1)

        ctx.save_for_backward(tokens, prob, weight, nearest)
        ctx.gaussian_sum = gaussian_sum
        ctx.residual_dtype = residual.dtype
        return plugged.add_(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, prob, weight, nearest = ctx.saved_tensors
        cell_grad = grad.flatten(0, 1)  # (B L, D)
        cell_token = nearest.flatten()
        own = torch.arange(len(tokens), device=tokens.device)

        # Back through the plug: straight to the confidence, and summed over the cells of each token
        smooth = ctx.gaussian_sum(tokens, prob).div_(weight)
        grad_confidence = row_products(cell_grad, torch.lerp(smooth, tokens, prob), cell_token)
        grad_mixed = sum_by_token(cell_grad, cell_token, len(tokens))

        # Back through the mix
        along_tokens = row_products(grad_mixed, tokens, own)  # (T,)
        along_smooth = row_products(grad_mixed, smooth, own)
        del smooth  # another tensor of its size follows

        # Back through the smoothing
        share = (1 - prob) / weight
        grad_weighted = ctx.gaussian_sum(grad_mixed, share)  # of p u
        grad_prob = along_tokens - along_smooth + row_products(grad_weighted, tokens, own)
        grad_prob = grad_prob[:, None] - ctx.gaussian_sum(along_smooth[:, None], share)
        grad_tokens = grad_weighted.add_(grad_mixed).mul_(prob)

        grad_residual = grad.to(ctx.residual_dtype)
        return grad_tokens, grad_residual, grad_prob, grad_confidence.view(nearest.shape), None, None


def row_products(rows: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Dot products over D of rows (n, D) with table[index]: (n,).

    Computed as the gradient of the weights of an embedding_bag with one term per bag: no (n, D) product is stored.
    """
    own = torch.arange(len(rows), device=rows.device)
    table = table.to(rows.dtype)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(rows, table, index, own, own, mode=0)


def sum_by_token(rows: Tensor, index: Tensor, tokens: int) -> Tensor:
    """Sums of the rows (n, D) that share an index: (tokens, D)."""
    # Over sorted segments, because a GPU would otherwise add atomically, in any order
    sorted_index, order = index.sort(stable=True)
    start = torch.searchsorted(sorted_index, torch.arange(tokens + 1, device=index.device))
    return F.embedding_bag(order, rows, start, mode="sum", include_last_offset=True)
