"""Choose the length of the weights' average after training (post-hoc EMA, EDM2, arXiv 2312.02696).

    python -m weights.reconstruct results/000-DC-DiT --std 0.08 --output std-0.08.safetensors

needs a run with `training.posthoc_ema_stds`. The file is a weights file for every --ckpt. The standard deviation is
relative to the length of training: at 0.1, nine tenths of the weight lie in its last quarter.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import cli
from config import UserError
from weights.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, save_weights
from weights.posthoc import LONGEST, Snapshot, list_snapshots, reconstruct, residual

# Above this distance the snapshots cannot represent the profile, and the result is another average
FAR = 0.1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of train.py")
    parser.add_argument("--std", type=float, required=True, help="relative standard deviation of the average")
    parser.add_argument("--step", type=int, help="step at which it ends (default: the last snapshot's)")
    parser.add_argument("--output", type=Path, required=True, help="weights file (.safetensors) to write")
    args = parser.parse_args(argv)
    if not 0 < args.std < LONGEST:
        raise UserError(f"--std {args.std}: must be above 0 and below {LONGEST}, which is nearly uniform")
    if args.output.suffix != ".safetensors":
        raise UserError(f"--output '{args.output}': is a weights file, whose name ends in .safetensors")
    cli.check_output_file("--output", args.output)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    average = average_of_length(args.run, args.std, args.step)
    save_weights(args.output, average.state)
    print(f"{args.output}: {average}")


class Reconstruction(NamedTuple):
    """An average that was put together from snapshots."""

    state: Checkpoint  # with the average as its EMA
    std: float
    snapshots: int
    distance: float  # of its profile to the one that was asked for, relative

    def __str__(self) -> str:
        text = (
            f"std {self.std:g} at step {self.state['step']} from {self.snapshots} snapshots, "
            f"profile reproduced to {self.distance:.1%}"
        )
        if self.distance > FAR:
            text += "\nwarning: the snapshots are too far apart for this length; take a longer one"
        return text


def average_of_length(run: Path, std: float, step: int | None = None) -> Reconstruction:
    """The average of a run with this relative standard deviation.

    Args:
        step: at which it ends; None: the last snapshot's.

    Raises:
        UserError: the run has no snapshot of this step, or no checkpoint.
    """
    files = list_snapshots(run, step)
    steps = sorted({snapshot.step for snapshot in files})
    if step is not None and step not in steps:
        raise UserError(f"--step {step}: has no snapshot; the nearest earlier one is of step {steps[-1]}")
    # The newest checkpoint holds the configuration
    checkpoint = newest_checkpoint(run)

    # Put the weights together, into what else the newest checkpoint holds
    target = Snapshot(steps[-1], std)
    state = load_checkpoint(checkpoint)
    state["ema"] = state["ema"] | reconstruct(files, target)
    state["step"] = target.step
    state["weights"] = f"std-{std:g}"
    return Reconstruction(state, std, len(files), residual(list(files), target))


if __name__ == "__main__":
    cli.run(main)
