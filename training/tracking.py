"""What a run reports: scalars summed on the device, reduced over processes, written to every log at once."""

import contextlib
import json
import math
import os
import re
import secrets
import time
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from config import Config, UserError, flatten, one_line, to_dict
from data.files import write_text
from models import architecture
from models.flops import TokenCounts, total_flops
from models.types import Routing
from weights.upcycle import Origins

CLOCK = ("_per_sec", "_utilisation")  # endings of values that depend on the clock
TIMESTEP_BINS = 10
NO_VALUES = [0.0, 0.0, math.inf, -math.inf, 0.0]  # the row of an empty batch


# --------------------------------------------------------------------------------------------------- averages


class LogSums:
    """Running sums of per-sample values between two log lines, kept on the device: adding never waits for it.

    A batch adds one row per name: (sum, sum of squares, minimum, maximum, count) over its samples.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.rows: dict[str, list[Tensor]] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add a batch of values (B,) by name. All names share their operations: on a GPU each takes a launch."""
        stacked = torch.stack([value.detach().float() for value in values.values()])  # (names, B)
        # Made on the device: `new_tensor` would copy from the host and wait
        count = torch.full_like(stacked[:, 0], stacked.shape[1])
        sums = [stacked.sum(1), stacked.square().sum(1)]
        rows = torch.stack([*sums, stacked.amin(1), stacked.amax(1), count], dim=1)  # (names, 5)
        for name, row in zip(values, rows.unbind()):
            self.rows.setdefault(name, []).append(row)

    def add_by_timestep(self, values: dict[str, Tensor], t: Tensor, diffusion_steps: int) -> None:
        """Add a batch of values (B,) by name, each to its tenth of the timesteps: NAME_t0 ... NAME_t9."""
        stacked = torch.stack([value.detach().float() for value in values.values()])[:, None]  # (names, 1, B)
        bins = torch.arange(TIMESTEP_BINS, device=t.device)[:, None]
        inside = t * TIMESTEP_BINS // diffusion_steps == bins  # (bins, B)
        held = torch.where(inside, stacked, 0)  # (names, bins, B)
        least = torch.where(inside, stacked, math.inf).amin(2)
        most = torch.where(inside, stacked, -math.inf).amax(2)
        count = inside.float().sum(1).expand_as(least)
        rows = torch.stack([held.sum(2), held.square().sum(2), least, most, count], dim=2)  # (names, bins, 5)
        for name, name_rows in zip(values, rows.unbind()):
            for number, row in enumerate(name_rows.unbind()):
                self.rows.setdefault(f"{name}_t{number}", []).append(row)

    def sizes(self) -> dict[str, int]:
        """Number of rows by name."""
        return {name: len(rows) for name, rows in self.rows.items()}

    def cut(self, sizes: dict[str, int]) -> None:
        """Remove the rows that were added since `sizes` was called."""
        self.rows = {name: self.rows[name][:size] for name, size in sizes.items()}

    def reduce(self) -> dict[str, dict[str, float]]:
        """Statistics over all samples of all processes, then start anew. Collective.

        Returns:
            name -> "mean", "std", "min" and "max".
        """
        # Combine the rows of this process, then those of all processes
        own = [combine(torch.stack(rows).cpu()) for rows in self.rows.values()]
        rows = torch.stack(own)[None]  # (1, names, 5) float64
        if self.accelerator.num_processes > 1:
            rows = self.accelerator.gather(rows.to(self.accelerator.device)).cpu()  # (world, names, 5)
        reduced = {}
        for number, name in enumerate(self.rows):
            reduced[name] = statistics(combine(rows[:, number]))
        self.rows = {}
        return reduced

    def state_dict(self) -> dict[str, Tensor]:
        """The rows of all processes, name -> (world, n, 5). Collective: every process must call it.

        A run that loads them reports the same as an uninterrupted one.
        """
        state = {}
        for name, rows in self.rows.items():
            own = torch.stack(rows)[None]  # (1, n, 5)
            state[name] = self.accelerator.gather(own).cpu()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`. If the number of processes has changed, the first takes all rows."""
        world = self.accelerator.num_processes
        rank = self.accelerator.process_index
        for name, rows in state.items():
            if len(rows) == world:
                own = rows[rank]
            elif rank == 0:
                own = combine(rows.flatten(0, 1)).float()[None]
            else:  # every process needs the same number of rows
                own = rows.new_tensor(NO_VALUES)[None]
            self.rows[name] = list(own.to(self.accelerator.device))


def combine(rows: Tensor) -> Tensor:
    """Combine rows (n, 5) on the host into one (5,) float64, without batches that hold a non-finite value."""
    # The row without values makes minimum and maximum of no batches infinite
    rows = torch.cat([rows.double(), torch.tensor([NO_VALUES], dtype=torch.float64)])
    rows = rows[rows[:, :2].isfinite().all(1)]
    total, squares, least, most, count = rows.unbind(1)
    return torch.stack([total.sum(), squares.sum(), least.amin(), most.amax(), count.sum()])


def statistics(row: Tensor) -> dict[str, float]:
    """Mean, standard deviation, minimum and maximum from a combined row (5,); NaN if it counts no values."""
    total, squares, least, most, count = row.tolist()
    if not count:  # every step since the last log line was skipped
        return dict.fromkeys(("mean", "std", "min", "max"), math.nan)
    mean = total / count
    variance = max(squares / count - mean**2, 0.0)
    return {"mean": mean, "std": variance**0.5, "min": least, "max": most}


def kept_fractions(routing: Routing) -> dict[str, Tensor]:
    """Share of the tokens kept per sample (B,): by the router's own decision, and after tail dropping."""
    return {"kept_natural": routing.boundary.float().mean(1), "kept_effective": routing.keep.float().mean(1)}


def flatten_statistics(statistics: dict[str, dict[str, float]]) -> dict[str, float]:
    """The mean of every value; of the kept shares also the deviation, minimum and maximum.

    A tenth of the timesteps that no sample fell into is left out.
    """
    kept_names = ("kept_natural", "kept_effective")
    scalars = {}
    for name, values in statistics.items():
        is_empty_bin = re.search(r"_t\d$", name) and math.isnan(values["mean"])
        if name not in kept_names and not is_empty_bin:
            scalars[name] = values["mean"]
    for name in kept_names:
        for key, value in statistics[name].items():
            scalars[f"{name}_{key}"] = value
    return scalars


def training_tflop(config: Config, kept: dict[str, float]) -> float:
    """TFLOP of a training step per image. Recomputation in the backward pass is not counted.

    Args:
        kept: mean and standard deviation over images of the kept share of the tokens.
    """
    tokens = config.tokens
    mean_square = (kept["mean"] ** 2 + kept["std"] ** 2) * tokens**2
    forward_flops = total_flops(architecture(config), TokenCounts(kept["mean"] * tokens, mean_square))
    # A backward pass costs two forward passes
    return 3 * forward_flops / 1e12


# -------------------------------------------------------------------------------------------------- log files


class RunLog:
    """`log.txt` for people, `metrics.jsonl` and `evaluation.jsonl` for programs, and Accelerate's trackers.

    Only the main process writes.

    Args:
        step: optimizer step from which training continues; later rows are removed.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, step: int):
        self.accelerator = accelerator
        self.folder = folder
        if accelerator.is_main_process:
            for name in ("metrics.jsonl", "evaluation.jsonl"):
                damaged = remove_later_rows(folder / name, step)
                if damaged:
                    self.line(f"warning: {folder / name}: lines that cannot be read are removed ({damaged})")

    def line(self, text: str) -> None:
        """Append a time-stamped line to log.txt and print it above the progress bar."""
        if self.accelerator.is_main_process:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
                file.write(f"[{stamp}] {text}\n")
            tqdm.write(text)

    def metrics(self, step: int, scalars: dict[str, float]) -> None:
        """Write one row of scalars. Values that depend on the clock go to the trackers only."""
        timeless = {key: value for key, value in scalars.items() if not key.endswith(CLOCK)}
        self.write_row("metrics.jsonl", step, timeless)
        self.accelerator.log({f"train/{key}": value for key, value in scalars.items()}, step=step)

    def evaluation(self, step: int, scalars: dict[str, float]) -> None:
        """Write one row of metrics of the EMA's samples."""
        self.write_row("evaluation.jsonl", step, scalars)
        summary = " ".join(f"{key}={value:.4g}" for key, value in scalars.items())
        self.line(f"step {step:7d}: {summary}")
        self.accelerator.log({f"eval/{key}": value for key, value in scalars.items()}, step=step)

    def has_evaluation(self, step: int) -> bool:
        """Whether the last row of evaluation.jsonl is of this step."""
        path = self.folder / "evaluation.jsonl"
        rows = path.read_bytes().splitlines() if path.exists() else []
        return bool(rows) and step_of_row(rows[-1]) == step

    def origins(self, source: str, origins: Origins) -> None:
        """Report where the first weights come from: counts in log.txt, every tensor in init_report.txt."""
        # An origin is a kind, possibly followed by a colon and details
        counts = Counter(origin.split(":")[0] for origin in origins.values())
        summary = ", ".join(f"{count} tensors {kind}" for kind, count in counts.most_common())
        self.line(f"from {source}: {summary}")
        if self.accelerator.is_main_process:
            lines = [f"{name:<45} {origin}\n" for name, origin in origins.items()]
            write_text(self.folder / "init_report.txt", "".join(lines))

    def write_row(self, name: str, step: int, scalars: dict[str, float]) -> None:
        """Append a row to a .jsonl file; it survives a power cut, as the checkpoint that follows does."""
        if self.accelerator.is_main_process:
            row: dict[str, float | None] = {"step": step}
            for key, value in scalars.items():
                # JSON has no NaN
                row[key] = value if math.isfinite(value) else None
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())


def remove_later_rows(path: Path, step: int) -> int:
    """Remove the rows after `step`, which a resumed run writes again, and lines that cannot be read.

    Returns:
        The number of complete lines that could not be read.
    """
    if not path.exists():
        return 0
    kept = []
    damaged = 0
    for line in path.read_bytes().splitlines(keepends=True):
        found = step_of_row(line)
        if found is None:
            # A kill may cut the last line off
            damaged += line.endswith(b"\n")
        elif found <= step:
            kept.append(line.decode().rstrip("\r\n") + "\n")
    write_text(path, "".join(kept))
    return damaged


def step_of_row(line: bytes) -> int | None:
    """The step of a row in a .jsonl file; None if the line is damaged, for example by a power cut."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else None


# ---------------------------------------------------------------------------------- trackers and the profiler


def start_trackers(accelerator: Accelerator, config: Config, folder: Path, same_wandb: bool) -> None:
    """Start Accelerate's trackers.

    Args:
        same_wandb: continue the wandb run whose id an earlier start left in the folder.

    Raises:
        UserError: a tracker cannot start.
    """
    trackers = config.logging.trackers
    if not trackers:
        return
    # Give wandb an id, and keep it for the next start
    options: dict[str, dict[str, Any]] = {}
    if "wandb" in trackers:
        identity = wandb_id(folder, same_wandb)
        name = f"{folder.name}-{config.model.name}"
        options["wandb"] = {"name": name, "dir": str(folder), "resume": "allow", "id": identity}
        if accelerator.is_main_process:
            write_text(folder / "wandb_id.txt", identity)
    # Start them all
    try:
        accelerator.init_trackers(
            config.logging.wandb_project, config=flatten(to_dict(config)), init_kwargs=options
        )
    except Exception as error:  # each tracker raises its own kinds
        reason = one_line(error, 200)
        raise UserError(
            f"logging.trackers: cannot start ({reason}); set WANDB_MODE=offline or leave wandb out"
        ) from None


def wandb_id(folder: Path, same_wandb: bool) -> str:
    """The id in wandb_id.txt, or a new one: without an id some versions of Accelerate start a run twice."""
    file = folder / "wandb_id.txt"
    known = ""
    if same_wandb and file.is_file():
        known = file.read_text(encoding="utf-8", errors="replace").strip()
    # After a power cut the file may be empty, or hold anything
    is_id = re.fullmatch(r"[A-Za-z0-9_-]+", known)
    return known if is_id else secrets.token_hex(4)


def make_profiler(config: Config, folder: Path) -> AbstractContextManager[torch.profiler.profile | None]:
    """A torch profiler that writes `training.profile_steps` to profiler/; None without `training.profile`."""
    if not config.training.profile:
        return contextlib.nullcontext()
    first, last = config.training.profile_steps
    # Record these steps once, after one step to warm up
    schedule = torch.profiler.schedule(wait=max(first - 1, 0), warmup=1, active=last - first + 1, repeat=1)
    write = torch.profiler.tensorboard_trace_handler(str(folder / "profiler"))
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write)
