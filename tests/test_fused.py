"""Triton's kernels against the plain form, by Triton's interpreter, and when they are used."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from models.ops import fused, norm_silu, rows
from models.packing import plan_packing

EPS = 1e-6
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when it is imported
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="of the other process")


@not_interpreted
def test_in_the_interpreter():
    """The tests below that are marked so, in a process of their own."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
    assert "12 passed" in process.stdout, process.stdout


def packing_of(lengths: list[int]):
    keep = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return plan_packing(keep)


def tolerance(precision: torch.dtype) -> dict[str, float]:
    return dict.fromkeys(("rtol", "atol"), 1e-5 if precision == torch.float32 else 0.02)


@interpreted
@pytest.mark.parametrize("width", [64, 72])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_passes_over_tokens(width, precision):
    from models.ops import triton_rows as kernels

    # Fewer tokens than pieces, as many, more; widths that fill a program and that do not
    lengths = [2, 16, 37]
    packing = packing_of(lengths)
    sample, pieces = packing.sample, packing.pieces
    x, grad = torch.randn(2, sum(lengths), width)
    y, half_grad = torch.randn(2, sum(lengths), width).to(precision)
    shift, scale, gate = torch.randn(3, 3 * width).to(precision).chunk(3, dim=1)  # rows with a stride

    pairs = (
        (
            [kernels.modulate(x, shift, scale, sample, EPS, precision)],
            [rows.plain_modulate(x, shift, scale, sample, EPS, precision)],
        ),
        (
            kernels.modulate_backward(half_grad, x, shift, scale, pieces, EPS),
            rows.plain_modulate_backward(half_grad, x, shift, scale, sample, pieces, EPS),
        ),
        ([kernels.gate(x, gate, y, sample)], [rows.plain_gate(x, gate, y, sample)]),
        (
            kernels.gate_backward(grad, gate, y, pieces),
            rows.plain_gate_backward(grad, gate, y, sample, pieces),
        ),
    )
    for ours, plain in pairs:
        for one, other in zip(ours, plain, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, **tolerance(precision))


@interpreted
@pytest.mark.parametrize("width, groups, side", [(64, 32, 4), (72, 8, 5), (96, 32, 3)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_norm_and_silu(width, groups, side, precision, monkeypatch):
    """Means far from zero must not cost digits; samples with rows that do not fill a program's."""
    from models.ops import triton_norm

    norm = nn.GroupNorm(groups, width)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, weights = torch.randn(2, 3, width, side, side)
    x = (x + 10).to(precision).contiguous(memory_format=torch.channels_last).requires_grad_()
    inputs = (x, norm.weight, norm.bias)

    plain = norm_silu.plain_norm_silu(x.float(), norm).to(precision)
    expected = torch.autograd.grad((plain * weights).sum(), inputs)
    ours = norm_silu._NormSilu.apply(*inputs, norm, triton_norm)
    if precision == torch.bfloat16:  # as under autocast
        monkeypatch.setattr(norm_silu, "product_dtype", lambda x, weight: precision)
        ours = norm_silu._NormSilu.apply(*inputs, norm, triton_norm)
    gradients = torch.autograd.grad((ours * weights).sum(), inputs)
    assert ours.dtype == precision and ours.is_contiguous(memory_format=torch.channels_last)
    for one, other in zip((ours, *gradients), (plain, *expected), strict=True):
        assert one.dtype == other.dtype
        bound = 1e-5 if precision == torch.float32 else 0.03
        torch.testing.assert_close(one, other, rtol=bound, atol=bound * other.abs().max().item())


@interpreted
def test_wrong_kernels_are_not_used(monkeypatch):
    from models.ops import triton_rows as kernels

    arguments = ("triton_rows", torch.device("cpu"), 64, rows.largest_difference)
    check = fused.checked_kernels.__wrapped__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check(*arguments) is kernels
    # Off by a factor
    monkeypatch.setattr(kernels, "gate", lambda x, gate, y, sample: x + 1.1 * gate[sample] * y)
    with pytest.warns(UserWarning, match="is off by"):
        assert check(*arguments) is None
    # Without a compiler
    monkeypatch.setattr(kernels, "gate", None)
    with pytest.warns(UserWarning, match="Triton fails"):
        assert check(*arguments) is None


@interpreted
@torch.inference_mode()
def test_the_comparison_before_the_use_passes():
    from models.ops import triton_norm, triton_rows

    cpu = torch.device("cpu")
    assert rows.largest_difference(triton_rows, cpu, 200) <= fused.TOLERANCE
    assert norm_silu.largest_difference(triton_norm, cpu, 96) <= fused.TOLERANCE


@not_interpreted
def test_without_triton_the_plain_form_serves(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "models.ops.triton_rows", raising=False)
    with pytest.warns(UserWarning, match="there is no Triton"):
        kernels = fused.checked_kernels.__wrapped__("triton_rows", torch.device("cpu"), 64, lambda *_: 0.0)
    assert kernels is None


@not_interpreted
def test_off_cuda_the_plain_form_serves(monkeypatch):
    monkeypatch.setattr(fused, "checked_kernels", lambda *arguments: pytest.fail("asked"))
    assert rows.kernels_for(torch.zeros(2, 8)) is None
    x, norm = torch.randn(2, 8, 4, 4), nn.GroupNorm(2, 8)
    assert torch.equal(norm_silu.norm_silu(x, norm), torch.nn.functional.silu(norm(x)))


@not_interpreted
@pytest.mark.cuda
def test_the_kernels_are_used_on_cuda():
    assert rows.kernels_for(torch.zeros(2, 64, device="cuda")) is not None
    assert rows.kernels_for(torch.zeros(2, 64, device="cuda", dtype=torch.float64)) is None
    x, norm = torch.randn(2, 64, 4, 4, device="cuda"), nn.GroupNorm(2, 64, device="cuda")
    assert norm_silu.norm_silu(x, norm).is_contiguous(memory_format=torch.channels_last)
