"""Processes that watch each other: one that dies or hangs ends the others, with a line that names it.

Collectives wait for a lost process until a launcher or a library gives up, and neither can say whom they waited for. Here a
thread of every process tells the others twice a second that it lives and where its training loop is.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

LONG = timedelta(
    days=1
)  # for collectives: the watch decides what is lost, and before any library does; a slow process is not
PATIENCE = 600.0  # seconds, where no configuration says another number
BEAT = 0.5  # seconds between two signs of life
GONE = 5.0  # seconds of silence after which a process counts as lost once a collective has failed


class ProcessWatch:
    """Watches all processes of a run; with one process it does nothing.

    A process is lost when its thread is silent for `patience` seconds (dead, stopped, or its machine is), or when its training
    loop stays at one place of a step for so long; of several that wait for each other, the one that is furthest behind.
    """

    def __init__(self, rank: int, world: int, patience: float = PATIENCE):
        self.rank, self.world, self.patience = rank, world, patience
        self.place: tuple[int, str] | None = None
        self.closed = threading.Event()
        self.seen: dict[int, tuple[list, float]] = {}  # rank -> last sign of life, when it came
        self.moved: dict[int, tuple[list | None, float]] = {}  # rank -> place of its loop, since when
        self.heard = time.monotonic()  # when the store answered last
        if self.world == 1:
            return
        self.hosts = [""] * world
        dist.all_gather_object(self.hosts, socket.gethostname())
        self.store = self._connect()
        self.store.set(str(self.rank), json.dumps([0, None]))
        dist.barrier()
        for task in (self._talk, self._wait):
            threading.Thread(target=task, daemon=True).start()

    def _connect(self) -> dist.TCPStore:
        """A store of our own, held by the first process: the launcher's may be gone when it is needed."""
        address = os.environ["MASTER_ADDR"]
        options = {"wait_for_workers": False, "timeout": timedelta(seconds=self.patience)}
        store = dist.TCPStore(address, 0, None, is_master=True, **options) if self.rank == 0 else None
        port = [store and store.port]
        dist.broadcast_object_list(port)
        return store or dist.TCPStore(address, port[0], None, is_master=False, **options)

    def at(self, step: int, what: str | None) -> None:
        """The training loop is at this place of a step; None: outside of one, where it may take its time."""
        self.place = (step, what) if what else None

    def close(self) -> None:
        """Stop watching: from here on processes may end. Collective."""
        self.closed.set()
        if self.world > 1:
            dist.barrier()

    def explain(self) -> None:
        """After a failed collective: end the program naming the lost process; return where all of them live."""
        if self.world > 1 and not self.closed.wait(GONE + 2 * BEAT):
            now = time.monotonic()
            silent = [
                rank for rank, (_, when) in self.seen.items() if now - when > GONE and rank != self.rank
            ]
            if silent:
                self._end(
                    silent[:1] if silent[0] == 0 else silent, "is gone"
                )  # without the first, nobody hears of the others

    def _talk(self) -> None:
        """Tell the others, and listen. Ends or stands still where the store, which lives in the first process, is lost."""
        count = 0
        with contextlib.suppress(RuntimeError):
            while not self.closed.wait(BEAT):
                count += 1
                self.store.set(str(self.rank), json.dumps([count, self.place]))
                signs = self.store.multi_get([str(rank) for rank in range(self.world)])
                self._look([json.loads(sign) for sign in signs])

    def _wait(self) -> None:
        """A thread of its own: a machine without a network hangs in `_talk` for hours."""
        while not self.closed.wait(BEAT):
            if time.monotonic() - self.heard > self.patience + BEAT:
                self._end([0], f"has not answered for {self.patience:.0f} s")

    def _look(self, signs: list) -> None:
        """signs: of every rank, [count, [step, what] or None]."""
        now = self.heard = time.monotonic()
        for rank, (count, place) in enumerate(signs):
            if rank not in self.seen or self.seen[rank][0] != count:
                self.seen[rank] = count, now
            if rank not in self.moved or self.moved[rank][0] != place:
                self.moved[rank] = place, now
        silent = [rank for rank, (_, when) in self.seen.items() if now - when > self.patience]
        if silent:
            self._end(silent, f"has not answered for {self.patience:.0f} s")
        stuck = {
            rank: place for rank, (place, when) in self.moved.items() if place and now - when > self.patience
        }
        if len(stuck) == self.world:  # all wait for one of them
            behind = [
                rank for rank, place in stuck.items() if place == min(stuck.values())
            ]  # "reading" is before "training"
            step, what = stuck[behind[0]]
            self._end(behind, f"is {what} of step {step} for {self.patience:.0f} s")

    def _end(self, lost: list[int], reason: str) -> None:
        if self.rank == min(set(range(self.world)) - set(lost), default=self.rank):
            names = " and ".join(f"process {rank} on {self.hosts[rank]}" for rank in lost)
            remedy = "the others end, too: run the same command again to go on from the newest checkpoint"
            print(
                f"\nerror: {names} {reason}; {remedy}", file=sys.stderr, flush=True
            )  # not behind the progress bar
        os._exit(1)  # the training loop hangs in a collective and cannot be asked
