"""Choices of precision that PyTorch keeps for the whole process."""

import contextlib
from collections.abc import Iterator

import torch


def allow_tf32(allowed: bool) -> None:
    """Whether products in float32 may run as TF32.

    Under autocast these are the products of router, residual projection and dechunk.

    A setting of the process and not of a block of code, because PyTorch reads it when the backward pass runs, too.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """`allow_tf32` for a forward pass; the setting of the process returns afterwards."""
    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    allow_tf32(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
