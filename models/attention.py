"""Multi-head attention over packed tokens, with three interchangeable kernels.

flash   flash-attn's variable-length kernel, if that package is installed (CUDA, half precision)
varlen  torch.nn.attention.varlen (CUDA, half precision)
sdpa    scaled_dot_product_attention, sample by sample (any device, any precision); on a CPU as one operation that
        the compiler does not look into (models/ops/cpu_attention.py)
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.ops import cpu_attention
from models.ops.recompute import Modulated, linear
from models.types import Packing

HAS_FLASH = importlib.util.find_spec("flash_attn") is not None
# On some devices PyTorch would take cuDNN first. It makes a plan per shape, and T differs in every step.
VARLEN_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]


class Attention(nn.Module):
    """Full self-attention among the tokens of each sample: (T, D) -> (T, D)."""

    def __init__(self, width: int, heads: int, kernel: str):
        super().__init__()
        self.heads = heads
        self.kernel = kernel
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attend_by_sample = attend_by_sample  # `models.compile_parts` keeps it out of the compiled graph

    def forward(self, x: Tensor | Modulated, packing: Packing) -> Tensor:
        qkv = linear(x, self.qkv)  # (T, 3D)
        qkv = qkv.view(len(qkv), 3, self.heads, -1)  # (T, 3, heads, D / heads)
        attended = self.attend(qkv, packing)  # (T, heads, D / heads)
        return self.proj(attended.flatten(1))

    def attend(self, qkv: Tensor, packing: Packing) -> Tensor:
        """(T, 3, heads, size) -> (T, heads, size), by the configured kernel or the fastest that works."""
        kernel = pick_kernel(qkv) if self.kernel == "auto" else self.kernel
        if kernel == "flash":
            return attend_flash(qkv, packing)
        if kernel == "varlen":
            return attend_varlen(qkv, packing)
        if qkv.is_cpu:
            return cpu_attention.attend(qkv, packing.lengths)
        return self.attend_by_sample(qkv, packing)


def pick_kernel(qkv: Tensor) -> str:
    """The fastest kernel that works for this device, precision and head size."""
    if not qkv.is_cuda or qkv.dtype == torch.float32 or not fits(qkv.shape[-1]):
        return "sdpa"
    if torch.cuda.get_device_capability(qkv.device) < (8, 0):
        return "sdpa"
    return "flash" if HAS_FLASH else "varlen"


def fits(head_size: int) -> bool:
    """Whether the kernels for packed tokens take heads of this size."""
    return head_size % 8 == 0 and head_size <= 256


def kernel_problem(kernel: str, device: torch.device, half: bool, head_size: int) -> str | None:
    """Why a kernel cannot run on this device, in this precision or with heads of this size; None if it can."""
    if kernel in ("flash", "varlen") and (device.type != "cuda" or not half):
        return f"'{kernel}' needs a CUDA device and bfloat16; use auto or sdpa"
    if kernel in ("flash", "varlen") and not fits(head_size):
        return (
            f"'{kernel}' needs heads of 8, 16, ... or 256 channels, "
            f"and the model's have {head_size}; use auto or sdpa"
        )
    if kernel == "flash" and not HAS_FLASH:
        return "'flash' needs the package flash-attn; install it, or use auto"
    return None


def attend_flash(qkv: Tensor, packing: Packing) -> Tensor:
    """(T, 3, heads, size) -> (T, heads, size) by flash-attn."""
    from flash_attn import flash_attn_varlen_qkvpacked_func

    return flash_attn_varlen_qkvpacked_func(qkv, packing.cu_seqlens, packing.max_length)


def attend_varlen(qkv: Tensor, packing: Packing) -> Tensor:
    """(T, 3, heads, size) -> (T, heads, size) by PyTorch's variable-length attention."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.unbind(1)
    starts = packing.cu_seqlens
    longest = packing.max_length
    with sdpa_kernel(VARLEN_BACKENDS, set_priority=True):
        attended = varlen_attn(q, k, v, starts, starts, longest, longest)
    assert isinstance(attended, Tensor)  # a pair only where the log-sum-exp is asked for
    return attended


def attend_by_sample(qkv: Tensor, packing: Packing) -> Tensor:
    """(T, 3, heads, size) -> (T, heads, size): one call per sample, or one for samples of equal length."""
    lengths = packing.lengths.tolist()

    # Samples of equal length, such as those of a static DiT, make a dense batch
    if len(set(lengths)) == 1:
        dense = qkv.unflatten(0, (len(lengths), -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, tokens, size)
        attended = F.scaled_dot_product_attention(*dense)  # (B, heads, tokens, size)
        return attended.transpose(1, 2).flatten(0, 1)

    # Other samples are attended to one after another
    samples = qkv.permute(1, 2, 0, 3).split(lengths, dim=2)  # (3, heads, tokens, size) each
    outputs = [F.scaled_dot_product_attention(*sample[:, None])[0] for sample in samples]
    return torch.cat(outputs, dim=1).transpose(0, 1)
