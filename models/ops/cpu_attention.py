"""Attention over packed tokens on a CPU as one operation, forward and backward.

PyTorch's compiler would unroll a loop over samples and compile again for other lengths; an operation it
leaves alone. (`torch.library.custom_op` takes fewer lines, but it imports the compiler, which costs every
process seconds.) Twin: `attention` in models/reference.py.
"""

from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 20  # scores that are in memory at a time in the backward pass for bfloat16

_LIBRARY = torch.library.Library("dc_dit", "DEF")
_LIBRARY.define("attend(Tensor qkv, Tensor lengths) -> (Tensor, Tensor)")
_LIBRARY.define(
    "attend_backward(Tensor grad, Tensor qkv, Tensor out, Tensor logsum, Tensor lengths) -> Tensor"
)


def attend(qkv: Tensor, lengths: Tensor) -> Tensor:
    """Self-attention in each sample: (T, 3, heads, size), lengths (B,) -> (T, heads, size)."""
    return torch.ops.dc_dit.attend(qkv, lengths)[0]


@torch.library.impl(_LIBRARY, "attend", "CPU")
def _attend(qkv: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the output (T, heads, size), and the log of the softmax's denominator (heads, T)."""
    out, logsum = _empty_outputs(qkv, lengths)
    # Sample by sample, written into one output
    for part in _samples(lengths):
        q, k, v = _heads_first(qkv[part])
        sample, sample_logsum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        out[part] = sample[0].transpose(0, 1)
        logsum[:, part] = sample_logsum.view(len(logsum), -1)
    return out, logsum


@torch.library.register_fake("dc_dit::attend")
def _empty_outputs(qkv: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of the right shapes and types, for `_attend` to fill and for the compiler to trace."""
    tokens, _, heads, size = qkv.shape
    precision = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(tokens, heads, size), qkv.new_empty(heads, tokens, dtype=precision)


@torch.library.impl(_LIBRARY, "attend_backward", "CPU")
def _attend_backward(grad: Tensor, qkv: Tensor, out: Tensor, logsum: Tensor, lengths: Tensor) -> Tensor:
    """Gradient of the output (T, heads, size) -> gradient of qkv (T, 3, heads, size)."""
    grad_qkv = torch.empty_like(qkv)
    for part in _samples(lengths):
        if qkv.dtype == torch.bfloat16:
            _backward_by_products(grad[part], qkv[part], grad_qkv[part])
            continue
        q, k, v = _heads_first(qkv[part])
        sample_grad = grad[part].transpose(0, 1)[None]
        sample_out = out[part].transpose(0, 1)[None]
        sample_logsum = logsum[None, :, part]
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            sample_grad, q, k, v, sample_out, sample_logsum, 0.0, False
        )
        for role, gradient in enumerate(gradients):
            grad_qkv[part, role] = gradient[0].transpose(0, 1)
    return grad_qkv


def _backward_by_products(grad: Tensor, qkv: Tensor, grad_qkv: Tensor) -> None:
    """Gradient of one sample, in products of whole matrices: PyTorch's kernel is slow in bfloat16 for small heads.

    With P = softmax(s q k^T), s = size^-1/2 and G the gradient of the output: the gradient of v is P^T G, and with
    S the softmax's gradient for G v^T, that of q is s S k and that of k is s S^T q. It takes some rows of P at a
    time, which bounds its memory.

    Args:
        grad: (tokens, heads, size). qkv: (tokens, 3, heads, size). grad_qkv: written to, of the shape of qkv.
    """
    tokens, _, heads, size = qkv.shape
    q, k, v = qkv.permute(1, 2, 0, 3).contiguous().unbind(0)  # (heads, tokens, size) each
    grad = grad.transpose(0, 1).contiguous()
    scaled_q = q * size**-0.5
    grad_q, grad_k, grad_v = grad_qkv.permute(1, 2, 0, 3).unbind(0)
    # In float32, because all parts are added up
    sum_k = torch.zeros(heads, tokens, size)
    sum_v = torch.zeros(heads, tokens, size)

    step = max(1, BLOCK // (heads * tokens))
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        prob = (scaled_q[:, part] @ k.mT).softmax(-1)  # (heads, rows, tokens)
        sum_v += prob.mT @ grad[:, part]
        grad_prob = grad[:, part] @ v.mT
        grad_score = torch._softmax_backward_data(grad_prob, prob, -1, prob.dtype)
        grad_q[:, part] = (grad_score @ k) * size**-0.5
        sum_k += grad_score.mT @ scaled_q[:, part]
    grad_k.copy_(sum_k)
    grad_v.copy_(sum_v)


@torch.library.register_fake("dc_dit::attend_backward")
def _empty_gradient(grad: Tensor, qkv: Tensor, out: Tensor, logsum: Tensor, lengths: Tensor) -> Tensor:
    return torch.empty_like(qkv)


def _samples(lengths: Tensor) -> list[slice]:
    """The packed tokens of each sample."""
    ends = lengths.cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends)]


def _heads_first(qkv: Tensor) -> tuple[Tensor, ...]:
    """(tokens, 3, heads, size) -> three views (1, heads, tokens, size)."""
    return qkv.permute(1, 2, 0, 3)[:, None].unbind(0)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    qkv, lengths = inputs
    out, logsum = output
    ctx.save_for_backward(qkv, lengths, out, logsum)
    ctx.mark_non_differentiable(logsum)


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
    qkv, lengths, out, logsum = ctx.saved_tensors
    return torch.ops.dc_dit.attend_backward(grad, qkv, out, logsum, lengths), None


torch.library.register_autograd("dc_dit::attend", _gradient, setup_context=_keep_for_backward)
