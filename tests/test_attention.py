"""Attention over packed tokens: every kernel against one dense attention with a mask."""

import pytest
import torch

from models.attention import (
    Attention,
    attend_by_sample,
    attend_flash,
    attend_varlen,
    kernel_problem,
    pick_kernel,
)
from models.ops import cpu_attention
from models.packing import plan_packing

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
LENGTHS = [1, 5, 2, 7]


def make_packing(device="cpu"):
    keep = torch.arange(8, device=device)[None] < torch.tensor(LENGTHS, device=device)[:, None]
    return plan_packing(keep)


def attend_densely(attention: Attention, x, packing):
    """All tokens against all, those of other samples masked out, with the formula written out."""
    heads, width = attention.heads, x.shape[1]
    q, k, v = attention.qkv(x).chunk(3, dim=1)
    q, k, v = (
        part.unflatten(1, (heads, width // heads)).transpose(0, 1) for part in (q, k, v)
    )  # (heads, T, d)
    scores = q @ k.transpose(1, 2) / (width // heads) ** 0.5
    scores = scores.masked_fill(packing.sample[:, None] != packing.sample, float("-inf"))
    return attention.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))


@pytest.mark.parametrize("heads", [1, 4])
def test_sdpa_per_sample_is_one_masked_attention(heads):
    attention, packing = Attention(32, heads, "sdpa").double(), make_packing()
    x = torch.randn(sum(LENGTHS), 32, dtype=torch.float64, requires_grad=True)
    ours, dense = attention(x, packing), attend_densely(attention, x, packing)
    torch.testing.assert_close(ours, dense)
    weights = torch.randn_like(ours)
    for a, b in zip(
        *(torch.autograd.grad((y * weights).sum(), [x, *attention.parameters()]) for y in (ours, dense))
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("block", [cpu_attention.BLOCK, 100])
def test_bfloat16_gradients_on_a_cpu_are_near_those_of_float64(block, monkeypatch):
    """With `block` 100 the backward pass takes a few rows of the scores at a time."""
    monkeypatch.setattr(cpu_attention, "BLOCK", block)
    lengths = torch.tensor([1, 40, 23])
    exact_qkv = torch.randn(64, 3, 4, 16).bfloat16().double().requires_grad_()
    grad = torch.randn(64, 4, 16).bfloat16()
    samples = exact_qkv.split(lengths.tolist())
    exact = [torch.nn.functional.scaled_dot_product_attention(*heads_first(sample)) for sample in samples]
    exact_out = torch.cat([out.transpose(0, 1) for out in exact])
    wanted = torch.autograd.grad(exact_out, exact_qkv, grad.double())[0]

    qkv = exact_qkv.detach().bfloat16().requires_grad_()
    out = cpu_attention.attend(qkv, lengths)
    gradient = torch.autograd.grad(out, qkv, grad)[0]
    assert gradient.dtype == torch.bfloat16
    assert (out - exact_out).norm() / exact_out.norm() < 0.01
    assert (gradient - wanted).norm() / wanted.norm() < 0.01


def heads_first(qkv):
    """(tokens, 3, heads, size) -> three of (heads, tokens, size)."""
    return qkv.permute(1, 2, 0, 3).unbind(0)


def test_auto_is_sdpa_on_the_cpu():
    assert (
        pick_kernel(torch.zeros(1)) == "sdpa" and pick_kernel(torch.zeros(1, dtype=torch.bfloat16)) == "sdpa"
    )
    auto, forced, packing = Attention(32, 4, "auto"), Attention(32, 4, "sdpa"), make_packing()
    forced.load_state_dict(auto.state_dict())
    x = torch.randn(sum(LENGTHS), 32)
    assert torch.equal(auto(x, packing), forced(x, packing))


@needs_cuda
@pytest.mark.parametrize("kernel", ["varlen", "flash"])
def test_cuda_kernels_equal_sdpa(kernel):
    if kernel == "flash":
        pytest.importorskip("flash_attn")
    packing = make_packing("cuda")
    qkv = torch.randn(sum(LENGTHS), 3, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = torch.randn(qkv[:, 0].shape, device="cuda")
    results = []
    for attend in (attend_flash if kernel == "flash" else attend_varlen, attend_by_sample):
        output = attend(qkv, packing)
        results.append((output, *torch.autograd.grad((output.float() * weights).sum(), qkv)))
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours.float(), plain.float(), rtol=0.02, atol=0.02)


@needs_cuda
def test_auto_on_cuda_depends_on_the_precision():
    assert pick_kernel(torch.zeros(1, device="cuda")) == "sdpa"
    assert pick_kernel(torch.zeros(1, device="cuda", dtype=torch.bfloat16)) in ("varlen", "flash")
    attention, packing = Attention(128, 2, "auto").cuda(), make_packing("cuda")
    x = torch.randn(sum(LENGTHS), 128, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        ours, dense = attention(x, packing), attend_densely(attention, x, packing)
    torch.testing.assert_close(ours.float(), dense.float(), rtol=0.02, atol=0.02)


def test_forced_kernels_say_what_they_lack():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert kernel_problem("sdpa", cpu, half=False, head_size=12) is None
    assert kernel_problem("auto", cuda, half=True, head_size=12) is None
    assert kernel_problem("varlen", cuda, half=True, head_size=64) is None
    for kernel in ("varlen", "flash"):
        assert "CUDA" in kernel_problem(kernel, cpu, half=True, head_size=64)
        assert "bfloat16" in kernel_problem(kernel, cuda, half=False, head_size=64)
        assert "12; use auto or sdpa" in kernel_problem(kernel, cuda, half=True, head_size=12)
        assert "264; use auto or sdpa" in kernel_problem(kernel, cuda, half=True, head_size=264)
