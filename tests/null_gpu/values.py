"""A pytest plugin for processes on the null GPU, where no value means anything.

It fixes what the product reads back, the number of kept tokens, and leaves of comparisons what can be compared:
shapes, types and devices.
"""

import pytest
import torch

from models import dc_dit, packing


class KeptTokens:
    """Plans of packed tokens whose lengths are made up: a quarter, and one token more in every plan, up to `vary`."""

    def __init__(self) -> None:
        self.plans = 0
        self.vary = 1

    def plan(self, keep: torch.Tensor, lengths: int | list[int] | None = None):
        if lengths is None:
            keep.sum(1).tolist()  # what the product reads
            lengths = keep.shape[1] // 4 + self.plans % self.vary
            self.plans += 1
        return packing.plan_packing(keep, lengths)


def assert_alike(actual, expected, **options) -> None:
    """What is left of torch.testing.assert_close."""
    torch.testing.assert_close(
        torch.empty_like(actual, device="meta"), torch.empty_like(expected, device="meta"), check_device=False
    )
    assert actual.device == expected.device


def are_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """What is left of torch.equal."""
    return a.shape == b.shape and a.dtype == b.dtype


@pytest.fixture(autouse=True)
def kept_tokens(monkeypatch) -> KeptTokens:
    kept = KeptTokens()
    monkeypatch.setattr(dc_dit, "plan_packing", kept.plan)
    return kept


@pytest.fixture
def no_values(monkeypatch) -> None:
    """For tests that compare: only shapes, types and devices are compared."""
    monkeypatch.setattr(torch.testing, "assert_close", assert_alike)
    monkeypatch.setattr(torch, "equal", are_alike)
