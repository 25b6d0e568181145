"""Requests to stop: the signals of schedulers and of Ctrl-C. They also end a wait that would never end."""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import cast

import torch
import torch.distributed as dist
from accelerate import Accelerator

from processes.group import COLLECTIVE_TIMEOUT

ECHO = 1.0  # seconds within which a second signal is the first one, passed on by a launcher
GRACE = 10.0  # seconds that a wait may last after a signal; launchers kill after 30


class EndlessWait(BaseException):
    """A wait was ended from outside. No Exception: code on the way must not take it for an error of its own."""


class StopRequest:
    """SIGTERM or SIGINT, on which all processes agree, so that they stop after the same step.

    A second signal quits at once. The agreement is a maximum over a process group on the host. It starts in
    one step and is read in the next, so the device never waits for it.

    Attributes:
        number: of the signal on which all processes stop, or 0.
    """

    def __init__(self, accelerator: Accelerator):
        self.number = 0
        # What this process has received
        self.received = 0
        self.received_at = 0.0
        self.is_waiting = False
        # The agreement with the others
        self.is_alone = accelerator.num_processes == 1
        self.flag = torch.zeros(1)
        self.pending: dist.Work | None = None
        if not self.is_alone:
            new_group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
            self.group = cast(dist.ProcessGroup, new_group)  # of which every process is a member
        # Take the signals over
        self.previous_handlers = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous_handlers[number] = signal.signal(number, self._receive)
        self.previous_handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._end_wait)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received = number
            self.received_at = time.monotonic()
            if self.is_waiting:
                signal.setitimer(signal.ITIMER_REAL, GRACE)
        elif time.monotonic() - self.received_at > ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _end_wait(self, number: int, frame: FrameType | None) -> None:
        if self.is_waiting:
            raise EndlessWait

    @contextlib.contextmanager
    def limit_wait(self, seconds: float) -> Iterator[None]:
        """Within this block, raise EndlessWait after this time, or GRACE seconds after a signal."""
        self.is_waiting = True
        signal.setitimer(signal.ITIMER_REAL, min(seconds, GRACE) if self.received else seconds)
        try:
            yield
        finally:
            self.is_waiting = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def restore(self) -> None:
        """Give the signals back to their previous handlers."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether to stop now. Collective: every process calls it once per step and gets the same answer."""
        if self.is_alone:
            self.number = self.received
            return self.number > 0
        # Read the agreement of the last step
        if self.pending is not None:
            self.pending.wait()
            self.number = int(self.flag.item())
        # Start that of this step
        if not self.number:
            self.flag = torch.tensor([float(self.received)])
            self.pending = dist.all_reduce(self.flag, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return self.number > 0
