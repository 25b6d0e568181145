"""Wide convolutions on a CPU have a backward pass of their own: it must be the convolution's."""

import pytest
import torch
import torch.nn.functional as F

from models.conv import Conv3x3
from models.ops.conv_gradients import WIDE

CL = torch.channels_last


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL])
@pytest.mark.parametrize("width_in, width_out", [(128, 160), (160, 128), (128, 128)])
def test_gradients_are_those_of_the_plain_convolution(width_in, width_out, layout):
    assert width_in * width_out >= WIDE
    torch.manual_seed(0)
    conv = Conv3x3(width_in, width_out).double()
    x = torch.randn(2, width_in, 5, 5, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn(2, width_out, 5, 5, dtype=torch.float64)
    inputs = (x, conv.weight, conv.bias)
    ours = torch.autograd.grad(conv(x), inputs, grad)
    plain = torch.autograd.grad(F.conv2d(x, conv.weight, conv.bias, padding=1), inputs, grad)
    for one, other in zip(ours, plain):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_autocast_reaches_both_passes():
    torch.manual_seed(0)
    conv, x = Conv3x3(128, 128), torch.randn(2, 128, 5, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(x)
    y.backward(torch.ones_like(y))
    exact = F.conv2d(x, conv.weight, conv.bias, padding=1)
    weight_grad = torch.autograd.grad(exact, conv.weight, torch.ones_like(exact))[0]
    assert y.dtype == torch.bfloat16 and conv.weight.grad.dtype == x.grad.dtype == torch.float32
    torch.testing.assert_close(conv.weight.grad, weight_grad, rtol=0.02, atol=0.2)
