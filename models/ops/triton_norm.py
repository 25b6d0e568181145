"""GroupNorm and SiLU on channels_last grids as Triton kernels. Twin: `plain_norm_silu` in models/ops/norm_silu.py.

A grid (B, C, S, S) is read as rows (B L, C). The rows of a sample are cut into CHUNKS parts, each the work of one
program, which holds ROWS of them with all their channels. Sums over a sample are added chunk by chunk, so they come
out the same in every run. Kernels compute in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNKS = 16
ROWS = 4


@triton.jit
def _tile(step, first, end, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Places of ROWS rows in memory, from row first + step on, and which of them exist."""
    row = first + step + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    return place, (row < end)[:, None] & (column < width)[None, :]


@triton.jit
def _sums(
    x_ptr, sum_ptr, square_ptr, length, part, width,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each channel in a chunk: sums of x and its square, less the sample's first row, which keeps the digits."""
    chunk = tl.program_id(0)
    sample = chunk // CHUNKS
    first = sample * length + chunk % CHUNKS * part
    end = tl.minimum(first + part, (sample + 1) * length)
    column = tl.arange(0, BLOCK)
    start = sample.to(tl.int64) * length * width
    origin = tl.load(x_ptr + start + column, mask=column < width, other=0.0).to(tl.float32)

    total = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for step in range(0, part, ROWS):
        place, inside = _tile(step, first, end, width, ROWS, BLOCK)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - origin[None, :], 0.0)
        total += tl.sum(x, axis=0)
        square += tl.sum(x * x, axis=0)
    out = chunk * width + column
    tl.store(sum_ptr + out, total, mask=column < width)
    tl.store(square_ptr + out, square, mask=column < width)


@triton.jit
def _statistics(
    x_ptr, sum_ptr, square_ptr, mean_ptr, rstd_ptr, length, width, size, eps,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and reciprocal deviation of one group of `size` channels, written once for each of its channels."""
    sample = tl.program_id(0)
    member = tl.arange(0, BLOCK)
    inside = member < size
    channel = tl.program_id(1) * size + member
    part = (sample * CHUNKS + tl.arange(0, CHUNKS))[:, None] * width + channel[None, :]
    total = tl.sum(tl.load(sum_ptr + part, mask=inside[None, :], other=0.0), axis=0)
    square = tl.sum(tl.load(square_ptr + part, mask=inside[None, :], other=0.0), axis=0)
    origin = tl.load(x_ptr + sample.to(tl.int64) * length * width + channel, mask=inside, other=0.0)

    # Channels first, then the group
    shifted = total / length
    spread = square - total * shifted
    mean = tl.where(inside, origin.to(tl.float32) + shifted, 0.0)
    group_mean = tl.sum(mean, axis=0) / size
    distance = tl.where(inside, mean - group_mean, 0.0)
    variance = tl.sum(spread + length * distance * distance, axis=0) / (size * length)
    rstd = tl.rsqrt(variance + eps)
    out = sample * width + channel
    tl.store(mean_ptr + out, tl.zeros([BLOCK], tl.float32) + group_mean, mask=inside)
    tl.store(rstd_ptr + out, tl.zeros([BLOCK], tl.float32) + rstd, mask=inside)


@triton.jit
def _activate(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, out_ptr, length, part, width,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SiLU of the normalised rows of a chunk."""
    chunk = tl.program_id(0)
    sample = chunk // CHUNKS
    first = sample * length + chunk % CHUNKS * part
    end = tl.minimum(first + part, (sample + 1) * length)
    column = tl.arange(0, BLOCK)
    exists = column < width
    mean = tl.load(mean_ptr + sample * width + column, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + sample * width + column, mask=exists, other=0.0)
    weight = tl.load(weight_ptr + column, mask=exists, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=exists, other=0.0).to(tl.float32)

    for step in range(0, part, ROWS):
        place, inside = _tile(step, first, end, width, ROWS, BLOCK)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        z = (x - mean[None, :]) * rstd[None, :] * weight[None, :] + bias[None, :]
        tl.store(out_ptr + place, z * tl.sigmoid(z), mask=inside)


@triton.jit
def _backward(
    grad_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    sum_ptr, product_ptr, along_ones_ptr, along_normed_ptr, grad_x_ptr, length, part, width,
    IS_SUM: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First pass: of each channel in a chunk, sums of g and g n. Second pass: the gradient of x.

    g is the gradient of the norm's output and n the normalised x.
    """
    chunk = tl.program_id(0)
    sample = chunk // CHUNKS
    first = sample * length + chunk % CHUNKS * part
    end = tl.minimum(first + part, (sample + 1) * length)
    column = tl.arange(0, BLOCK)
    exists = column < width
    mean = tl.load(mean_ptr + sample * width + column, mask=exists, other=0.0)
    rstd = tl.load(rstd_ptr + sample * width + column, mask=exists, other=0.0)
    weight = tl.load(weight_ptr + column, mask=exists, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=exists, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    product = tl.zeros([BLOCK], tl.float32)
    if not IS_SUM:
        along_ones = tl.load(along_ones_ptr + sample * width + column, mask=exists, other=0.0)
        along_normed = tl.load(along_normed_ptr + sample * width + column, mask=exists, other=0.0)

    for step in range(0, part, ROWS):
        place, inside = _tile(step, first, end, width, ROWS, BLOCK)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        normed = (x - mean[None, :]) * rstd[None, :]
        z = normed * weight[None, :] + bias[None, :]
        share = tl.sigmoid(z)
        grad = grad * share * (1 + z * (1 - share))
        if IS_SUM:
            total += tl.sum(grad, axis=0)
            product += tl.sum(grad * normed, axis=0)
        else:
            grad = grad * weight[None, :] - along_ones[None, :] - normed * along_normed[None, :]
            tl.store(grad_x_ptr + place, grad * rstd[None, :], mask=inside)
    if IS_SUM:
        out = chunk * width + column
        tl.store(sum_ptr + out, total, mask=exists)
        tl.store(product_ptr + out, product, mask=exists)


@triton.jit
def _group_means(
    sum_ptr, product_ptr, weight_ptr, along_ones_ptr, along_normed_ptr, length, width, size,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Means of w g and w g n over one group, written once for each of its channels."""
    sample = tl.program_id(0)
    member = tl.arange(0, BLOCK)
    inside = member < size
    channel = tl.program_id(1) * size + member
    part = (sample * CHUNKS + tl.arange(0, CHUNKS))[:, None] * width + channel[None, :]
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(tl.load(sum_ptr + part, mask=inside[None, :], other=0.0), axis=0)
    product = tl.sum(tl.load(product_ptr + part, mask=inside[None, :], other=0.0), axis=0)

    along_ones = tl.sum(weight * total, axis=0) / (size * length)
    along_normed = tl.sum(weight * product, axis=0) / (size * length)
    out = sample * width + channel
    tl.store(along_ones_ptr + out, tl.zeros([BLOCK], tl.float32) + along_ones, mask=inside)
    tl.store(along_normed_ptr + out, tl.zeros([BLOCK], tl.float32) + along_normed, mask=inside)


def norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """SiLU(GroupNorm(x)) in `dtype`; mean and reciprocal deviation of each channel (B, C); x in channels_last."""
    batch, width, length = len(x), x.shape[1], x.shape[2] * x.shape[3]
    part, tiles = triton.cdiv(length, CHUNKS), tile_size(width)
    mean, rstd = x.new_empty(2, batch, width, dtype=torch.float32)
    total, square = x.new_empty(2, batch * CHUNKS, width, dtype=torch.float32)
    out = torch.empty_like(x, dtype=dtype)

    programs = (batch * CHUNKS,)
    size = width // groups
    block = triton.next_power_of_2(size)
    _sums[programs](x, total, square, length, part, width, CHUNKS, **tiles)
    _statistics[(batch, groups)](x, total, square, mean, rstd, length, width, size, eps, CHUNKS, block)
    _activate[programs](x, mean, rstd, weight, bias, out, length, part, width, CHUNKS, **tiles)
    return out, mean, rstd


def norm_silu_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, the weight and the bias; `grad` and x in channels_last."""
    batch, width, length = len(x), x.shape[1], x.shape[2] * x.shape[3]
    part, tiles = triton.cdiv(length, CHUNKS), tile_size(width)
    total, product = x.new_empty(2, batch * CHUNKS, width, dtype=torch.float32)
    along_ones, along_normed = torch.empty_like(mean), torch.empty_like(mean)
    grad_x = torch.empty_like(x)

    programs = (batch * CHUNKS,)
    size = width // groups
    block = triton.next_power_of_2(size)
    arguments = (
        grad, x, mean, rstd, weight, bias, total, product, along_ones, along_normed, grad_x, length, part, width,
    )  # fmt: skip
    _backward[programs](*arguments, True, CHUNKS, **tiles)
    _group_means[(batch, groups)](
        total, product, weight, along_ones, along_normed, length, width, size, CHUNKS, block
    )
    _backward[programs](*arguments, False, CHUNKS, **tiles)
    return grad_x, product.sum(0), total.sum(0)


def tile_size(width: int) -> dict[str, int]:
    """Rows, columns and warps of a program on rows of this width."""
    block = triton.next_power_of_2(width)
    return {"ROWS": ROWS, "BLOCK": block, "num_warps": min(max(ROWS * block // 512, 1), 8)}
