"""The operations of a DiT block on packed tokens, written to keep little for the backward pass.

PyTorch's own operations keep the normalised, the modulated and the activated tokens, and modulators with one
row per token. Each function here keeps its input and recomputes what is cheap: a block keeps 12 numbers per
token and channel instead of 26. The functions work in eager mode and under torch.compile, on any device.

Modulators have one row per sample, (B, D). Under autocast the linear maps run in autocast's precision, and so
does the GELU, which follows one; everything else runs in float32. Twins: `modulate` and `block` in
models/reference.py.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.packing import PIECES
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


def per_token(rows: Tensor, sample: Tensor) -> Tensor:
    """One row per sample (B, D) -> one row per token (T, D), in float32."""
    return rows.float().index_select(0, sample)


def per_sample(x: Tensor, pieces: Tensor) -> Tensor:
    """Sums over the tokens of each sample, with `pieces` of a Packing: (T, D) -> (B, D)."""
    tokens = torch.arange(len(x), device=x.device, dtype=pieces.dtype)
    sums = F.embedding_bag(tokens, x, pieces, mode="sum", include_last_offset=True)
    return sums.view(-1, PIECES, x.shape[1]).sum(1)


def linear_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the weight and the bias of a linear layer, in the precision of its forward pass."""
    grad_x = grad @ weight.to(grad.dtype)
    grad_weight = grad.mT @ x.to(grad.dtype)
    return grad_x, grad_weight, grad.sum(0)


class _ModulatedLinear(torch.autograd.Function):
    """y = (n * (1 + scale) + shift) W^T + b with n = LayerNorm(x); keeps x and the statistics of its rows.

    The backward pass computes n and the modulated tokens again. With g the gradient of the modulated tokens,
    the gradient of shift is the sum of g over a sample, that of scale the sum of g * n, and that of x is
    LayerNorm's own for g * (1 + scale).
    """

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
        normed, mean, rstd = torch.native_layer_norm(x.float(), x.shape[-1:], None, None, EPS)
        ctx.save_for_backward(x, mean, rstd, shift, scale, weight, sample, pieces)
        factor = per_token(1 + scale.float(), sample)
        modulated = torch.addcmul(per_token(shift, sample), normed, factor)
        return F.linear(modulated, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, shift, scale, weight, sample, pieces = ctx.saved_tensors

        # Recompute the modulated tokens
        x = x.float()
        shape = x.shape[-1:]
        factor = per_token(1 + scale.float(), sample)
        normed = torch.native_layer_norm(x, shape, None, None, EPS)[0]
        modulated = torch.addcmul(per_token(shift, sample), normed, factor)

        # Back through the linear layer, the modulation and the norm
        grad_modulated, grad_weight, grad_bias = linear_gradients(grad, modulated, weight)
        grad_modulated = grad_modulated.float()
        grad_shift = per_sample(grad_modulated, pieces)
        grad_scale = per_sample(grad_modulated * normed, pieces)
        only_x = [True, False, False]
        grad_x = torch.ops.aten.native_layer_norm_backward(
            grad_modulated * factor, x, shape, mean, rstd, None, None, only_x
        )[0]
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
        activated = F.gelu(x, approximate="tanh")
        grad_activated, grad_weight, grad_bias = linear_gradients(grad, activated, weight)
        grad_x = torch.ops.aten.gelu_backward(grad_activated, x, approximate="tanh")
        return grad_x, grad_weight, grad_bias


class _GatedAdd(torch.autograd.Function):
    """z = x + gate * y; keeps y and the gate of each sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, y: Tensor, sample: Tensor, pieces: Tensor) -> Tensor:
        ctx.save_for_backward(gate, y, sample, pieces)
        return torch.addcmul(x, per_token(gate, sample), y.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, y, sample, pieces = ctx.saved_tensors
        grad_gate = per_sample(grad * y, pieces)
        grad_y = (grad * per_token(gate, sample)).to(y.dtype)
        return grad, grad_gate, grad_y, None, None
