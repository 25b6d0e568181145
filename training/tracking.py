"""What a run reports: scalars summed on the device, reduced over processes, and written to every log at once."""

import json
import math
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from data.files import write_file
from models.types import Routing

CLOCK = ("_per_sec", "_utilisation")  # endings of values that depend on the clock
NOTHING = [0.0, 0.0, float("inf"), float("-inf"), 0.0]  # a row of no values


class Averages:
    """Running sums of per-sample values between two log lines, kept on the device: adding never waits for it.

    `mean` of a name averages over all samples of all processes since the last reset; names of the routing statistics also
    have a standard deviation, minimum and maximum over samples.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.values: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor) -> None:
        """values: (B,) or a scalar. Kept as (sum, sum of squares, min, max, count)."""
        values = values.detach().float().flatten()
        count = torch.full_like(
            values[0], len(values)
        )  # made on the device: new_tensor would copy from the host and wait
        row = torch.stack([values.sum(), values.square().sum(), values.min(), values.max(), count])
        self.values.setdefault(name, []).append(row)

    def reduce(self) -> dict[str, dict[str, float]]:
        """Statistics over all processes, then start anew. Collective: every process must call it."""
        rows = torch.stack([_combine(torch.stack(rows).cpu()) for rows in self.values.values()])[
            None
        ]  # (1, names, 5) float64
        if self.accelerator.num_processes > 1:
            rows = self.accelerator.gather(rows.to(self.accelerator.device)).cpu()  # (world, names, 5)
        combined = [_combine(rows[:, k]).tolist() for k in range(rows.shape[1])]
        names, self.values = list(self.values), {}
        return {name: _statistics(*row) for name, row in zip(names, combined)}

    def state_dict(self) -> dict[str, Tensor]:
        """The rows of all processes, name -> (world, n, 5), so that a resumed run reports what an uninterrupted one does.

        Collective: every process must call it.
        """
        return {
            name: self.accelerator.gather(torch.stack(rows)[None]).cpu() for name, rows in self.values.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`; with another number of processes the first one takes all rows."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        for name, rows in state.items():
            if len(rows) == world:
                own = rows[rank]
            else:
                nothing = rows.new_tensor(NOTHING)  # as many rows on every process
                own = (_combine(rows.flatten(0, 1)).float() if rank == 0 else nothing)[None]
            self.values[name] = list(own.to(self.accelerator.device))


def _combine(rows: Tensor) -> Tensor:
    """(n, 5) on the host -> (5,) float64; rows of batches with a non-finite value do not count."""
    rows = torch.cat([rows.double(), torch.tensor([NOTHING], dtype=torch.float64)])
    rows = rows[rows[:, :2].isfinite().all(1)]
    return torch.stack(
        [rows[:, 0].sum(), rows[:, 1].sum(), rows[:, 2].amin(), rows[:, 3].amax(), rows[:, 4].sum()]
    )


def _statistics(total: float, squares: float, least: float, most: float, count: float) -> dict[str, float]:
    if not count:  # every step since the last report was skipped
        return dict.fromkeys(("mean", "std", "min", "max"), float("nan"))
    mean = total / count
    return {"mean": mean, "std": max(squares / count - mean**2, 0.0) ** 0.5, "min": least, "max": most}


def kept_fractions(routing: Routing) -> dict[str, Tensor]:
    """Share of tokens kept per sample (B,): by the network's own decision, and after tail dropping."""
    return {"kept_natural": routing.boundary.float().mean(1), "kept_effective": routing.keep.float().mean(1)}


class RunLog:
    """`log.txt` for people, `metrics.jsonl` and `evaluation.jsonl` for programs, and Accelerate's trackers.

    Only the main process writes.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, step: int):
        self.accelerator, self.folder = accelerator, folder
        if accelerator.is_main_process:
            for name in ("metrics.jsonl", "evaluation.jsonl"):
                _truncate_metrics(folder / name, step)

    def line(self, text: str) -> None:
        """Append a time-stamped line to log.txt and print it above the progress bar."""
        if self.accelerator.is_main_process:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
                file.write(f"[{stamp}] {text}\n")
            tqdm.write(text)

    def metrics(self, step: int, scalars: dict[str, float]) -> None:
        """Write one row of scalars; values that depend on the clock go to the trackers and log.txt only."""
        timeless = {key: value for key, value in scalars.items() if not key.endswith(CLOCK)}
        self._row("metrics.jsonl", step, timeless)
        self.accelerator.log({f"train/{key}": value for key, value in scalars.items()}, step=step)

    def evaluation(self, step: int, scalars: dict[str, float]) -> None:
        """Write one row of what samples of the EMA are like."""
        self._row("evaluation.jsonl", step, scalars)
        self.line(f"step {step:7d}: " + " ".join(f"{key}={value:.4g}" for key, value in scalars.items()))
        self.accelerator.log({f"eval/{key}": value for key, value in scalars.items()}, step=step)

    def has_evaluation(self, step: int) -> bool:
        """Whether there is a row of this step, which is the last where training goes on from it."""
        path = self.folder / "evaluation.jsonl"
        rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return bool(rows) and json.loads(rows[-1])["step"] == step

    def _row(self, name: str, step: int, scalars: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                plain = {
                    key: value if math.isfinite(value) else None for key, value in scalars.items()
                }  # JSON has no NaN
                file.write(json.dumps({"step": step, **plain}) + "\n")
                file.flush()
                os.fsync(file.fileno())  # a checkpoint that follows must not outlive it in a power cut


def _truncate_metrics(path: Path, step: int) -> None:
    """Drop rows after `step`, which a resumed run writes again, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    write_file(path, lambda stream: stream.write("".join(kept).encode()))
