"""DiT blocks over packed tokens, the final layer, and RMSNorm."""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import Attention
from models.packing import per_token
from models.types import Packing


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 and returned in the input's precision."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, eps=1e-5).to(x.dtype)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then scale and shift (adaLN; DiT, section 3.2); all three broadcast."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class DiTBlock(nn.Module):
    """adaLN-Zero block on packed tokens (T, D), conditioned per sample (B, D); `mlp_ratio` 0 means attention only."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, attention: str):
        super().__init__()
        self.attn = Attention(width, heads, attention)
        gelu = partial(nn.GELU, approximate="tanh")
        self.mlp = Mlp(width, int(width * mlp_ratio), act_layer=gelu) if mlp_ratio else None
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, packing: Packing) -> Tensor:
        for_attention, for_mlp = self.adaLN_modulation(c).chunk(2, dim=1)  # (B, 3D) each; the second unused without an MLP
        shift, scale, gate = per_token(for_attention, packing).chunk(3, dim=1)  # (T, D)
        x = x + gate * self.attn(modulated_norm(x, shift, scale), packing)
        if self.mlp is None:
            return x
        shift, scale, gate = per_token(for_mlp, packing).chunk(3, dim=1)
        return x + gate * self.mlp(modulated_norm(x, shift, scale))


def run_blocks(blocks: nn.ModuleList, u: Tensor, c: Tensor, packing: Packing, gradient_checkpointing: bool) -> Tensor:
    """Tokens (T, D) through all blocks; `gradient_checkpointing` recomputes them in the backward pass."""
    for block in blocks:
        if gradient_checkpointing and torch.is_grad_enabled():
            u = checkpoint(block, u, c, packing, use_reentrant=False)
        else:
            u = block(u, c, packing)
    return u


class FinalLayer(nn.Module):
    """adaLN, then a linear map to the output channels: tokens (B, L, E), conditioning (B, D) -> (B, L, channels)."""

    def __init__(self, width: int, conditioning: int, channels: int):
        super().__init__()
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(conditioning, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)  # each (B, 1, E)
        return self.linear(modulated_norm(x, shift, scale))
