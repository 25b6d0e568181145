"""One multi-head attention over packed tokens, with three interchangeable kernels.

flash   flash-attn's variable-length kernel, if that package is installed (CUDA, half precision)
varlen  torch.nn.attention.varlen (CUDA, half precision)
sdpa    scaled_dot_product_attention, one call per sample or one for samples of equal length (any device, any precision)
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.types import Packing

HAS_FLASH = importlib.util.find_spec("flash_attn") is not None
# cuDNN, which PyTorch would take first on some devices, plans for given shapes, and T is another one in every step.
PACKED_FIRST = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]


class Attention(nn.Module):
    """Full self-attention among the tokens of each sample; the block maps its tokens with `qkv` first: (T, 3D) -> (T, D)."""

    def __init__(self, width: int, heads: int, kernel: str):
        super().__init__()
        self.heads, self.kernel = heads, kernel
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, qkv: Tensor, packing: Packing) -> Tensor:
        qkv = qkv.view(len(qkv), 3, self.heads, -1)
        attend = KERNELS[pick_kernel(qkv) if self.kernel == "auto" else self.kernel]
        return self.proj(attend(qkv, packing).flatten(1))


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
    """Why a kernel cannot run on this device, in this precision or with heads of this size, or None."""
    if kernel in ("flash", "varlen") and (device.type != "cuda" or not half):
        return f"'{kernel}' needs a CUDA device and bfloat16; use auto or sdpa"
    if kernel in ("flash", "varlen") and not fits(head_size):
        return f"'{kernel}' needs heads of 8, 16, ... or 256 channels, and the model's have {head_size}; use auto or sdpa"
    if kernel == "flash" and not HAS_FLASH:
        return "'flash' needs the package flash-attn; install it, or use auto"
    return None


def _sdpa(qkv: Tensor, packing: Packing) -> Tensor:
    if qkv.is_cpu:
        return torch.ops.dc_dit.attend(qkv, packing.lengths)[0]
    return by_sample(qkv, packing)


def by_sample(qkv: Tensor, packing: Packing) -> Tensor:
    lengths = packing.lengths.tolist()
    if len(set(lengths)) == 1:  # equal samples, as of a static DiT: one call
        dense = (
            x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in qkv.unbind(1)
        )  # (B, heads, tokens, D / heads)
        return F.scaled_dot_product_attention(*dense).transpose(1, 2).flatten(0, 1)
    samples = qkv.transpose(0, 2).split(lengths, dim=2)  # (heads, 3, tokens, D / heads)
    outputs = [F.scaled_dot_product_attention(*part[None].unbind(2))[0] for part in samples]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _varlen(qkv: Tensor, packing: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    with sdpa_kernel(PACKED_FIRST, set_priority=True):
        return varlen_attn(
            *qkv.unbind(1), packing.cu_seqlens, packing.cu_seqlens, packing.max_length, packing.max_length
        )


def _flash(qkv: Tensor, packing: Packing) -> Tensor:
    from flash_attn import flash_attn_varlen_qkvpacked_func

    return flash_attn_varlen_qkvpacked_func(qkv, packing.cu_seqlens, packing.max_length)


KERNELS = {"sdpa": _sdpa, "varlen": _varlen, "flash": _flash}


# ----------------------------------------------------------------------------------------------------------------- the CPU
# One operation for PyTorch's compiler, which would else unroll the loop over samples and compile anew for other lengths.
# (`torch.library.custom_op` says the same in fewer words, but importing the compiler for it takes every process seconds.)

_LIBRARY = torch.library.Library("dc_dit", "DEF")
_LIBRARY.define("attend(Tensor qkv, Tensor lengths) -> (Tensor, Tensor)")
_LIBRARY.define(
    "attend_backward(Tensor grad, Tensor qkv, Tensor out, Tensor logsum, Tensor lengths) -> Tensor"
)


@torch.library.impl(_LIBRARY, "attend", "CPU")
def _attend(qkv: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(T, 3, heads, size), lengths (B,) -> (T, heads, size), and the log of the softmax's denominator (heads, T)."""
    tokens, _, heads, size = qkv.shape
    out, logsum = qkv.new_empty(tokens, heads, size), qkv.new_empty(heads, tokens, dtype=_precision(qkv))
    for part in _segments(lengths):
        sample = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(qkv[part]))
        out[part], logsum[:, part] = sample[0][0].transpose(0, 1), sample[1].view(heads, -1)
    return out, logsum


@torch.library.register_fake("dc_dit::attend")
def _(qkv: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    tokens, _, heads, size = qkv.shape
    return qkv.new_empty(tokens, heads, size), qkv.new_empty(heads, tokens, dtype=_precision(qkv))


@torch.library.impl(_LIBRARY, "attend_backward", "CPU")
def _attend_backward(grad: Tensor, qkv: Tensor, out: Tensor, logsum: Tensor, lengths: Tensor) -> Tensor:
    grad_qkv = torch.empty_like(qkv)
    for part in _segments(lengths):
        grad_out, own = (x[part].transpose(0, 1)[None] for x in (grad, out))
        logs = logsum[None, :, part]
        sample = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, *_heads_first(qkv[part]), own, logs, 0.0, False
        )
        for k, x in enumerate(sample):
            grad_qkv[part, k] = x[0].transpose(0, 1)
    return grad_qkv


@torch.library.register_fake("dc_dit::attend_backward")
def _(grad: Tensor, qkv: Tensor, out: Tensor, logsum: Tensor, lengths: Tensor) -> Tensor:
    return torch.empty_like(qkv)


def _precision(qkv: Tensor) -> torch.dtype:
    return torch.promote_types(qkv.dtype, torch.float32)


def _segments(lengths: Tensor) -> list[slice]:
    ends = lengths.cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends)]


def _heads_first(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, 3, heads, size) -> three views (1, heads, tokens, size)."""
    return qkv.permute(1, 2, 0, 3)[:, None].unbind(0)


def _keep_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, grad: Tensor, _):
    qkv, lengths, out, logsum = ctx.saved_tensors
    return torch.ops.dc_dit.attend_backward(grad, qkv, out, logsum, lengths), None


torch.library.register_autograd("dc_dit::attend", _gradient, setup_context=_keep_for_backward)
