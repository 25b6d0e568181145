"""Choices of precision that PyTorch keeps for the whole process."""

import torch


def allow_tf32(allowed: bool) -> None:
    """Whether products in float32 may run as TF32.

    Under autocast these are the products of router, residual projection and dechunk.

    A setting of the process and not of a block of code, because PyTorch reads it when the backward pass runs, too.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
