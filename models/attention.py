"""Multi-head attention over packed tokens, with three interchangeable kernels.

flash   flash-attn's variable-length kernel, if that package is installed (CUDA, half precision)
varlen  torch.nn.attention.varlen (CUDA, half precision)
sdpa    scaled_dot_product_attention (any device, any precision). On CUDA its memory-efficient kernel takes all
        samples in one launch, on a CPU models/ops/cpu_attention.py as one operation; elsewhere sample by sample
"""

import contextlib
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.ops import cpu_attention
from models.ops.recompute import Modulated, linear
from models.types import Packing

HALF = (torch.float16, torch.bfloat16)
LEAST_CAPABILITY = (8, 0)  # of GPUs with the kernels for packed tokens in half precision
TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])


class Attention(nn.Module):
    """Full self-attention among the tokens of each sample: (T, D) -> (T, D)."""

    def __init__(self, width: int, heads: int, kernel: str):
        super().__init__()
        self.heads = heads
        self.kernel = kernel
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.has_flash = has_flash()  # asked here, because the compiler cannot trace an import that fails
        self.attend_by_sample = attend_by_sample  # `models.compile_parts` keeps it out of the compiled graph

    def forward(self, x: Tensor | Modulated, packing: Packing) -> Tensor:
        qkv = linear(x, self.qkv)  # (T, 3D)
        qkv = qkv.view(len(qkv), 3, self.heads, -1)  # (T, 3, heads, D / heads)
        attended = self.attend(qkv, packing)  # (T, heads, D / heads)
        return self.proj(attended.flatten(1))

    def attend(self, qkv: Tensor, packing: Packing) -> Tensor:
        """(T, 3, heads, size) -> (T, heads, size), by the configured kernel or the fastest that works."""
        kernel = pick_kernel(qkv, self.has_flash) if self.kernel == "auto" else self.kernel
        if kernel == "flash":
            return attend_flash(qkv, packing)
        if kernel == "varlen":
            return attend_varlen(qkv, packing)
        if qkv.is_cpu:
            return cpu_attention.attend(qkv, packing.lengths)
        if qkv.is_cuda and qkv.dtype != torch.float64:
            return attend_efficient(qkv, packing)
        return self.attend_by_sample(qkv, packing)


@functools.cache
def has_flash() -> bool:
    """Whether flash-attn's function can be imported. Version 4 has the package and no such function."""
    try:
        from flash_attn import flash_attn_varlen_qkvpacked_func  # noqa: F401
    except ImportError:
        return False
    return True


def pick_kernel(qkv: Tensor, has_flash: bool) -> str:
    """The fastest kernel that works for this device, precision and head size."""
    if not qkv.is_cuda or qkv.dtype not in HALF or not fits(qkv.shape[-1]):
        return "sdpa"
    if torch.cuda.get_device_capability(qkv.device) < LEAST_CAPABILITY:
        return "sdpa"
    return "flash" if has_flash else "varlen"


def fits(head_size: int) -> bool:
    """Whether the kernels for packed tokens take heads of this size."""
    return head_size % 8 == 0 and head_size <= 256


def kernel_problem(kernel: str, device: torch.device, half: bool, head_size: int) -> str | None:
    """Why a kernel cannot run on this device, in this precision or with heads of this size; None if it can."""
    if kernel not in ("flash", "varlen"):
        return None
    if device.type != "cuda" or not half:
        return f"'{kernel}' needs a CUDA device and bfloat16; use auto or sdpa"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < LEAST_CAPABILITY:
        return f"'{kernel}' needs compute capability 8.0, and this GPU has {major}.{minor}; use auto or sdpa"
    if not fits(head_size):
        return (
            f"'{kernel}' needs heads of 8, 16, ... or 256 channels, "
            f"and the model's have {head_size}; use auto or sdpa"
        )
    if kernel == "flash" and not has_flash():
        return "'flash' needs the package flash-attn, version 2; install it, or use auto"
    return None


def attend_flash(qkv: Tensor, packing: Packing) -> Tensor:
    """(T, 3, heads, size) -> (T, heads, size) by flash-attn."""
    from flash_attn import flash_attn_varlen_qkvpacked_func

    return flash_attn_varlen_qkvpacked_func(qkv, packing.cu_seqlens, packing.max_length)


def attend_varlen(qkv: Tensor, packing: Packing) -> Tensor:
    """(T, 3, heads, size) -> (T, heads, size) by PyTorch's variable-length attention, always its Flash kernel."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.unbind(1)
    starts = packing.cu_seqlens
    longest = packing.max_length
    with prefer_flash():
        attended = varlen_attn(q, k, v, starts, starts, longest, longest, **flash_options(longest))
    assert isinstance(attended, Tensor)  # a pair only where the log-sum-exp is asked for
    return attended


def flash_options(longest: int) -> dict[str, Any]:
    """Options of `varlen_attn` that keep version 2.14 of PyTorch from cuDNN, in both passes.

    On Hopper and Blackwell that version takes cuDNN unless there is a window. cuDNN makes a plan for every
    number of tokens T and keeps it for ever, and T differs in every step. A window over the whole sample is full
    attention, and Flash computes it as that. Older versions never take cuDNN here; newer ones ask for an order.
    """
    return {"window_size": (longest, longest)} if TORCH == (2, 14) else {}


def prefer_flash() -> contextlib.AbstractContextManager:
    """From 2.15 on, the order in which `varlen_attn` tries its kernels: Flash first."""
    if TORCH < (2, 15):
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION], set_priority=True)


def attend_efficient(qkv: Tensor, packing: Packing) -> Tensor:
    """(T, 3, heads, size) -> (T, heads, size) by PyTorch's memory-efficient kernel, which takes float32 too.

    It is the kernel of `scaled_dot_product_attention` on dense batches, told where each sample starts.
    """
    q, k, v = qkv[None].unbind(2)  # (1, T, heads, size) each
    starts = packing.cu_seqlens
    longest = min(packing.max_length, len(qkv))  # its backward pass refuses a bound above T
    no_bias = None
    no_dropout = 0.0
    no_mask = 0
    attended = torch.ops.aten._efficient_attention_forward(
        q, k, v, no_bias, starts, starts, longest, longest, no_dropout, no_mask, compute_log_sumexp=True
    )[0]
    return attended[0]


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
