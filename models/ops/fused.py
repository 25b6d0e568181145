"""Kernels for CUDA written in Triton: when they are used in place of PyTorch's operations."""

import functools
import importlib
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

TOLERANCE = 0.02  # of the comparison: values are about 1, and bfloat16 rounds by up to 0.008 of them

# Kernels, device and width -> their largest difference to the plain form, in a small case with bfloat16
Compare = Callable[[ModuleType, torch.device, int], float]


def find_kernels(name: str, x: Tensor, width: int, compare: Compare) -> ModuleType | None:
    """The module of models/ops/ with the kernels for x; None where the plain form has to serve.

    The compiler fuses the plain form itself. Tensors without values, such as a compiler's, take the plain form too.
    """
    if torch.compiler.is_compiling() or not x.is_cuda or x.dtype == torch.float64 or is_fake(x):
        return None
    return checked_kernels(name, x.device, width, compare)


def is_fake(x: Tensor) -> bool:
    """Whether a tensor has no values: all that have some are plain tensors or parameters."""
    return type(x) not in (Tensor, torch.nn.Parameter)


@functools.cache
def checked_kernels(name: str, device: torch.device, width: int, compare: Compare) -> ModuleType | None:
    """The kernels if they compile for this device and width and agree with the plain form on it.

    No test can cover every pair of a GPU and a version of Triton. A warning says why the kernels are not used.
    """
    try:
        kernels = importlib.import_module(f"models.ops.{name}")
    except ImportError as error:
        warnings.warn(f"there is no Triton, so the network runs unfused: {error}", stacklevel=2)
        return None
    try:
        difference = compare(kernels, device, width)
    except Exception as error:  # no C compiler, or one of the many errors of a compiler
        text = f"{type(error).__name__}: {error}"
        warnings.warn(f"Triton fails, so the network runs unfused: {text}", stacklevel=2)
        return None
    if not difference <= TOLERANCE:
        text = f"{name} is off by {difference:.2g}"
        warnings.warn(f"Triton is wrong on this device, so the network runs unfused: {text}", stacklevel=2)
        return None
    return kernels
