"""Replaces what depends on values, which mean nothing on the null GPU. A pytest plugin.

The number of kept tokens is read as always, and then made up. Of comparisons in the tests of a CUDA device, those
of shapes, types and devices are left.
"""

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from data.autoencoder import Autoencoder, to_levels
from models import dc_dit, packing
from models.ops import fused
from models.ops.fused import Compare
from models.types import Packing
from sampling import accounting, denoising, generate
from sampling.accounting import StepCounts
from training.guard import FiniteGuard, Flag

stack_kept = accounting.stack_kept


class KeptTokens:
    """Makes up the number of tokens that a router keeps.

    Attributes:
        vary: plan i keeps `i % vary` tokens of a sample more than a quarter.
    """

    def __init__(self) -> None:
        self.plans = 0
        self.vary = 5

    def plan(self, keep: Tensor, lengths: int | list[int] | None = None) -> Packing:
        """In place of models.packing.plan_packing."""
        if lengths is None:
            keep.sum(1).tolist()  # the product's reading
            lengths = keep.shape[1] // 4 + self.plans % self.vary
            self.plans += 1
        return packing.plan_packing(keep, lengths)


def read_only(finite: Tensor, timesteps: list[int], indices: list[int]) -> None:
    """In place of sampling.denoising.check_finite_samples."""
    bool(finite.all())


@torch.no_grad()
def decode_anything(autoencoder: Autoencoder, latents: Tensor, bf16: bool = False) -> Tensor:
    """In place of Autoencoder.decode: no image is refused."""
    pixels = autoencoder.decode_pixels(latents, bf16)
    bool(pixels.isfinite().all())
    return to_levels(pixels)


def stack_made_up(kept: Sequence[StepCounts]) -> np.ndarray:
    """In place of sampling.accounting.stack_kept: reads the counts; then every computed branch kept a token."""
    counts = np.ones_like(stack_kept(kept))
    for index, step in enumerate(kept):
        if step.unconditional is None:
            counts[:, index, 1] = 0
    return counts


def count_as_good(guard: FiniteGuard, flag: Flag) -> None:
    """In place of FiniteGuard.count: waits and reads, and no step is skipped."""
    if flag.arrived is not None:
        flag.arrived.synchronize()
    bool(flag.is_bad)


@functools.cache
def accept_kernels(name: str, device: torch.device, width: int, compare: Compare) -> ModuleType:
    """In place of models.ops.fused.checked_kernels: compiles and compares the kernels, and takes them."""
    kernels = importlib.import_module(f"models.ops.{name}")
    compare(kernels, device, width)
    return kernels


def make_up_values(kept: KeptTokens) -> None:
    """Replace what reads values, in this process."""
    replace(dc_dit, "plan_packing", kept.plan)
    replace(fused, "checked_kernels", accept_kernels)
    replace(Autoencoder, "decode", decode_anything)
    replace(denoising, "check_finite_samples", read_only)
    replace(FiniteGuard, "count", count_as_good)
    replace(accounting, "stack_kept", stack_made_up)
    replace(generate, "stack_kept", stack_made_up)


def replace(owner: object, name: str, value: object) -> None:
    """Like setattr, but of a name that exists: a renamed function must be replaced under its new name."""
    assert hasattr(owner, name), f"{owner} has no {name}"
    setattr(owner, name, value)


def assert_alike(actual: Tensor, expected: Tensor, **options) -> None:
    """What is left of torch.testing.assert_close."""
    assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)


def are_alike(a: Tensor, b: Tensor) -> bool:
    """What is left of torch.equal."""
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


KEPT = KeptTokens()


def pytest_configure() -> None:
    """Values are made up in the whole process, which is one on the null GPU."""
    make_up_values(KEPT)


@pytest.fixture(autouse=True)
def kept_tokens(request, monkeypatch) -> KeptTokens:
    """Every test begins with the same plans. A test of a CUDA device compares no values."""
    monkeypatch.setattr(KEPT, "plans", 0)
    monkeypatch.setattr(KEPT, "vary", 5)
    if request.node.get_closest_marker("cuda"):
        monkeypatch.setattr(torch.testing, "assert_close", assert_alike)
        monkeypatch.setattr(torch, "equal", are_alike)
    return KEPT
