"""The job scripts, with programs in place of Slurm's that note how they are called."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SLURM = {
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_JOB_ID": "77",
}
TORCHRUN = (
    "--kill-on-bad-exit=1 torchrun --nnodes=2 --nproc_per_node=8 "
    "--rdzv_backend=c10d --rdzv_endpoint=node1:29500 --rdzv_id=77"
)
CALLS = {
    "train": (
        "a.yaml results/a --set training.seed=1",
        "train.py --config a.yaml --output results/a --set training.seed=1",
    ),
    "extract": ("--data-path images", "extract_features.py --data-path images"),
    "sample": ("--ckpt 0400000.pt", "sample_ddp.py --ckpt 0400000.pt"),
}


@pytest.mark.parametrize("job", CALLS)
def test_a_job_starts_torchrun_on_every_node(job, tmp_path):
    programs = {"srun": 'echo "$ACCELERATE_MIXED_PRECISION|$*"', "scontrol": 'echo node1; echo "node2"'}
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given, wanted = CALLS[job]
    environment = {**os.environ, **SLURM, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("PORT", None), environment.pop("ACCELERATE_MIXED_PRECISION", None)
    command = ["bash", f"scripts/slurm/{job}.sbatch", *given.split()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{'bf16' if job == 'train' else ''}|{TORCHRUN} {wanted}\n"
