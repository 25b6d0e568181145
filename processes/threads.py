"""Threads for computing on a CPU that other programs use, too."""

import os

import psutil
import torch

LOOK = 0.25  # seconds over which the use of the cores is measured
MOST = torch.get_num_threads()  # PyTorch's own choice: one per core, or OMP_NUM_THREADS


def leave_busy_cores() -> None:
    """Compute with one thread fewer for every core that other programs keep busy, and at least one.

    Threads wait for each other after every operation, so a thread that shares its core holds up all others.
    Call this while the process rests. If OMP_NUM_THREADS is set, nothing changes.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    used = psutil.cpu_percent(LOOK, percpu=True)  # of every core, in per cent
    busy = round(sum(used) / 100)
    torch.set_num_threads(max(1, min(MOST, len(used) - busy)))
