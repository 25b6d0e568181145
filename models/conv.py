"""Convolutional encoder and decoder of the scaffold, at full latent resolution.

The network's input is in channels_last memory; where the layers keep it, `to_tokens` is a view and each token contiguous.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.blocks import RMSNorm


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, S, S) -> (B, L, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_grid(tokens: Tensor) -> Tensor:
    """(B, L, C) -> (B, C, S, S)."""
    side = int(tokens.shape[1] ** 0.5)
    return tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2)


WIDE = 128 * 128  # channels in times channels out from which `_WideConv` is the faster one (docs/LOG.md)


class Conv3x3(nn.Conv2d):
    """A 3 x 3 convolution that keeps the grid: (B, in, S, S) -> (B, out, S, S)."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__(width_in, width_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and self.in_channels * self.out_channels >= WIDE:
            return _WideConv.apply(x, self.weight, self.bias)
        return super().forward(x)


class _WideConv(torch.autograd.Function):
    """The same with the weight's gradient as nine matrix products, one per cell of the kernel: on a CPU about twice as fast."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = (saved.to(grad.dtype) for saved in ctx.saved_tensors)
        grad_weight = weight_gradient(x, grad).view_as(
            weight
        )  # first: what it needs on the way is free again then
        return torch.nn.grad.conv2d_input(x.shape, weight, grad, padding=1), grad_weight, grad.sum((0, 2, 3))


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Of a 3 x 3 convolution with padding: (B, in, S, S), (B, out, S, S) -> (out, in, 9)."""
    wide, narrow, sign = (
        (grad, x, 1) if x.shape[1] <= grad.shape[1] else (x, grad, -1)
    )  # the narrow one is shifted
    rows, side = to_tokens(wide).flatten(0, 1), wide.shape[-1]  # (B L, wide)
    padded = F.pad(narrow.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    cells = [(1 + sign * (i - 1), 1 + sign * (j - 1)) for i in range(3) for j in range(3)]
    shifted = (padded[:, i : i + side, j : j + side].flatten(0, 2) for i, j in cells)  # (B L, narrow)
    products = [rows.mT @ x if sign > 0 else x.mT @ rows for x in shifted]  # (out, in) each
    return torch.stack(products, dim=-1)


class ConvBlock(nn.Module):
    """Residual block with additive conditioning: (B, width_in, S, S), (B, D) -> (B, width_out, S, S)."""

    def __init__(self, width_in: int, width_out: int, conditioning: int):
        super().__init__()
        inner = min(width_in, width_out)
        self.norm1 = nn.GroupNorm(32, width_in)
        self.conv1 = Conv3x3(width_in, inner)
        self.cond_proj = nn.Sequential(nn.SiLU(), nn.Linear(conditioning, inner))
        self.norm2 = nn.GroupNorm(32, inner)
        self.conv2 = Conv3x3(inner, width_out)
        self.skip_proj = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.cond_proj(c)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.skip_proj(x)


class ConvStack(nn.Module):
    """ConvBlocks of the given widths [in, ..., out], then RMSNorm over channels."""

    def __init__(self, widths: list[int], conditioning: int):
        super().__init__()
        self.blocks = nn.ModuleList(ConvBlock(a, b, conditioning) for a, b in zip(widths, widths[1:]))
        self.norm = RMSNorm(widths[-1])

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, c)
        return to_grid(self.norm(to_tokens(x)))


def build_encoder(blocks: int, width: int, d_model: int) -> ConvStack:
    """width -> width -> ... -> d_model: the last block widens."""
    return ConvStack([width] * blocks + [d_model], d_model)


def build_decoder(blocks: int, width: int, d_model: int) -> ConvStack:
    """d_model -> width -> ... -> width: the first block narrows."""
    return ConvStack([d_model] + [width] * blocks, d_model)
