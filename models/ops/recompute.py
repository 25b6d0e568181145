"""The operations of a DiT block on packed tokens, written to keep little for the backward pass.

PyTorch's own operations would keep the normalised, the modulated and the activated tokens, and modulators with one row per
token. Here each function keeps its input and recomputes what is cheap: of a block remain 12 numbers per token and channel
instead of 26. They serve plain calls and torch.compile alike, on any device.

Modulators have one row per sample, (B, D). Under autocast the linear maps run in its precision, and so does the GELU on the
result of one; everything else runs in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.packing import PIECES
from models.types import Packing

EPS = 1e-6  # of the LayerNorms (DiT)


def modulated_linear(
    x: Tensor, shift: Tensor, scale: Tensor, linear: torch.nn.Linear, packing: Packing
) -> Tensor:
    """Linear map of LayerNorm(x) * (1 + scale) + shift (adaLN; DiT, section 3.2): (T, D) -> (T, out)."""
    return _ModulatedLinear.apply(x, shift, scale, linear.weight, linear.bias, packing.sample, packing.pieces)


def gelu_linear(x: Tensor, linear: torch.nn.Linear) -> Tensor:
    """Linear map of GELU(x), in its tanh form: (T, in) -> (T, out)."""
    return _GeluLinear.apply(x, linear.weight, linear.bias)


def gated_add(x: Tensor, gate: Tensor, y: Tensor, packing: Packing) -> Tensor:
    """x + gate * y, both (T, D)."""
    return _GatedAdd.apply(x, gate, y, packing.sample, packing.pieces)


def per_token(rows: Tensor, sample: Tensor) -> Tensor:
    """One row per sample (B, D) -> one row per token (T, D), in float32."""
    return rows.float().index_select(0, sample)


def per_sample(x: Tensor, pieces: Tensor) -> Tensor:
    """Sums over the tokens of each sample, in `pieces` as of a Packing: (T, D) -> (B, D)."""
    tokens = torch.arange(len(x), device=x.device, dtype=pieces.dtype)
    sums = F.embedding_bag(tokens, x, pieces, mode="sum", include_last_offset=True)
    return sums.view(-1, PIECES, x.shape[1]).sum(1)


def linear_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias of a linear map, in the precision that its forward pass had."""
    return grad @ weight.to(grad.dtype), grad.mT @ x.to(grad.dtype), grad.sum(0)


class _ModulatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, weight, bias, sample, pieces):
        normed, mean, rstd = torch.native_layer_norm(x.float(), x.shape[-1:], None, None, EPS)
        ctx.save_for_backward(x, mean, rstd, shift, scale, weight, sample, pieces)
        y = torch.addcmul(per_token(shift, sample), normed, per_token(1 + scale.float(), sample))
        return F.linear(y, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, mean, rstd, shift, scale, weight, sample, pieces = ctx.saved_tensors
        factor = per_token(1 + scale.float(), sample)
        full, shape = x.float(), x.shape[-1:]
        normed = torch.native_layer_norm(full, shape, None, None, EPS)[0]
        y = torch.addcmul(per_token(shift, sample), normed, factor)
        grad_y, grad_weight, grad_bias = linear_gradients(grad, y, weight)
        grad_y = grad_y.float()
        grad_shift, grad_scale = per_sample(grad_y, pieces), per_sample(grad_y * normed, pieces)
        mask = [True, False, False]
        grad_x = torch.ops.aten.native_layer_norm_backward(
            grad_y * factor, full, shape, mean, rstd, None, None, mask
        )[0]
        return grad_x, grad_shift, grad_scale, grad_weight, grad_bias, None, None


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x, approximate="tanh"), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_y, grad_weight, grad_bias = linear_gradients(grad, F.gelu(x, approximate="tanh"), weight)
        return torch.ops.aten.gelu_backward(grad_y, x, approximate="tanh"), grad_weight, grad_bias


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, y, sample, pieces):
        ctx.save_for_backward(gate, y, sample, pieces)
        return torch.addcmul(x, per_token(gate, sample), y.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, y, sample, pieces = ctx.saved_tensors
        grad_gate = per_sample(grad * y, pieces)
        return grad, grad_gate, (grad * per_token(gate, sample)).to(y.dtype), None, None
