"""The operations of a DiT block on packed tokens, written to keep little for the backward pass.

PyTorch's own operations keep the normalised, the modulated and the activated tokens, and modulators with one
row per token. Each function here keeps its input and recomputes what is cheap: a block keeps 12 numbers per
token and channel instead of 26. The functions work in eager mode and under torch.compile, on any device; on CUDA
their passes over the tokens are single kernels (models/ops/rows.py).

Modulators have one row per sample, (B, D). Under autocast the linear maps run in autocast's precision, and so
does the GELU, which follows one; everything else runs in float32. Twins: `modulate` and `block` in
models/reference.py.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.ops import rows
from models.ops.precision import product_dtype
from models.types import Packing

EPS = 1e-6  # of the LayerNorms (DiT)


class Modulated(NamedTuple):
    """LayerNorm(x) * (1 + scale) + shift, which the linear layer that reads it computes and does not keep."""

    x: Tensor  # (T, D)
    shift: Tensor  # (B, D)
    scale: Tensor  # (B, D)
    packing: Packing


def modulate(x: Tensor, shift: Tensor, scale: Tensor, packing: Packing) -> Modulated:
    """adaLN (DiT, section 3.2) of packed tokens (T, D) with one shift and scale (B, D) per sample."""
    return Modulated(x, shift, scale, packing)


def linear(x: Tensor | Modulated, layer: nn.Linear) -> Tensor:
    """A linear layer on tokens (T, D), or on modulated ones without keeping them: -> (T, out)."""
    if isinstance(x, Tensor):
        return layer(x)
    packing = x.packing
    return _ModulatedLinear.apply(
        x.x, x.shift, x.scale, layer.weight, layer.bias, packing.sample, packing.pieces
    )


def gelu_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """A linear layer on GELU(x), in its tanh form: (T, in) -> (T, out)."""
    return _GeluLinear.apply(x, layer.weight, layer.bias)


def gated_add(x: Tensor, gate: Tensor, y: Tensor, packing: Packing) -> Tensor:
    """x + gate * y, x and y (T, D), with one gate (B, D) per sample."""
    return _GatedAdd.apply(x, gate, y, packing.sample, packing.pieces)


def weight_gradients(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the weight and the bias of a linear layer, in the precision of its forward pass."""
    return grad.mT @ x.to(grad.dtype), grad.sum(0)


class _ModulatedLinear(torch.autograd.Function):
    """y = (LayerNorm(x) * (1 + scale) + shift) W^T + b; keeps x and computes the modulated tokens again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        weight: Tensor,
        bias: Tensor,
        sample: Tensor,
        pieces: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, shift, scale, weight, sample, pieces)
        modulated = rows.modulate(x, shift, scale, sample, EPS, product_dtype(x, weight))
        return F.linear(modulated, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, scale, weight, sample, pieces = ctx.saved_tensors
        grad_modulated = grad @ weight.to(grad.dtype)
        grad_x, grad_shift, grad_scale, modulated = rows.modulate_backward(
            grad_modulated, x, shift, scale, sample, pieces, EPS
        )
        grad_weight, grad_bias = weight_gradients(grad, modulated)
        return grad_x, grad_shift, grad_scale, grad_weight, grad_bias, None, None


class _GeluLinear(torch.autograd.Function):
    """y = GELU(x) W^T + b; keeps x and computes GELU(x) again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x, approximate="tanh"), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_weight, grad_bias = weight_gradients(grad, F.gelu(x, approximate="tanh"))
        grad_activated = grad @ weight.to(grad.dtype)
        grad_x = torch.ops.aten.gelu_backward(grad_activated, x, approximate="tanh")
        return grad_x, grad_weight, grad_bias


class _GatedAdd(torch.autograd.Function):
    """z = x + gate * y; keeps y and the gate of each sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, y: Tensor, sample: Tensor, pieces: Tensor) -> Tensor:
        ctx.save_for_backward(gate, y, sample, pieces)
        return rows.gate(x, gate, y, sample)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, y, sample, pieces = ctx.saved_tensors
        grad_y, grad_gate = rows.gate_backward(grad, gate, y, sample, pieces)
        return grad, grad_gate, grad_y, None, None
