"""One multi-head attention over packed tokens, with three interchangeable kernels.

flash   flash-attn's variable-length kernel, if that package is installed (CUDA, half precision)
varlen  torch.nn.attention.varlen (CUDA, half precision)
sdpa    scaled_dot_product_attention, one call per sample or one for samples of equal length (any device, any precision)
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.types import Packing

HAS_FLASH = importlib.util.find_spec("flash_attn") is not None


class Attention(nn.Module):
    """Full self-attention among the tokens of each sample: (T, D) -> (T, D)."""

    def __init__(self, width: int, heads: int, kernel: str):
        super().__init__()
        self.heads, self.kernel = heads, kernel
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)  # each (T, heads, D / heads)
        attend = KERNELS[pick_kernel(q) if self.kernel == "auto" else self.kernel]
        return self.proj(attend(q, k, v, packing).flatten(1))


def pick_kernel(q: Tensor) -> str:
    """The fastest kernel that works for this device, precision and head size."""
    head_size = q.shape[-1]
    if not q.is_cuda or q.dtype == torch.float32 or head_size % 8 or head_size > 256:
        return "sdpa"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "sdpa"
    return "flash" if HAS_FLASH else "varlen"


def kernel_problem(kernel: str, device: torch.device, half: bool) -> str | None:
    """Why a kernel cannot run on this device or in this precision, or None."""
    if kernel in ("flash", "varlen") and (device.type != "cuda" or not half):
        return f"'{kernel}' needs a CUDA device and bfloat16; use auto or sdpa"
    if kernel == "flash" and not HAS_FLASH:
        return "'flash' needs the package flash-attn; install it, or use auto"
    return None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    lengths = packing.lengths
    if len(set(lengths)) == 1:  # equal samples, as of a static DiT: one call
        dense = (x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, tokens, D / heads)
        return F.scaled_dot_product_attention(*dense).transpose(1, 2).flatten(0, 1)
    parts = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)))  # (heads, tokens, D / heads)
    outputs = [F.scaled_dot_product_attention(*(x[None] for x in part))[0] for part in parts]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(packing.lengths)
    return varlen_attn(q, k, v, packing.cu_seqlens, packing.cu_seqlens, longest, longest)


def _flash(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    longest = max(packing.lengths)
    return flash_attn_varlen_func(q, k, v, packing.cu_seqlens, packing.cu_seqlens, longest, longest)


KERNELS = {"sdpa": _sdpa, "varlen": _varlen, "flash": _flash}
