"""What every command line shares: one-line errors with exit status 2, and the process group of torchrun."""

import os
import sys
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist

from config import UserError


class Processes(NamedTuple):
    """This process among those that torchrun started (or alone)."""

    rank: int
    world: int
    device: torch.device


def run(main: Callable[[], None]) -> None:
    """Call `main`; a UserError becomes one line on stderr (from rank 0) and exit status 2."""
    try:
        main()
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def default_device(local_rank: int = 0) -> torch.device:
    """CUDA where there is one, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def start_processes() -> Processes:
    """Join the process group that torchrun describes (NCCL on CUDA, else gloo); without torchrun, be the only process."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = default_device(int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(rank, world, device)
