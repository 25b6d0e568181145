"""Training on several processes."""

import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from benchmarks.meters import synchronize
from benchmarks.report import Row
from benchmarks.step_functions import TrainingStep
from benchmarks.workload import Case, Setup, build_workload

WARM_UP_STEPS = 2  # the first ones allocate
STEPS = 4


@dataclass(frozen=True)
class ProcessRun:
    """What every process trains, and the folder where they meet."""

    case: Case  # its batch is that of one process
    setup: Setup
    world: int
    folder: str


def measure_processes(case: Case, setup: Setup) -> list[Row]:
    """Images per second of training with 1, 2, ... processes.

    Each process has a batch of its own, and one GPU or one CPU thread.
    """
    most = torch.cuda.device_count() if setup.device.type == "cuda" else os.cpu_count() or 1
    rows: list[Row] = []
    for world in (1, 2, 4, 8):
        if world > most:
            break
        with tempfile.TemporaryDirectory() as folder:
            job = ProcessRun(case, setup, world, folder)
            torch.multiprocessing.spawn(run_process, (job,), nprocs=world)
            seconds = float((Path(folder) / "seconds").read_text())
        rate = world * case.batch / seconds
        alone = rows[0]["images/s"] if rows else rate
        rows.append({**case.columns, "processes": world, "images/s": rate, "of ideal": rate / alone / world})
    return rows


def run_process(rank: int, job: ProcessRun) -> None:
    """Train a few steps; the first process writes the seconds of one step into the folder."""
    torch.set_num_threads(1)
    on_cuda = job.setup.device.type == "cuda"
    device = torch.device("cuda", rank) if on_cuda else torch.device("cpu")
    backend = "nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, f"file://{job.folder}/meet", rank=rank, world_size=job.world)
    workload = build_workload(job.case.config(), job.case.batch, replace(job.setup, device=device))
    model = DistributedDataParallel(workload.model, gradient_as_bucket_view=True, broadcast_buffers=False)
    step = TrainingStep(workload, model)

    for _ in range(WARM_UP_STEPS):
        step()
    synchronize(device)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    synchronize(device)
    dist.barrier()
    if rank == 0:
        seconds = (time.perf_counter() - start) / STEPS
        (Path(job.folder) / "seconds").write_text(str(seconds))
    dist.destroy_process_group()
