"""Processes that watch each other: if one dies or hangs, the others end with an error line that names it.

A collective operation waits for a lost process until a launcher or a library gives up, and neither can say
which process is lost. Here a thread of every process tells the others twice a second that it lives, and where
its training loop is. These signs of life pass through a TCPStore, which the first process holds.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist

PATIENCE = 600.0  # seconds; training sets its own with training.rank_timeout
BEAT = 0.5  # seconds between two signs of life
GONE = 5.0  # seconds of silence after which a process counts as lost if a collective operation has failed

# What a training loop does in a step, in this order.
ACTIVITIES = ("reading images", "training")


class Sighting(NamedTuple):
    """What a process said, and when it said so first."""

    value: Any
    since: float


class ProcessWatch:
    """Watches all processes of a run. With one process it does nothing.

    A process is lost in two cases:

    - Its thread is silent for `patience` seconds: the process is dead or stopped, or its machine is.
    - Its training loop stays at one place of a step for `patience` seconds. The others then wait for it, so
      all loops stand still, and the lost process is the one that is furthest behind.
    """

    def __init__(self, rank: int, world: int, patience: float = PATIENCE):
        self.rank = rank
        self.world = world
        self.patience = patience
        self.place: tuple[int, str] | None = None
        self.closed = threading.Event()
        # By rank: the number of its last sign of life, and the place of its training loop
        self.beats: dict[int, Sighting] = {}
        self.places: dict[int, Sighting] = {}
        self.store_answered = time.monotonic()
        if world == 1:
            return
        self.hosts = [""] * world
        dist.all_gather_object(self.hosts, socket.gethostname())
        self.store = self._connect()
        self._write_sign(0)
        dist.barrier()
        # Two threads: if the network is lost, the first one hangs in the store for hours
        for task in (self._exchange_signs, self._watch_store):
            threading.Thread(target=task, daemon=True).start()

    def at(self, step: int, activity: str | None) -> None:
        """Note the place of the training loop: one of ACTIVITIES, or None between steps, which may last."""
        self.place = None if activity is None else (step, activity)

    def close(self) -> None:
        """Stop watching: from here on processes may end. Collective."""
        self.closed.set()
        if self.world > 1:
            dist.barrier()

    def explain(self) -> None:
        """After a failed collective operation: name the lost process and exit. Return if all of them live."""
        if self.world == 1 or self.closed.wait(GONE + 2 * BEAT):
            return
        silent = self._silent_for(GONE)
        silent.discard(self.rank)
        if 0 in silent:
            # Without the first process, which holds the store, nobody hears of the others
            silent = {0}
        if silent:
            self._end(silent, "is gone")

    # ------------------------------------------------------------------------------------------ signs of life

    def _connect(self) -> dist.TCPStore:
        """A store of its own, held by the first process: that of the launcher may be gone by then."""
        address = os.environ["MASTER_ADDR"]
        timeout = timedelta(seconds=self.patience)
        if self.rank == 0:
            store = dist.TCPStore(address, 0, None, is_master=True, timeout=timeout, wait_for_workers=False)
            dist.broadcast_object_list([store.port])
            return store
        ports = [0]
        dist.broadcast_object_list(ports)
        return dist.TCPStore(
            address, ports[0], None, is_master=False, timeout=timeout, wait_for_workers=False
        )

    def _write_sign(self, beat: int) -> None:
        self.store.set(str(self.rank), json.dumps([beat, self.place]))

    def _exchange_signs(self) -> None:
        """Tell the others and listen. Ends, or stands still, if the first process is lost with its store."""
        beat = 0
        ranks = [str(rank) for rank in range(self.world)]
        with contextlib.suppress(RuntimeError):
            while not self.closed.wait(BEAT):
                beat += 1
                self._write_sign(beat)
                signs = [json.loads(sign) for sign in self.store.multi_get(ranks)]
                self._read_signs(signs)

    def _watch_store(self) -> None:
        """End the program if the store does not answer."""
        while not self.closed.wait(BEAT):
            if time.monotonic() - self.store_answered > self.patience + BEAT:
                self._end({0}, f"has not answered for {self.patience:.0f} s")

    def _read_signs(self, signs: list) -> None:
        """Judge who is lost. `signs` has [beat, [step, activity] or None] for every rank."""
        now = time.monotonic()
        self.store_answered = now
        for rank, (beat, place) in enumerate(signs):
            note_change(self.beats, rank, beat, now)
            note_change(self.places, rank, place, now)
        silent = self._silent_for(self.patience)
        if silent:
            self._end(silent, f"has not answered for {self.patience:.0f} s")
        self._check_loops(now)

    def _silent_for(self, seconds: float) -> set[int]:
        """The ranks without a new sign of life for more than these seconds."""
        now = time.monotonic()
        return {rank for rank, beat in self.beats.items() if now - beat.since > seconds}

    def _check_loops(self, now: float) -> None:
        """End the program if the training loops of all processes stand still within a step."""
        progress = {}
        for rank, place in self.places.items():
            if place.value is None or now - place.since <= self.patience:
                return
            step, activity = place.value
            progress[rank] = (step, ACTIVITIES.index(activity))
        # The others wait for those that are furthest behind
        behind = min(progress.values())
        lost = {rank for rank, place in progress.items() if place == behind}
        step, number = behind
        self._end(lost, f"is {ACTIVITIES[number]} of step {step} for {self.patience:.0f} s")

    def _end(self, lost: set[int], reason: str) -> NoReturn:
        """End this process at once: its training loop hangs in a collective operation and cannot be asked."""
        living = set(range(self.world)) - lost
        if self.rank == min(living, default=self.rank):
            names = " and ".join(f"process {rank} on {self.hosts[rank]}" for rank in sorted(lost))
            remedy = "the others end, too: run the same command again to resume from the newest checkpoint"
            # The line break keeps it from the progress bar
            print(f"\nerror: {names} {reason}; {remedy}", file=sys.stderr, flush=True)
        os._exit(1)


def note_change(seen: dict[int, Sighting], rank: int, value: Any, now: float) -> None:
    """Keep the value with the time at which it was new."""
    if rank not in seen or seen[rank].value != value:
        seen[rank] = Sighting(value, now)
