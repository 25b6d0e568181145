"""Steps with a non-finite loss or gradient are skipped and counted; too many in a row end the run."""

import sys
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

# Steps after which the host reads a GPU's flag: by then the device has passed it, so reading does not wait
LAG = 2


def nan_gradients_if_not_finite(loss: Tensor) -> Tensor:
    """Return the loss unchanged, but where it is not finite, all of its gradients become NaN.

    Gradients are summed over processes, so the bad loss of one process shows in the gradient norm of all,
    without a collective. The gradients of a finite loss are multiplied by exactly 1.
    """
    return loss * (1 + 0 * loss.detach())


class Flag(NamedTuple):
    """Whether the gradient of a step was not finite, possibly still on its way from the device."""

    step: int
    is_bad: Tensor  # (), on the host
    arrived: torch.cuda.Event | None  # None: it is here already


class FiniteGuard:
    """Applies an optimizer's updates if the gradient norm is finite.

    On CUDA the fused optimizer itself looks at the flag, on the device, and leaves weights, moments and step
    counts as they are; the host reads the flag of step s while it prepares step s + LAG. On other devices the
    host decides at once. A skipped step counts in every other way: its batch is used up, schedules continue,
    and the EMA averages the unchanged weights again.

    Args:
        max_in_a_row: number of consecutive skipped steps that ends the run.
        on_skip: called with the number of every skipped step.
        on_stop: called with the number of the last step before the program exits.
    """

    def __init__(self, max_in_a_row: int, on_skip: Callable[[int], None], on_stop: Callable[[int], None]):
        self.max_in_a_row = max_in_a_row
        self.on_skip = on_skip
        self.on_stop = on_stop
        self.total = 0
        self.in_a_row = 0
        self.pending: deque[Flag] = deque()

    def update(self, optimizer: AcceleratedOptimizer, norm: Tensor, step: int) -> None:
        """Take an optimizer step, or skip it.

        Args:
            norm: () gradient norm, equal on all processes.
            step: optimizer steps done before this one.
        """
        is_bad = (~norm.isfinite()).float()
        if not norm.is_cuda:
            if not is_bad:
                optimizer.step()
            self.count(Flag(step, is_bad, None))
            return
        # The fused optimizer skips its update where the flag is 1
        optimizer.optimizer.found_inf = is_bad
        optimizer.step()
        # Copy the flag to the host without waiting for it
        on_host = is_bad.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self.pending.append(Flag(step, on_host, arrived))
        while len(self.pending) > LAG:
            self.count(self.pending.popleft())

    def read_pending_flags(self) -> None:
        """Read all flags. Called at moments when the host waits for the device anyway."""
        while self.pending:
            self.count(self.pending.popleft())

    def count(self, flag: Flag) -> None:
        """Count a step as good or skipped. Exits with status 1 after too many skipped ones."""
        if flag.arrived is not None:
            flag.arrived.synchronize()
        if not flag.is_bad:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        self.on_skip(flag.step)
        if self.in_a_row >= self.max_in_a_row:
            self.on_stop(flag.step)
            sys.exit(1)

    def state_dict(self) -> dict[str, int]:
        self.read_pending_flags()
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total = state["total"]
        self.in_a_row = state["in_a_row"]
