"""Memory, file handles and threads of a training process over 2,000 steps with reports, checkpoints and loader processes.

    PYTHONPATH=. python tests/long_run.py --folder DIR

prints a row at step 50 and every 250 steps, and exits with 1 where the process fails, or where after step 250 its memory grows
by more than 5 MiB or its handles or threads by one. The wall clock jumps by a day back and forth, which must change nothing.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import kills
from conftest import save_tiny_config, save_tiny_images, save_tiny_vae

import train
from training.trainer import Trainer

CHANGES = ["training.max_steps=2000", "training.gradient_accumulation_steps=1", "logging.log_every=5", "logging.ckpt_every=50",
           "logging.ckpt_keep=2", "data.num_workers=1"]  # fmt: skip


def measure() -> None:
    """Print what the process holds and move its clock."""
    step, clock, shift = Trainer.optimizer_step, time.time, [0]
    time.time = lambda: clock() + shift[0]

    def measured(trainer, batches):
        if trainer.step == 50 or trainer.step % 250 == 0:
            resident = (
                int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            )
            handles, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
            print(
                f"step {trainer.step:5d} resident {resident:7.1f} MiB, {handles} handles, {threads} threads",
                flush=True,
            )
            shift[0] = (86400, -86400)[trainer.step % 500 == 0]
        step(trainer, batches)

    Trainer.optimizer_step = measured


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder for everything")
    folder = parser.parse_args().folder.resolve()
    kills.calm()
    kills.DEADLINE = 3600
    config = save_tiny_config(folder, save_tiny_images(folder / "images"), save_tiny_vae(folder / "vae"))
    argv = [
        "--config",
        config,
        "--output",
        folder / "run",
        *(part for change in CHANGES for part in ("--set", change)),
    ]
    codes = kills.attempt(train.main, argv, folder / "printed", [measure])
    printed = (folder / "printed").read_text()
    rows = re.findall(r"step +(\d+) resident +([\d.]+) MiB, (\d+) handles, (\d+) threads", printed)
    rows = [list(map(float, row)) for row in rows if int(row[0]) >= 250]
    grown = [max(column) - column[0] for column in list(zip(*rows))[1:]]  # MiB, handles, threads
    lines = re.findall(r"step +\d+ resident .*", printed) if codes == [0] else printed.splitlines()[-20:]
    print("\n".join(lines))
    log, metrics = (
        len((folder / "run" / name).read_text().splitlines()) for name in ("log.txt", "metrics.jsonl")
    )
    print(f"exit codes {codes}; log.txt has {log} lines, metrics.jsonl {metrics}")
    if codes != [0] or grown[0] > 5 or max(grown[1:]) > 0:
        sys.exit(f"error: codes {codes}; grown since step 250 by {grown} (MiB, handles, threads)")


if __name__ == "__main__":
    main()
