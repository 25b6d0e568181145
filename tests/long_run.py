"""Memory, file handles and threads of a training process over 2,000 steps.

    PYTHONPATH=. python tests/long_run.py --folder DIR

prints a row at step 50 and every 250 steps. It exits with 1 if training fails, or if after step 250 its memory
grows by more than 5 MiB or its handles or threads by one. Training writes reports and checkpoints and has a
loader process. Its wall clock jumps by a day back and forth, which must change nothing.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import kills
import numpy as np
from conftest import save_tiny_config, save_tiny_images, save_tiny_vae

import train
from training.trainer import Trainer

CHANGES = [
    "training.max_steps=2000",
    "training.gradient_accumulation_steps=1",
    "logging.log_every=5",
    "logging.ckpt_every=50",
    "logging.ckpt_keep=2",
    "data.num_workers=1",
]


DAY = 86400  # seconds
# What may grow after step 250: MiB, handles and threads
LIMITS = (5, 0, 0)


def resident_mib() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure() -> None:
    """Have the trainer print what the process holds, and move its clock."""
    step = Trainer.optimizer_step
    clock = time.time
    shift = [0]
    time.time = lambda: clock() + shift[0]

    def measured(trainer, batches):
        if trainer.step == 50 or trainer.step % 250 == 0:
            handles = len(os.listdir("/proc/self/fd"))
            threads = len(os.listdir("/proc/self/task"))
            memory = f"resident {resident_mib():7.1f} MiB"
            print(f"step {trainer.step:5d} {memory}, {handles} handles, {threads} threads", flush=True)
            shift[0] = -DAY if trainer.step % 500 == 0 else DAY
        step(trainer, batches)

    Trainer.optimizer_step = measured


def growth(printed: str) -> list[float]:
    """How much MiB, handles and threads grew at most after step 250."""
    found = re.findall(r"step +(\d+) resident +([\d.]+) MiB, (\d+) handles, (\d+) threads", printed)
    rows = [[float(value) for value in row] for row in found]
    late = np.array([row[1:] for row in rows if row[0] >= 250])
    return (late.max(0) - late[0]).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder for everything")
    folder = parser.parse_args().folder.resolve()
    # Train
    kills.calm()
    kills.DEADLINE = 3600
    config = save_tiny_config(folder, save_tiny_images(folder / "images"), save_tiny_vae(folder / "vae"))
    argv = ["--config", config, "--output", folder / "run", *kills.overrides(CHANGES)]
    codes = kills.attempt(train.main, argv, folder / "printed", [measure])
    printed = (folder / "printed").read_text()
    if codes != [0]:
        last_lines = "\n".join(printed.splitlines()[-20:])
        sys.exit(f"{last_lines}\nerror: exit codes {codes}")
    # Judge
    print("\n".join(re.findall(r"step +\d+ resident .*", printed)))
    for name in ("log.txt", "metrics.jsonl"):
        lines = (folder / "run" / name).read_text().splitlines()
        print(f"{name} has {len(lines)} lines")
    grown = growth(printed)
    if any(value > limit for value, limit in zip(grown, LIMITS)):
        sys.exit(f"error: grown since step 250 by {grown} (MiB, handles, threads)")


if __name__ == "__main__":
    main()
