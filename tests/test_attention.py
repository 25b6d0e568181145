"""Attention over packed tokens: every kernel against one dense attention with a mask."""

import inspect
import sys
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, varlen
from torch.utils._python_dispatch import TorchDispatchMode

from models import attention
from models.attention import (
    Attention,
    attend_by_sample,
    attend_efficient,
    attend_flash,
    attend_varlen,
    flash_options,
    has_flash,
    kernel_problem,
    pick_kernel,
)
from models.ops import cpu_attention
from models.packing import plan_packing

LENGTHS = [1, 5, 2, 7]


def make_packing(device="cpu", lengths=LENGTHS):
    keep = torch.arange(8, device=device)[None] < torch.tensor(lengths, device=device)[:, None]
    return plan_packing(keep, lengths)


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
    module, packing = Attention(32, heads, "sdpa").double(), make_packing()
    x = torch.randn(sum(LENGTHS), 32, dtype=torch.float64, requires_grad=True)
    ours, dense = module(x, packing), attend_densely(module, x, packing)
    torch.testing.assert_close(ours, dense)
    weights = torch.randn_like(ours)
    for a, b in zip(
        *(torch.autograd.grad((y * weights).sum(), [x, *module.parameters()]) for y in (ours, dense))
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
        pick_kernel(torch.zeros(1), False) == "sdpa"
        and pick_kernel(torch.zeros(1, dtype=torch.bfloat16), False) == "sdpa"
    )
    auto, forced, packing = Attention(32, 4, "auto"), Attention(32, 4, "sdpa"), make_packing()
    forced.load_state_dict(auto.state_dict())
    x = torch.randn(sum(LENGTHS), 32)
    assert torch.equal(auto(x, packing), forced(x, packing))


@pytest.mark.cuda
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


@pytest.mark.cuda
def test_auto_on_cuda_depends_on_the_precision():
    qkv = torch.zeros(1, 3, 1, 64, device="cuda")
    assert pick_kernel(qkv, False) == pick_kernel(qkv.double(), False) == "sdpa"
    assert [pick_kernel(qkv.bfloat16(), has_flash) for has_flash in (False, True)] == ["varlen", "flash"]
    assert pick_kernel(qkv[..., :1].bfloat16(), False) == "sdpa"  # heads of one channel
    module, packing = Attention(128, 2, "auto").cuda(), make_packing("cuda")
    x = torch.randn(sum(LENGTHS), 128, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        ours, dense = module(x, packing), attend_densely(module, x, packing)
    torch.testing.assert_close(ours.float(), dense.float(), rtol=0.02, atol=0.02)


@pytest.mark.cuda
@pytest.mark.parametrize("lengths", [LENGTHS, [1, 3]])  # the second has fewer tokens than one whole sample
def test_float32_on_cuda_is_one_launch_for_all_samples(lengths):
    packing = make_packing("cuda", lengths)
    qkv = torch.randn(sum(lengths), 3, 4, 64, device="cuda", requires_grad=True)
    weights = torch.randn(qkv[:, 0].shape, device="cuda")
    results = []
    for attend in (attend_efficient, attend_by_sample):
        output = attend(qkv, packing)
        results.append((output, *torch.autograd.grad((output * weights).sum(), qkv)))
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_kernel_of_sdpa_on_cuda(dtype):
    """On tensors without values, which may claim to be on a GPU: one operation for all samples but in float64."""
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        module, packing = Attention(256, 4, "sdpa"), make_packing("cuda")
        module.attend_by_sample = lambda qkv, packing: qkv[
            :, 0
        ]  # it reads lengths, which have no values here
        qkv = torch.zeros(sum(LENGTHS), 3, 4, 64, dtype=dtype)
        with Calls() as calls:
            output = module.attend(qkv, packing)
    assert output.shape == qkv[:, 0].shape and output.dtype == dtype
    assert calls.names.count("_efficient_attention_forward") == (dtype != torch.float64)


class Calls(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    "version, window, has_priority",
    [
        ((2, 10), (-1, -1), False),
        ((2, 13), (-1, -1), False),
        ((2, 14), (8, 8), False),
        ((2, 15), (-1, -1), True),
    ],
)
def test_varlen_attention_is_flash_in_every_version_of_torch(version, window, has_priority, monkeypatch):
    """2.14 takes cuDNN on Hopper unless there is a window, 2.15 asks for the order of the kernels."""
    called = {}

    def varlen_attn(q, *arguments, window_size=(-1, -1)):
        called.update(window=window_size, priority=torch._C._get_sdp_priority_order()[0])
        return q

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "TORCH", version)
    before = torch._C._get_sdp_priority_order()
    attend_varlen(torch.zeros(sum(LENGTHS), 3, 2, 64), make_packing())
    assert called["window"] == window
    if has_priority:
        assert called["priority"] == SDPBackend.FLASH_ATTENTION.value
    assert torch._C._get_sdp_priority_order() == before


def test_this_version_of_torch_has_what_keeps_it_from_cudnn():
    parameters = inspect.signature(varlen.varlen_attn).parameters
    assert flash_options(8).keys() <= parameters.keys()
    if hasattr(varlen, "_can_use_cudnn"):
        assert attention.TORCH >= (2, 14)


@pytest.mark.parametrize("function", [None, lambda *arguments: None])
def test_flash_attention_is_its_function_and_not_its_name(function, monkeypatch):
    """Version 4 alone has a package of this name without the function."""
    package = ModuleType("flash_attn")
    if function is not None:
        package.flash_attn_varlen_qkvpacked_func = function
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    has_flash.cache_clear()
    assert has_flash() == (function is not None)
    has_flash.cache_clear()


def test_forced_kernels_say_what_they_lack(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert kernel_problem("sdpa", cpu, half=False, head_size=12) is None
    assert kernel_problem("auto", cuda, half=True, head_size=12) is None
    assert kernel_problem("varlen", cuda, half=True, head_size=64) is None
    for kernel in ("varlen", "flash"):
        assert "CUDA" in kernel_problem(kernel, cpu, half=True, head_size=64)
        assert "bfloat16" in kernel_problem(kernel, cuda, half=False, head_size=64)
        assert "12; use auto or sdpa" in kernel_problem(kernel, cuda, half=True, head_size=12)
        assert "264; use auto or sdpa" in kernel_problem(kernel, cuda, half=True, head_size=264)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for kernel in ("varlen", "flash"):
        assert "this GPU has 7.5; use auto or sdpa" in kernel_problem(kernel, cuda, half=True, head_size=64)
    assert kernel_problem("auto", cuda, half=True, head_size=64) is None
