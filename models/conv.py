"""Convolutional encoder and decoder, at full latent resolution.

The network's input is in channels_last memory. All layers preserve it, so `to_tokens` copies nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import RMSNorm
from models.ops.group_norm import group_norm
from models.ops.norm_silu import norm_silu


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, S, S) -> (B, L, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_grid(tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(B, L, C) -> (B, C, S, S), for a grid of these rows and columns."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


class Conv3x3(nn.Conv2d):
    """A 3 x 3 convolution that keeps the grid: (B, in, S, S) -> (B, out, S, S)."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__(width_in, width_out, 3, padding=1)


class Conv1x1(nn.Conv2d):
    """A 1 x 1 convolution: (B, in, S, S) -> (B, out, S, S)."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        # On a CPU PyTorch's convolution first copies the grid to another layout
        if x.is_cpu:
            tokens = F.linear(to_tokens(x), self.weight.flatten(1), self.bias)
            return to_grid(tokens, x.shape[2:])
        return super().forward(x)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm with a faster backward pass in bfloat16 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        # The compiler writes its own backward pass
        if x.is_cpu and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
            return group_norm(x, self)
        return super().forward(x)


class ConvBlock(nn.Module):
    """Residual block with additive conditioning: (B, width_in, S, S), (B, D) -> (B, width_out, S, S)."""

    def __init__(self, width_in: int, width_out: int, conditioning: int):
        super().__init__()
        inner = min(width_in, width_out)
        self.norm1 = GroupNorm(32, width_in)
        self.conv1 = Conv3x3(width_in, inner)
        self.cond_proj = nn.Sequential(nn.SiLU(), nn.Linear(conditioning, inner))
        self.norm2 = GroupNorm(32, inner)
        self.conv2 = Conv3x3(inner, width_out)
        self.skip_proj = Conv1x1(width_in, width_out) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(norm_silu(x, self.norm1))
        # The conditioning shifts every channel, the same at all cells
        h = h + self.cond_proj(c)[:, :, None, None]
        h = self.conv2(norm_silu(h, self.norm2))
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
        return to_grid(self.norm(to_tokens(x)), x.shape[2:])


def build_encoder(blocks: int, width: int, d_model: int) -> ConvStack:
    """width -> width -> ... -> d_model: the last block widens."""
    return ConvStack([width] * blocks + [d_model], d_model)


def build_decoder(blocks: int, width: int, d_model: int) -> ConvStack:
    """d_model -> width -> ... -> width: the first block narrows."""
    return ConvStack([d_model] + [width] * blocks, d_model)
