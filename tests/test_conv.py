"""Convolutions and norms that are computed in another way on a CPU: they must give what PyTorch's own give."""

import pytest
import torch
import torch.nn.functional as F

from models.conv import Conv1x1, GroupNorm

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_1x1_convolution_is_the_plain_one(layout):
    conv = Conv1x1(24, 16).double()
    x = torch.randn(2, 24, 5, 5, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    inputs = (x, conv.weight, conv.bias)
    ours = conv(x)
    plain = F.conv2d(x, conv.weight, conv.bias)
    torch.testing.assert_close(ours, plain)
    for one, other in zip(torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(plain, inputs, grad)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_norm_in_bfloat16_rounds_no_more_than_the_plain_one(layout):
    norm = GroupNorm(8, 32)
    torch.nn.init.normal_(norm.weight)
    exact_x = torch.randn(3, 32, 6, 6).bfloat16().double().requires_grad_()
    grad = torch.randn(3, 32, 6, 6).bfloat16()
    exact_parameters = [parameter.detach().double().requires_grad_() for parameter in norm.parameters()]
    exact = F.group_norm(exact_x, 8, *exact_parameters)
    exact_gradients = torch.autograd.grad(exact, [exact_x, *exact_parameters], grad.double())

    x = exact_x.detach().bfloat16().contiguous(memory_format=layout).requires_grad_()
    inputs = [x, *norm.parameters()]
    ours = norm(x)
    plain = F.group_norm(x, 8, norm.weight, norm.bias)
    torch.testing.assert_close(ours, plain)
    our_gradients = torch.autograd.grad(ours, inputs, grad)
    plain_gradients = torch.autograd.grad(plain, inputs, grad)
    for one, other, wanted in zip(our_gradients, plain_gradients, exact_gradients):
        assert one.dtype == other.dtype
        error = (one - wanted).norm() / wanted.norm()
        plain_error = (other - wanted).norm() / wanted.norm()
        assert error <= 1.1 * plain_error + 1e-6


def test_a_norm_in_float32_is_the_plain_one():
    norm = GroupNorm(8, 32)
    x = torch.randn(3, 32, 6, 6)
    assert torch.equal(norm(x), F.group_norm(x, 8, norm.weight, norm.bias))
