"""Which precision products run in: what devices can do, what autocast chooses, and TF32."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def allow_tf32(allowed: bool) -> None:
    """Whether products in float32 may run as TF32.

    Under autocast these are the products of router, residual projection and dechunk.

    A setting of the process and not of a block of code, because PyTorch reads it when the backward pass runs, too.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """`allow_tf32` for a `with` block, which must hold no forward pass whose backward pass follows it."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    allow_tf32(allowed)
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device is a GPU that computes in bfloat16 (Ampere and newer); others only imitate it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def bfloat16_problem(device: torch.device) -> str | None:
    """Why bfloat16 cannot run on this device; None if it can."""
    if device.type != "cuda" or has_bfloat16(device):
        return None
    return f"needs compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The precision in which autocast computes x @ weight."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
