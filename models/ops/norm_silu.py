"""GroupNorm and SiLU in channels_last memory, on CUDA too, where PyTorch's own copies to another layout."""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.ops.fused import find_kernels
from models.ops.precision import product_dtype


def norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """SiLU(GroupNorm(x)): (B, C, S, S) -> (B, C, S, S), computed in float32."""
    kernels = find_kernels("triton_norm", x, x.shape[1], largest_difference)
    if kernels is None:
        return plain_norm_silu(x, norm)
    return _NormSilu.apply(x, norm.weight, norm.bias, norm, kernels)


def plain_norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """`norm_silu` in PyTorch's operations."""
    return F.silu(norm(x))


class _NormSilu(torch.autograd.Function):
    """`norm_silu` by the kernels of models/ops/triton_norm.py; keeps x and the statistics of its channels."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.GroupNorm, kernels: ModuleType
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        # The convolution that follows reads it in this precision
        dtype = product_dtype(x, weight)
        out, mean, rstd = kernels.norm_silu(x, weight, bias, norm.num_groups, norm.eps, dtype)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.groups = norm.num_groups
        ctx.kernels = kernels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous(memory_format=torch.channels_last)
        return *ctx.kernels.norm_silu_backward(grad, *ctx.saved_tensors, ctx.groups), None, None


@torch.inference_mode(False)  # sampling may be what asks first
def largest_difference(kernels: ModuleType, device: torch.device, width: int) -> float:
    """Largest difference of the kernels to the plain form, relative to the largest value, in a small case."""
    side = 8
    values = torch.arange(4 * side**2 * width, device=device, dtype=torch.float32).sin() + 0.5
    x, grad = values.view(2, 2, side, side, width).permute(0, 1, 4, 2, 3)
    x, grad = x.bfloat16(), grad.bfloat16()
    norm = nn.GroupNorm(8 if width % 8 == 0 else 1, width, device=device)

    with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16):
        leaf = x.detach().requires_grad_()
        plain = plain_norm_silu(leaf.float(), norm)
        expected = torch.autograd.grad(plain, (leaf, norm.weight, norm.bias), grad.float())
    out, mean, rstd = kernels.norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, torch.bfloat16)
    gradients = kernels.norm_silu_backward(grad, x, mean, rstd, norm.weight, norm.bias, norm.num_groups)

    differences = []
    for one, other in zip((out, *gradients), (plain, *expected)):
        error = (one.float() - other.float()).abs().max()
        differences.append(error / other.float().abs().max().clamp(min=1))
    return torch.stack(differences).max().item()
