"""Every attention kernel against softmax attention in float32."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.meters import largest_difference, medians, peak_bytes
from benchmarks.report import Row
from benchmarks.workload import Case, Setup, downsampling, fixed_probabilities
from models.attention import Attention, kernel_problem
from models.packing import plan_packing
from models.types import Packing

KERNELS = ("flash", "varlen", "sdpa", "auto")

Attend = Callable[[Tensor, Packing], Tensor]


def measure_kernels(case: Case, setup: Setup) -> list[Row]:
    """Time, memory and error of each kernel in each precision, or why it cannot run here."""
    config = case.config()
    share = 1 / downsampling(config)
    keep = fixed_probabilities(case.batch, config.tokens, share, torch.device("cpu")) > 0.5
    packing = plan_packing(keep.to(setup.device), keep.sum(1).tolist())
    shape = (len(packing.token_index), 3, config.d_model // config.head_size, config.head_size)
    qkv = torch.randn(shape, device=setup.device)
    gradient = torch.randn(shape[0], *shape[2:], device=setup.device)

    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        given = qkv.to(dtype)
        expected = both_passes(exact_attention, given.float(), gradient.to(dtype).float(), packing)
        for kernel in KERNELS:
            row: Row = {"kernel": kernel, "precision": str(dtype).removeprefix("torch."), "tokens": shape[0]}
            half = dtype == torch.bfloat16
            problem = kernel_problem(kernel, setup.device, half, config.head_size)
            if problem is None:
                attention = Attention(config.d_model, shape[2], kernel)
                row |= measure_kernel(attention, given, gradient.to(dtype), packing, expected, setup)
            else:
                row |= dict.fromkeys(("forward ms", "both ms", "peak MB", "error", "gradient error"), "-")
            rows.append(row | {"cannot run because": problem or ""})
    return rows


def measure_kernel(
    attention: Attention,
    qkv: Tensor,
    gradient: Tensor,
    packing: Packing,
    expected: list[Tensor],
    setup: Setup,
) -> Row:
    """The numbers of one row."""

    def forward() -> Tensor:
        with torch.no_grad():
            return attention.attend(qkv, packing)

    def both() -> list[Tensor]:
        return both_passes(attention.attend, qkv, gradient, packing)

    times = medians({"forward": forward, "both": both}, setup.device, setup.seconds / 4)
    out, grad = both()
    return {
        "forward ms": times["forward"] * 1e3,
        "both ms": times["both"] * 1e3,
        "peak MB": peak_bytes(both, setup.device) / 1e6,
        "error": largest_difference([out], expected[:1]),
        "gradient error": largest_difference([grad], expected[1:]),
    }


def both_passes(attend: Attend, qkv: Tensor, gradient: Tensor, packing: Packing) -> list[Tensor]:
    """Output and gradient of qkv."""
    qkv = qkv.detach().requires_grad_()
    out = attend(qkv, packing)
    return [out.detach(), *torch.autograd.grad(out, qkv, gradient)]


def exact_attention(qkv: Tensor, packing: Packing) -> Tensor:
    """Softmax attention, sample by sample: (T, 3, heads, size) -> (T, heads, size)."""
    outputs = []
    for sample in qkv.split(packing.lengths.tolist()):
        q, k, v = sample.permute(1, 2, 0, 3)  # (heads, tokens, size) each
        scores = q @ k.mT / q.shape[-1] ** 0.5
        outputs.append((F.softmax(scores, dim=-1) @ v).transpose(0, 1))
    return torch.cat(outputs)
