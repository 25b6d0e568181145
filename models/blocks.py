"""DiT blocks over packed tokens, the final layer, and RMSNorm."""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import Attention
from models.ops.recompute import EPS, Modulated, gated_add, gelu_linear, linear, modulate
from models.types import Architecture, Packing


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 and returned in the input's precision."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, eps=1e-5).to(x.dtype)


class Mlp(nn.Module):
    """Two linear layers around a GELU: (T, D) -> (T, D)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor | Modulated) -> Tensor:
        hidden = linear(x, self.fc1)  # (T, hidden)
        return gelu_linear(hidden, self.fc2)


class DiTBlock(nn.Module):
    """adaLN-Zero block (DiT, section 3.2) on packed tokens (T, D), conditioned per sample (B, D).

    `mlp_ratio` 0 makes a block of attention only, which still has six modulators and does not use the last three.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, attention: str):
        super().__init__()
        self.attn = Attention(width, heads, attention)
        self.mlp = Mlp(width, int(width * mlp_ratio)) if mlp_ratio else None
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, packing: Packing) -> Tensor:
        modulators = self.adaLN_modulation(c).chunk(6, dim=1)  # each (B, D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulators

        # norm -> modulate -> attend -> gate; norm and modulation are computed by the layer that reads them
        attended = self.attn(modulate(x, shift_attn, scale_attn, packing), packing)
        x = gated_add(x, gate_attn, attended, packing)
        if self.mlp is None:
            return x

        # norm -> modulate -> MLP -> gate
        transformed = self.mlp(modulate(x, shift_mlp, scale_mlp, packing))
        return gated_add(x, gate_mlp, transformed, packing)


def build_blocks(architecture: Architecture) -> nn.ModuleList:
    """The transformer blocks, one per letter of `main_blocks`."""
    a = architecture
    return nn.ModuleList(DiTBlock(a.width, a.heads, ratio, a.attention) for ratio in block_ratios(a))


def block_ratios(architecture: Architecture) -> list[float]:
    """MLP ratio of each transformer block; 0 for attention only."""
    return [architecture.mlp_ratio if letter == "D" else 0.0 for letter in architecture.main_blocks]


def run_blocks(
    blocks: nn.ModuleList,
    u: Tensor,
    c: Tensor,
    packing: Packing,
    gradient_checkpointing: bool = False,
    hidden: Collection[int] = (),
) -> tuple[Tensor, dict[int, Tensor]]:
    """Tokens (T, D) through all blocks: the result, and what the blocks with the indices `hidden` returned.

    `gradient_checkpointing` recomputes the blocks in the backward pass.
    """
    outputs = {}
    for index, block in enumerate(blocks):
        if gradient_checkpointing and torch.is_grad_enabled():
            u = checkpoint(block, u, c, packing, use_reentrant=False)
        else:
            u = block(u, c, packing)
        if index in hidden:
            outputs[index] = u
    return u, outputs


class FinalLayer(nn.Module):
    """adaLN, then a linear layer to the output channels: (B, L, E), conditioning (B, D) -> (B, L, channels)."""

    def __init__(self, width: int, conditioning: int, channels: int):
        super().__init__()
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(conditioning, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)  # each (B, 1, E)
        normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
        return self.linear(normed * (1 + scale) + shift)
