"""Dechunk: smooth the kept tokens over space, plug each grid cell with its nearest kept token, keep the router trainable.

Smoothing is a Gaussian sum over the kept tokens of a sample. Two ways, each fast where it is used:
    neighbours (CPU)       lists of the kept tokens near each token: all with a weight above float32's epsilon
    grid products (else)   the kernel is a product of a row and a column kernel: kept tokens are put on the grid, and two (S, S)
                           products give the sum over all pairs
Neither has a (T, T) matrix. The lists' length depends on the data, which on a GPU would be a wait for the device.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.packing import unpack
from models.types import Packing, Routing

PROB_MARGIN = 1e-4  # p is clamped to [margin, 1 - margin] as a mixing weight
REACH = 5.65  # of the neighbour lists, in sigma: a weight beyond is below 1.2e-7


class Dechunk(nn.Module):
    """Processed tokens (T, D) -> (B, L, D)."""

    def __init__(self, side: int, sigma: float):
        super().__init__()
        offset = torch.arange(side, dtype=torch.float64)
        kernel = torch.exp(-((offset[:, None] - offset) ** 2) / (2 * sigma**2))
        self.register_buffer("kernel", kernel.float(), persistent=False)  # (S, S), symmetric
        radius = REACH * sigma
        height = min(int(radius), side - 1)
        disc = [(rows, int((radius**2 - rows**2) ** 0.5)) for rows in range(-height, height + 1)]
        self.register_buffer(
            "disc", torch.tensor(disc), persistent=False
        )  # (K, 2): rows up or down, columns to either side

    def forward(self, tokens: Tensor, routing: Routing, packing: Packing) -> Tensor:
        prob = routing.prob.flatten()[packing.index].clamp(PROB_MARGIN, 1 - PROB_MARGIN)
        prob = prob[:, None].to(tokens.dtype)  # (T, 1)
        confidence = torch.where(
            routing.boundary, routing.prob, 1 - routing.prob
        )  # (B, L), in each token's own decision
        return _SmoothAndPlug.apply(
            tokens, prob, confidence, nearest_token(routing.keep), self.gaussian_sum(packing)
        )

    def gaussian_sum(self, packing: Packing) -> Callable[[Tensor, Tensor], Tensor]:
        """The sum of values times factors over the kept tokens of the same sample, as it is fast on this device.

        Returns:
            A function, values (T, D) and factors (T, 1) -> (T, D).
        """
        if not packing.index.is_cpu:
            return functools.partial(self.sum_on_grid, packing)
        return functools.partial(sum_neighbours, find_neighbours(packing, self.kernel, self.disc))

    def sum_on_grid(self, packing: Packing, values: Tensor, factor: Tensor) -> Tensor:
        side = len(self.kernel)
        grid = unpack(values * factor, packing, side * side)
        grid = self.kernel @ grid.view(-1, side, side * values.shape[1])  # over rows
        grid = self.kernel @ grid.view(-1, side, values.shape[1])  # over columns
        return (
            grid.flatten(0, 1).index_select(0, packing.index).to(values.dtype)
        )  # autocast rounds the products


class Neighbours(NamedTuple):
    """For each of T kept tokens the kept tokens near it, itself included, one list after another."""

    index: Tensor  # (pairs,) int32, packed numbers
    weight: Tensor  # (pairs,) float32, Gaussian weights
    start: Tensor  # (T + 1,) int32, where each list starts; the last entry is the end of all


@torch.no_grad()
def find_neighbours(packing: Packing, kernel: Tensor, disc: Tensor) -> Neighbours:
    """The kept tokens of the same sample within `disc` (K, 2), weighted by `kernel` (S, S).

    Those in one row of the disc around a token follow one another in the packing: a list is K runs of consecutive numbers.
    """
    side, cells, (rows, width) = len(kernel), len(packing.lengths) * packing.max_length, disc.unbind(1)
    kept = torch.zeros(cells + 1, dtype=torch.int64)
    kept[packing.index + 1] = 1
    before = kept.cumsum(0)  # kept tokens before each cell
    column = packing.index % side
    row = (packing.index // side % side)[:, None] + rows  # (T, K)
    line = (packing.index - column)[:, None] + rows * side  # the rows' first cells
    left, right = (column[:, None] - width).clamp(min=0), (column[:, None] + width + 1).clamp(max=side)
    first = before.take((line + left).clamp(0, cells))
    count = before.take((line + right).clamp(0, cells)) - first
    count = count.where((row >= 0) & (row < side), 0)
    first, count = first.flatten(), count.flatten()  # (T * K,) runs
    end = count.cumsum(0)
    run = torch.repeat_interleave(count)  # (pairs,), which run a pair belongs to
    index = torch.arange(len(run)) + (first - end + count).index_select(0, run)
    own, down = column.repeat_interleave(len(disc)), kernel[0][rows.abs()].repeat(len(column))  # of each run
    across = (column.index_select(0, index) - own.index_select(0, run)).abs_()
    weight = kernel[0].index_select(0, across).mul_(down.index_select(0, run))
    return Neighbours(index.int(), weight, F.pad(end[len(disc) - 1 :: len(disc)], (1, 0)).int())


def sum_neighbours(near: Neighbours, values: Tensor, factor: Tensor) -> Tensor:
    """Values (T, D), factors (T, 1) -> (T, D): each token's weighted sum over its list."""
    weight = factor.flatten().index_select(0, near.index).mul_(near.weight)
    values = values.detach()  # else more is computed, for a gradient that is not asked for
    return F.embedding_bag(
        near.index, values, near.start, mode="sum", per_sample_weights=weight, include_last_offset=True
    )


class _SmoothAndPlug(torch.autograd.Function):
    """Mix each kept token with the smoothed ones by its probability, and give every cell its nearest token.

    A cell's token is multiplied by its confidence "straight through" (DC-DiT, section 3): by 1, with the gradient of a factor.
    Written out because next to nothing needs to be kept when the backward pass smooths once more, and because the Gaussian is
    symmetric: the gradient of `gaussian_sum` is `gaussian_sum` again.

    Args:
        tokens: (T, D). prob: (T, 1). confidence, nearest: (B, L). gaussian_sum: as of Dechunk.gaussian_sum.
    """

    @staticmethod
    def forward(
        ctx, tokens: Tensor, prob: Tensor, confidence: Tensor, nearest: Tensor, gaussian_sum
    ) -> Tensor:
        weight = gaussian_sum(torch.ones_like(prob), prob) + 1e-8
        ctx.save_for_backward(tokens, prob, weight, nearest)
        ctx.gaussian_sum = gaussian_sum
        smooth = gaussian_sum(tokens, prob).div_(weight)
        mixed = smooth.lerp_(tokens, prob)  # the more certain the router, the more of a token's own value
        plugged = mixed.new_empty(*nearest.shape, mixed.shape[1])  # no view: the caller adds to it in place
        torch.index_select(mixed, 0, nearest.flatten(), out=plugged.flatten(0, 1))
        return plugged

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        tokens, prob, weight, nearest = ctx.saved_tensors
        rows, cell, each = (
            grad.flatten(0, 1),
            nearest.flatten(),
            torch.arange(len(tokens), device=tokens.device),
        )
        smooth = ctx.gaussian_sum(tokens, prob).div_(weight)
        grad_confidence = row_products(rows, torch.lerp(smooth, tokens, prob), cell)
        grad_mixed = sum_by_token(rows, cell, len(tokens))
        along_tokens, along_smooth = (
            row_products(grad_mixed, tokens, each),
            row_products(grad_mixed, smooth, each),
        )
        del smooth  # from here on another tensor of its size is needed
        share = (1 - prob) / weight  # of the sum over the neighbours
        grad_weighted = ctx.gaussian_sum(grad_mixed, share)  # of prob * tokens
        grad_prob = along_tokens - along_smooth + row_products(grad_weighted, tokens, each)
        grad_prob = grad_prob[:, None] - ctx.gaussian_sum(along_smooth[:, None], share)
        return (
            grad_weighted.add_(grad_mixed).mul_(prob),
            grad_prob,
            grad_confidence.view(nearest.shape),
            None,
            None,
        )


def row_products(rows: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Sums over D of rows (n, D) times table[index]: (n,).

    It is the gradient of the weights of n sums of one term each, which PyTorch computes without an (n, D) tensor.
    """
    each = torch.arange(len(rows), device=rows.device)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows, table.to(rows.dtype), index, each, each, mode=0
    )


def sum_by_token(rows: Tensor, index: Tensor, tokens: int) -> Tensor:
    """Sums of the rows (n, D) that share an index: (tokens, D). Over sorted segments: no atomic additions on a GPU."""
    number, order = index.sort(stable=True)
    start = torch.searchsorted(number, torch.arange(tokens + 1, device=index.device))
    return F.embedding_bag(order, rows, start, mode="sum", include_last_offset=True)


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
    place = torch.arange(side, device=keep.device, dtype=torch.int32 if side <= 128 else torch.int64)
    row = place[:, None]
    keep = keep.view(batch, side, side)
    far = (
        side + side // 2
    )  # squared, more than any two cells are apart: marks an empty column. Keys stay below 7.25 side^4
    above = torch.where(keep, row, -far).cummax(1).values
    below = torch.where(keep, row, far + side).flip(1).cummin(1).values.flip(1)
    nearest = torch.where(row - above <= below - row, above, below)  # ties: the upper row has the lower index
    key = (nearest - row) ** 2 * length + nearest.clamp(0, side - 1) * side + place  # (B, row, column)
    across = (place[:, None] - place) ** 2 * length  # (column, candidate column)
    return ((key[:, :, None, :] + across).amin(-1) % length).flatten(1).long()
