"""Requests to stop: the signals of schedulers and of Ctrl-C."""

import signal
import time

import torch
import torch.distributed as dist
from accelerate import Accelerator

from processes.watch import LONG

SAME = 1.0  # seconds within which a second signal is the first one again, passed on by a launcher


class StopRequest:
    """SIGTERM or SIGINT, agreed on by all processes, so that all of them stop after the same step. A second signal quits.

    The agreement is a maximum over a process group on the host, started at one step and read at the next: the device never
    waits.

    Attributes:
        number: of the signal on which all processes stop, or 0.
    """

    def __init__(self, accelerator: Accelerator):
        self.number, self.received, self.when = 0, 0, 0.0
        self.group = dist.new_group(backend="gloo", timeout=LONG) if accelerator.num_processes > 1 else None
        self.flag, self.pending = torch.zeros(1), None
        self.handlers = {
            number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def _receive(self, number: int, frame) -> None:
        if not self.received:
            self.received, self.when = number, time.monotonic()
        elif time.monotonic() - self.when > SAME:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Collective: every process calls it once per step and gets the same answer."""
        if self.group is None:
            self.number = self.received
        elif self.pending is not None:
            self.pending.wait()
            self.number = int(self.flag.item())
        if self.group is not None and not self.number:
            self.flag = torch.tensor([float(self.received)])
            self.pending = dist.all_reduce(self.flag, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return self.number > 0
