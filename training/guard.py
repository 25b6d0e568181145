"""Steps with a non-finite loss or gradient: their update is skipped, they are counted, and too many in a row end the run."""

import sys
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

LAG = 2  # steps after which a GPU's flag is read: by then the device has long passed it, so nobody waits


def poison(loss: Tensor) -> Tensor:
    """The loss, with gradients that all become NaN where it is not finite (and are multiplied by exactly 1 elsewhere).

    Gradients are summed over processes, so one process's bad loss shows in the gradient norm of all, without a collective.
    """
    return loss * (1 + 0 * loss.detach())


class FiniteGuard:
    """Applies an optimizer's updates where the gradient norm is finite.

    On CUDA the fused optimizer itself looks at the flag, on the device, and leaves weights, moments and step counts as they
    are; the host reads the flag of step s while it prepares step s + LAG. On other devices the host decides at once. A skipped
    step is a step otherwise: its batch is used up, schedules go on, and the EMA averages the unchanged weights once more.

    Args:
        limit: so many skipped steps in a row end the run.
        report: called with the number of every skipped step.
        stop: called where the limit is reached.
    """

    def __init__(self, limit: int, report: Callable[[int], None], stop: Callable[[int], None]):
        self.limit, self.report, self.stop = limit, report, stop
        self.total = self.in_a_row = 0
        self.pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def update(self, optimizer, norm: Tensor, step: int) -> None:
        """optimizer: an AcceleratedOptimizer; norm: () gradient norm, equal on all processes."""
        bad = (~norm.isfinite()).float()
        if norm.is_cuda:
            optimizer.optimizer.found_inf = bad
            optimizer.step()
            bad, event = bad.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
            self.pending.append((step, bad, event))
            while len(self.pending) > LAG:
                self._settle(*self.pending.popleft())
        else:
            if not bad:
                optimizer.step()
            self._settle(step, bad, None)

    def settle(self) -> None:
        """Read all flags: where the host waits for the device anyway."""
        while self.pending:
            self._settle(*self.pending.popleft())

    def _settle(self, step: int, bad: Tensor, event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.synchronize()
        if not bad:
            self.in_a_row = 0
            return
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        self.report(step)
        if self.in_a_row >= self.limit:
            self.stop(step)
            sys.exit(1)

    def state_dict(self) -> dict[str, int]:
        self.settle()
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]
