"""Passes over the rows of packed tokens: norm and modulation, gate and residual, forward and backward.

Each is written here in PyTorch's operations, which take up to ten passes through memory. On CUDA the kernels of
models/ops/triton_rows.py take one.

T tokens, B samples, D channels. Modulators are (B, D); `sample` and `pieces` are those of a Packing.
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.fused import find_kernels
from models.packing import PIECES, full_packing


def modulate(
    x: Tensor, shift: Tensor, scale: Tensor, sample: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift: (T, D) -> (T, D) in `dtype`."""
    kernels = kernels_for(x)
    if kernels is not None:
        return kernels.modulate(x, shift, scale, sample, eps, dtype)
    return plain_modulate(x, shift, scale, sample, eps, dtype)


def modulate_backward(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, sample: Tensor, pieces: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (T, D), shift and scale (B, D); and the modulated tokens again, in the precision of `grad`.

    With n = LayerNorm(x), the gradient of shift is the sum of `grad` over a sample, that of scale the sum of
    grad * n, and that of x is LayerNorm's own for grad * (1 + scale).
    """
    kernels = kernels_for(x)
    if kernels is not None:
        return kernels.modulate_backward(grad, x, shift, scale, pieces, eps)
    return plain_modulate_backward(grad, x, shift, scale, sample, pieces, eps)


def gate(x: Tensor, gate: Tensor, y: Tensor, sample: Tensor) -> Tensor:
    """x + gate * y: (T, D) -> (T, D) in the precision of x."""
    kernels = kernels_for(x)
    if kernels is not None:
        return kernels.gate(x, gate, y, sample)
    return plain_gate(x, gate, y, sample)


def gate_backward(
    grad: Tensor, gate: Tensor, y: Tensor, sample: Tensor, pieces: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of y (T, D) and of the gate (B, D)."""
    kernels = kernels_for(grad)
    if kernels is not None:
        return kernels.gate_backward(grad, gate, y, pieces)
    return plain_gate_backward(grad, gate, y, sample, pieces)


# ------------------------------------------------------------------------------------- in PyTorch's operations


def plain_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, sample: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """`modulate`, pass by pass."""
    normed = torch.native_layer_norm(x.float(), x.shape[-1:], None, None, eps)[0]
    factor = per_token(1 + scale.float(), sample)
    return torch.addcmul(per_token(shift, sample), normed, factor).to(dtype)


def plain_modulate_backward(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, sample: Tensor, pieces: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`modulate_backward`, pass by pass."""
    # The modulated tokens again
    x = x.float()
    shape = x.shape[-1:]
    normed, mean, rstd = torch.native_layer_norm(x, shape, None, None, eps)
    factor = per_token(1 + scale.float(), sample)
    modulated = torch.addcmul(per_token(shift, sample), normed, factor).to(grad.dtype)

    # Back through the modulation and the norm
    grad = grad.float()
    grad_shift = per_sample(grad, pieces)
    grad_scale = per_sample(grad * normed, pieces)
    only_x = [True, False, False]
    grad_x = torch.ops.aten.native_layer_norm_backward(
        grad * factor, x, shape, mean, rstd, None, None, only_x
    )[0]
    return grad_x, grad_shift, grad_scale, modulated


def plain_gate(x: Tensor, gate: Tensor, y: Tensor, sample: Tensor) -> Tensor:
    """`gate`, pass by pass."""
    return torch.addcmul(x, per_token(gate, sample), y.to(x.dtype))


def plain_gate_backward(
    grad: Tensor, gate: Tensor, y: Tensor, sample: Tensor, pieces: Tensor
) -> tuple[Tensor, Tensor]:
    """`gate_backward`, pass by pass."""
    grad_gate = per_sample(grad * y, pieces)
    grad_y = (grad * per_token(gate, sample)).to(y.dtype)
    return grad_y, grad_gate


def per_token(rows: Tensor, sample: Tensor) -> Tensor:
    """One row per sample (B, D) -> one row per token (T, D), in float32."""
    return rows.float().index_select(0, sample)


def per_sample(x: Tensor, pieces: Tensor) -> Tensor:
    """Sums over the tokens of each sample: (T, D) -> (B, D)."""
    tokens = torch.arange(len(x), device=x.device, dtype=pieces.dtype)
    sums = F.embedding_bag(tokens, x, pieces, mode="sum", include_last_offset=True)
    return sums.view(-1, PIECES, x.shape[1]).sum(1)


# ------------------------------------------------------------------------------------------ as Triton kernels


def kernels_for(x: Tensor) -> ModuleType | None:
    """The module with the kernels for rows like these; None where the plain form has to serve."""
    return find_kernels("triton_rows", x, x.shape[1], largest_difference)


@torch.no_grad()
def largest_difference(kernels: ModuleType, device: torch.device, width: int) -> float:
    """Largest difference of all kernels to the plain form, in bfloat16 as under autocast, on a few tokens."""
    batch, tokens, eps = 2, 3 * PIECES, 1e-6
    half = torch.bfloat16
    packing = full_packing(batch, tokens, device)
    sample, pieces = packing.sample, packing.pieces

    # Any values; drawing them would change the state of a generator
    values = torch.arange((4 * tokens + 2) * batch * width, device=device, dtype=torch.float32).sin()
    values = values.view(-1, width)
    x, y, grad, half_grad, rows = values.split([batch * tokens] * 4 + [2 * batch])
    shift, scale = rows.to(half).chunk(2)
    y, half_grad = y.to(half), half_grad.to(half)

    fused = [
        kernels.modulate(x, shift, scale, sample, eps, half),
        *kernels.modulate_backward(half_grad, x, shift, scale, pieces, eps),
        kernels.gate(x, shift, y, sample),
        *kernels.gate_backward(grad, shift, y, pieces),
    ]
    plain = [
        plain_modulate(x, shift, scale, sample, eps, half),
        *plain_modulate_backward(half_grad, x, shift, scale, sample, pieces, eps),
        plain_gate(x, shift, y, sample),
        *plain_gate_backward(grad, shift, y, sample, pieces),
    ]
    differences = []
    for one, other in zip(fused, plain, strict=True):
        differences.append((one.float() - other.float()).abs().max())
    return torch.stack(differences).max().item()
