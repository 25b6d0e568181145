"""This process among those of a launcher: device, process group, and what only the first process does."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from config import UserError

T = TypeVar("T")

LAUNCHER_POLL = 0.5  # seconds between two looks at the launcher
GRACE = 30.0  # seconds that a process has to end after SIGTERM
# For collective operations: a slow process is not a dead one, and ProcessWatch decides which process is dead.
COLLECTIVE_TIMEOUT = timedelta(days=1)


class Processes(NamedTuple):
    """This process among those that torchrun started (or alone)."""

    rank: int
    world: int
    device: torch.device


def default_device(local_rank: int = 0) -> torch.device:
    """CUDA where there is one, otherwise Apple's MPS, otherwise the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def start_processes() -> Processes:
    """Join the process group that torchrun describes. No torchrun, no group."""
    follow_launcher()
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = default_device(int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(choose_backend(device), timeout=COLLECTIVE_TIMEOUT)
    return Processes(rank, world, device)


def choose_backend(device: torch.device) -> str:
    """NCCL where each process of this machine has a GPU of its own, which NCCL insists on; otherwise gloo."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda" and processes <= torch.cuda.device_count():
        return "nccl"
    return "gloo"


def follow_launcher() -> None:
    """End with the torchrun that started this process: SIGTERM to itself, and a hard exit 30 s later.

    A launcher that is killed leaves its processes behind, and these would compete with the next run.
    """
    launcher = os.getppid()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(LAUNCHER_POLL)
        message = "error: the launcher is gone; run the same command again to resume"
        print(message, file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def on_first(function: Callable[[], T]) -> T:
    """Call on the first process and return its result on every process. Collective.

    Raises:
        UserError: on every process, if `function` raised it on the first.
    """
    outcome: list = [None]
    if int(os.environ.get("RANK", 0)) == 0:
        try:
            outcome = [function()]
        except UserError as error:
            outcome = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def print_once(text: str) -> None:
    """Print from the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text)
