"""The passes of models/ops/rows.py as Triton kernels for CUDA: each reads and writes every row once.

A row is a token, and one program holds all of its channels. Sums over a sample are those of its pieces
(models/packing.py), a program per piece, so they come out the same in every run. Kernels compute in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.packing import PIECES


@triton.jit
def _normalise(x, inside, width, eps):
    """LayerNorm of one row without weights: the normalised row and its reciprocal deviation."""
    mean = tl.sum(x, axis=0) / width
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    rstd = tl.rsqrt(variance + eps)
    return centred * rstd, rstd


@triton.jit
def _modulate(x_ptr, shift_ptr, scale_ptr, sample_ptr, out_ptr, width, stride, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    modulators = tl.load(sample_ptr + row) * stride + column

    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + modulators, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + modulators, mask=inside, other=0.0).to(tl.float32)
    normed, _ = _normalise(x, inside, width, eps)
    tl.store(out_ptr + row * width + column, normed * (1 + scale) + shift, mask=inside)


@triton.jit
def _modulate_backward(
    grad_ptr, x_ptr, shift_ptr, scale_ptr, piece_ptr,
    grad_x_ptr, modulated_ptr, grad_shift_ptr, grad_scale_ptr,
    width, stride, eps, PIECES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    modulators = (piece // PIECES).to(tl.int64) * stride + column
    shift = tl.load(shift_ptr + modulators, mask=inside, other=0.0).to(tl.float32)
    factor = 1 + tl.load(scale_ptr + modulators, mask=inside, other=0.0).to(tl.float32)

    grad_shift = tl.zeros([BLOCK], tl.float32)
    grad_scale = tl.zeros([BLOCK], tl.float32)
    first = tl.load(piece_ptr + piece).to(tl.int64)
    end = tl.load(piece_ptr + piece + 1).to(tl.int64)
    for row in range(first, end):
        place = row * width + column
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)

        # The modulated row again, for the gradient of the weight
        normed, rstd = _normalise(x, inside, width, eps)
        tl.store(modulated_ptr + place, normed * factor + shift, mask=inside)

        # Back through the modulation and the norm
        grad_shift += grad
        grad_scale += grad * normed
        grad_normed = grad * factor
        along_ones = tl.sum(grad_normed, axis=0) / width
        along_normed = tl.sum(grad_normed * normed, axis=0) / width
        grad_x = rstd * (grad_normed - along_ones - normed * along_normed)
        tl.store(grad_x_ptr + place, grad_x, mask=inside)

    sums = piece.to(tl.int64) * width + column
    tl.store(grad_shift_ptr + sums, grad_shift, mask=inside)
    tl.store(grad_scale_ptr + sums, grad_scale, mask=inside)


@triton.jit
def _gate(x_ptr, gate_ptr, y_ptr, sample_ptr, out_ptr, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    sample = tl.load(sample_ptr + row)

    gate = tl.load(gate_ptr + sample * stride + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, x + gate * y, mask=inside)


@triton.jit
def _gate_backward(
    grad_ptr, gate_ptr, y_ptr, piece_ptr, grad_y_ptr, grad_gate_ptr,
    width, stride, PIECES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    modulators = (piece // PIECES).to(tl.int64) * stride + column
    gate = tl.load(gate_ptr + modulators, mask=inside, other=0.0).to(tl.float32)

    grad_gate = tl.zeros([BLOCK], tl.float32)
    first = tl.load(piece_ptr + piece).to(tl.int64)
    end = tl.load(piece_ptr + piece + 1).to(tl.int64)
    for row in range(first, end):
        place = row * width + column
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad_gate += grad * y
        tl.store(grad_y_ptr + place, grad * gate, mask=inside)
    tl.store(grad_gate_ptr + piece.to(tl.int64) * width + column, grad_gate, mask=inside)


def modulate(
    x: Tensor, shift: Tensor, scale: Tensor, sample: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Twin of `modulate` in models/ops/rows.py."""
    x = x.contiguous()
    width = x.shape[1]
    out = torch.empty_like(x, dtype=dtype)
    _modulate[(len(x),)](x, shift, scale, sample, out, width, shift.stride(0), eps, **size(width))
    return out


def modulate_backward(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, pieces: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Twin of `modulate_backward` in models/ops/rows.py."""
    grad, x = grad.contiguous(), x.contiguous()
    width = x.shape[1]
    grad_x = torch.empty_like(x)
    modulated = torch.empty_like(grad)
    count = len(pieces) - 1
    grad_shift = x.new_empty(count, width, dtype=torch.float32)
    grad_scale = x.new_empty(count, width, dtype=torch.float32)
    _modulate_backward[(count,)](
        grad, x, shift, scale, pieces, grad_x, modulated, grad_shift, grad_scale,
        width, shift.stride(0), eps, PIECES, **size(width),
    )  # fmt: skip
    return grad_x, add_pieces(grad_shift), add_pieces(grad_scale), modulated


def gate(x: Tensor, gate: Tensor, y: Tensor, sample: Tensor) -> Tensor:
    """Twin of `gate` in models/ops/rows.py."""
    x, y = x.contiguous(), y.contiguous()
    width = x.shape[1]
    out = torch.empty_like(x)
    _gate[(len(x),)](x, gate, y, sample, out, width, gate.stride(0), **size(width))
    return out


def gate_backward(grad: Tensor, gate: Tensor, y: Tensor, pieces: Tensor) -> tuple[Tensor, Tensor]:
    """Twin of `gate_backward` in models/ops/rows.py."""
    grad, y = grad.contiguous(), y.contiguous()
    width = y.shape[1]
    grad_y = torch.empty_like(y)
    count = len(pieces) - 1
    grad_gate = y.new_empty(count, width, dtype=torch.float32)
    _gate_backward[(count,)](
        grad, gate, y, pieces, grad_y, grad_gate, width, gate.stride(0), PIECES, **size(width)
    )
    return grad_y, add_pieces(grad_gate)


def add_pieces(sums: Tensor) -> Tensor:
    """Sums over pieces (B * PIECES, D) -> sums over samples (B, D)."""
    return sums.view(-1, PIECES, sums.shape[1]).sum(1)


def size(width: int) -> dict[str, int]:
    """Columns and warps of a program that holds a row of this width."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}
