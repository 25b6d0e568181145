"""Dechunk: smooth the kept tokens over space, plug each grid cell with its nearest kept token, keep the router trainable.

Smoothing is a Gaussian sum over the kept tokens of a sample. Two exact ways, each fast where it is used:
    neighbours (CPU)       lists of the kept tokens within 6 sigma of each token; beyond that a weight is below 2e-8
    grid products (else)   the kernel is a product of a row and a column kernel: kept tokens are put on the grid, and two (S, S)
                           products give the sum over all pairs
Neither has a (T, T) matrix. The lists' length depends on the data, which on a GPU would be a wait for the device.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.packing import unpack
from models.types import Packing, Routing

PROB_MARGIN = 1e-4  # p is clamped to [margin, 1 - margin] as a mixing weight
REACH = 6  # of the neighbour lists, in sigma


class Dechunk(nn.Module):
    """Processed tokens (T, D) -> (B, L, D)."""

    def __init__(self, side: int, sigma: float):
        super().__init__()
        offset = torch.arange(side, dtype=torch.float64)
        kernel = torch.exp(-((offset[:, None] - offset) ** 2) / (2 * sigma**2))
        self.register_buffer("kernel", kernel.float(), persistent=False)  # (S, S), symmetric
        reach = min(int(REACH * sigma), side - 1)
        steps = range(-reach, reach + 1)
        disc = [(row, column) for row in steps for column in steps if row**2 + column**2 <= (REACH * sigma) ** 2]
        self.register_buffer("disc", torch.tensor(disc), persistent=False)  # (K, 2): rows and columns to a neighbour

    def forward(self, tokens: Tensor, routing: Routing, packing: Packing) -> Tensor:
        prob = routing.prob.flatten()[packing.index].clamp(PROB_MARGIN, 1 - PROB_MARGIN)
        prob = prob[:, None].to(tokens.dtype)  # (T, 1)
        confidence = torch.where(routing.natural, routing.prob, 1 - routing.prob)  # (B, L), in each token's own decision
        return _SmoothAndPlug.apply(tokens, prob, confidence, nearest_token(routing.keep), self.gaussian_sum(packing))

    def gaussian_sum(self, packing: Packing) -> Callable[[Tensor], Tensor]:
        """The sum over the kept tokens of the same sample, (T, D) -> (T, D), as it is fast on this device."""
        if not packing.index.is_cpu:
            return lambda values: self.sum_on_grid(values, packing)
        near = find_neighbours(packing, self.kernel, self.disc)
        return lambda values: sum_neighbours(values, near)

    def sum_on_grid(self, values: Tensor, packing: Packing) -> Tensor:
        side = len(self.kernel)
        grid = unpack(values, packing, side * side)
        grid = self.kernel @ grid.view(-1, side, side * values.shape[1])  # over rows
        grid = self.kernel @ grid.view(-1, side, values.shape[1])  # over columns
        return grid.flatten(0, 1).index_select(0, packing.index).to(values.dtype)  # autocast rounds the products


class Neighbours(NamedTuple):
    """For each of T kept tokens the kept tokens near it, itself included, one list after another."""

    index: Tensor  # (pairs,) int64, packed numbers
    weight: Tensor  # (pairs,) float32, Gaussian weights
    start: Tensor  # (T + 1,) int64, where each list starts; the last entry is the end of all


@torch.no_grad()
def find_neighbours(packing: Packing, kernel: Tensor, disc: Tensor) -> Neighbours:
    """The kept tokens of the same sample at the offsets `disc` (K, 2), weighted by `kernel` (S, S)."""
    side, tokens = len(kernel), len(packing.index)
    wide = 2 * side  # each sample has an empty margin to its right and above, so that no offset leads to another one
    row, column = packing.index // side, packing.index % side  # rows count through the batch
    place = (row + (packing.sample + 1) * side) * wide + column
    number = place.new_full(((2 * len(packing.lengths) + 1) * side * wide,), -1)
    number[place] = torch.arange(tokens)
    candidate = number.take(place[:, None] + disc[:, 0] * wide + disc[:, 1])  # (T, K)
    kept = candidate >= 0
    where = kept.flatten().nonzero().squeeze(1)
    weight = kernel[0][disc.abs()].prod(1)[where % len(disc)]
    return Neighbours(candidate.take(where), weight, F.pad(kept.sum(1).cumsum(0), (1, 0)))


def sum_neighbours(values: Tensor, near: Neighbours) -> Tensor:
    """(T, D) -> (T, D): each token's weighted sum over its list."""
    weight = near.weight.to(values.dtype)
    return F.embedding_bag(near.index, values, near.start, mode="sum", per_sample_weights=weight, include_last_offset=True)


class _SmoothAndPlug(torch.autograd.Function):
    """Mix each kept token with the smoothed ones by its probability, and give every cell its nearest token.

    A cell's token is multiplied by its confidence "straight through" (DC-DiT, section 3): by 1, with the gradient of a factor.
    Written out because little needs to be kept, nothing of it as large as the grid, and because the Gaussian is symmetric: the
    gradient of `gaussian_sum` is `gaussian_sum` again.

    Args:
        tokens: (T, D). prob: (T, 1). confidence, nearest: (B, L). gaussian_sum: a linear function (T, any) -> (T, any).
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, prob: Tensor, confidence: Tensor, nearest: Tensor, gaussian_sum) -> Tensor:
        weight = gaussian_sum(prob) + 1e-8
        smooth = gaussian_sum(prob * tokens).div_(weight)
        ctx.save_for_backward(tokens, prob, smooth, weight, nearest)
        ctx.gaussian_sum = gaussian_sum
        mixed = mix(tokens, smooth, prob)
        plugged = mixed.new_empty(*nearest.shape, mixed.shape[1])  # no view: the caller adds to it in place
        torch.index_select(mixed, 0, nearest.flatten(), out=plugged.flatten(0, 1))
        return plugged

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        tokens, prob, smooth, weight, nearest = ctx.saved_tensors
        each = torch.arange(len(tokens), device=tokens.device)
        grad_confidence = row_products(grad.flatten(0, 1), mix(tokens, smooth, prob), nearest.flatten())
        grad_mixed = sum_by_token(grad.flatten(0, 1), nearest.flatten(), len(tokens))
        along_tokens, along_smooth = row_products(grad_mixed, tokens, each), row_products(grad_mixed, smooth, each)
        share = (1 - prob) / weight  # of the sum over the neighbours
        grad_weight = -share * along_smooth[:, None]
        grad_weighted = ctx.gaussian_sum(share * grad_mixed)  # of prob * tokens
        grad_prob = along_tokens - along_smooth + row_products(grad_weighted, tokens, each)
        grad_prob = grad_prob[:, None] + ctx.gaussian_sum(grad_weight)
        return grad_weighted.add_(grad_mixed).mul_(prob), grad_prob, grad_confidence.view(nearest.shape), None, None


def mix(tokens: Tensor, smooth: Tensor, prob: Tensor) -> Tensor:
    """The more certain the router, the more of a token's own value: (T, D)."""
    return torch.lerp(smooth, tokens, prob)


def row_products(rows: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Sums over D of rows (n, D) times table[index]: (n,).

    It is the gradient of the weights of n sums of one term each, which PyTorch computes without an (n, D) tensor.
    """
    each = torch.arange(len(rows), device=rows.device)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(rows, table.to(rows.dtype), index, each, each, mode=0)


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
    far = side + side // 2  # squared, more than any two cells are apart: marks an empty column. Keys stay below 7.25 side^4
    above = torch.where(keep, row, -far).cummax(1).values
    below = torch.where(keep, row, far + side).flip(1).cummin(1).values.flip(1)
    nearest = torch.where(row - above <= below - row, above, below)  # ties: the upper row has the lower index
    key = (nearest - row) ** 2 * length + nearest.clamp(0, side - 1) * side + place  # (B, row, column)
    across = (place[:, None] - place) ** 2 * length  # (column, candidate column)
    return ((key[:, :, None, :] + across).amin(-1) % length).flatten(1).long()
