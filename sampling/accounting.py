"""What samples cost: kept tokens, FLOPs by component and by branch of guidance, time and memory.

Each image's cost follows from its own kept counts, so attention is counted for its own token pairs.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config, UserError
from data.files import write_file, write_json
from models import architecture, flops

BRANCHES = ("conditional", "unconditional")


class StepCounts(NamedTuple):
    """Kept tokens of one step; None for a branch that was not computed. At least one was."""

    t: int
    conditional: Tensor | None  # (B,) int64
    unconditional: Tensor | None  # (B,) int64

    @property
    def shown(self) -> Tensor:
        """The conditional branch or, in samples without a class, the only one: (B,) int64."""
        counts = self.unconditional if self.conditional is None else self.conditional
        assert counts is not None
        return counts


class Seconds(NamedTuple):
    """Time of one batch on its process."""

    denoising: float
    decoding: float  # the autoencoder


class SamplingRecord(NamedTuple):
    """What a summary is made from."""

    timesteps: Sequence[int]  # t of each step
    counts: np.ndarray  # (images, steps, 2) kept tokens, as `stack_kept` makes it
    labels: Sequence[int]  # of each image
    seconds: Seconds  # of all images together, added over processes
    peak_memory: int  # bytes, of the batch that took most


def stack_kept(kept: Sequence[StepCounts]) -> np.ndarray:
    """One batch's kept tokens: (B, steps, 2) int32, the branches last; 0 where a branch was not computed."""
    rows = []
    for step in kept:
        uncomputed = torch.zeros_like(step.shown)
        branches = [uncomputed if own is None else own for own in (step.conditional, step.unconditional)]
        rows.append(torch.stack(branches))
    return torch.stack(rows).permute(2, 0, 1).int().cpu().numpy()


# ------------------------------------------------------------------------------------------------------ FLOPs


def image_flops(config: Config, counts: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """FLOPs of the denoiser for each image, by branch and component.

    Args:
        counts: (B, steps, 2) as `stack_kept` makes it.

    Returns:
        branch -> component -> (B,) float64, the sum over steps.
    """
    network = architecture(config)
    result = {}
    for k, branch in enumerate(BRANCHES):
        own = counts[:, :, k].astype(np.float64)
        computed = (own > 0).sum(1)  # (B,) steps
        if not computed.any():
            continue
        mean = own.sum(1) / computed
        mean_square = (own**2).sum(1) / computed
        per_step = flops.forward_flops(network, flops.TokenCounts(mean, mean_square))
        result[branch] = {name: cost * computed for name, cost in per_step.items()}
    return result


def image_tflop(config: Config, kept: Sequence[StepCounts]) -> np.ndarray:
    """TFLOP of each image of a batch over all steps and branches, the autoencoder aside: (B,)."""
    parts: list[np.ndarray] = []
    for components in image_flops(config, stack_kept(kept)).values():
        parts += components.values()
    return total(parts) / 1e12


def total(values: Iterable[np.ndarray]) -> np.ndarray:
    """Sum of arrays of one shape, in their order."""
    result, *others = values
    for value in others:
        result = result + value
    return result


# ---------------------------------------------------------------------------------------------------- summary


def summarise(
    config: Config, decoding_flops: float, class_names: Sequence[str] | None, record: SamplingRecord
) -> dict:
    """What a sampling run cost, as plain data.

    Args:
        decoding_flops: of the autoencoder, per image.
    """
    # By branch, by component, and of the autoencoder
    branches = image_flops(config, record.counts)
    by_branch = {}  # FLOPs of each image
    mean_by_branch = {}
    for branch, components in branches.items():
        by_branch[branch] = total(components.values())
        mean_by_branch[branch] = float(by_branch[branch].mean()) / 1e12
    by_component = {}
    for name in next(iter(branches.values())):
        both = total(components[name] for components in branches.values())
        by_component[name] = float(both.mean()) / 1e12

    images = len(record.counts)
    seconds = record.seconds
    return {
        "images": images,
        "steps": len(record.timesteps),
        "tokens": config.tokens,
        "tflop_per_image": spread(total(by_branch.values()) / 1e12),
        "tflop_by_branch": mean_by_branch,
        "tflop_by_component": by_component,
        "tflop_decoding": decoding_flops / 1e12,
        "ms_per_image": 1e3 * seconds.denoising / images,
        "peak_memory_mb": record.peak_memory / 1e6,
        "seconds_per_image": {
            "denoising": seconds.denoising / images,
            "decoding": seconds.decoding / images,
        },
        "kept_by_step": step_rows(record),
        "kept_by_class": class_rows(record, config.tokens, class_names),
    }


def spread(values: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation over images, and extremes."""
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def step_rows(record: SamplingRecord) -> list[dict]:
    """Kept tokens at each step, spread over images; None for a branch that was not computed."""
    rows = []
    for k, t in enumerate(record.timesteps):
        row: dict = {"t": int(t)}
        for branch, own in zip(BRANCHES, record.counts[:, k].T):
            row[branch] = spread(own) if own.any() else None
        rows.append(row)
    return rows


def class_rows(record: SamplingRecord, tokens: int, class_names: Sequence[str] | None) -> list[dict]:
    """Kept share of the conditional branch over all steps: mean and spread over the images of each class.

    There is nothing to list for samples without a class.
    """
    if not record.counts[:, :, 0].any():
        return []
    labels = np.asarray(record.labels)
    shares = record.counts[:, :, 0].mean(1) / tokens
    rows = []
    for label in np.unique(labels).tolist():
        own = shares[labels == label]
        name = class_name(class_names, label)
        rows.append({"label": label, "name": name, "images": len(own), "share": spread(own)})
    return rows


def class_name(class_names: Sequence[str] | None, label: int) -> str:
    """The name of a class, or its number: a model may know more classes than its features have names for."""
    if class_names and label < len(class_names):
        return class_names[label]
    return str(label)


def report(summary: dict) -> str:
    """The summary for people, a few lines."""
    seconds = summary["seconds_per_image"]
    together = sum(seconds.values())
    lines = [
        f"{summary['images']} images, {together:.2f} s each, of which decoding {seconds['decoding']:.2f} s; "
        f"peak memory {summary['peak_memory_mb']:.0f} MB"
    ]
    for branch in summary["tflop_by_branch"]:
        lines.append(report_branch(summary, branch))

    # The whole, its components, and the autoencoder
    cost = summary["tflop_per_image"]
    shares = []
    for name, value in summary["tflop_by_component"].items():
        shares.append(f"{name} {value / cost['mean']:.1%}")
    steps = summary["steps"]
    lines.append(
        f"{cost['mean']:.4g} TFLOP per image over {steps} steps (std {cost['std']:.2g}): {', '.join(shares)}"
    )
    lines.append(f"decoding an image takes {summary['tflop_decoding']:.4g} TFLOP more")
    return "\n".join(lines)


def report_branch(summary: dict, branch: str) -> str:
    """Kept share and cost of one branch."""
    rows = [row[branch] for row in summary["kept_by_step"] if row[branch]]
    tokens = summary["tokens"]
    mean = np.mean([row["mean"] for row in rows]) / tokens
    least = min(row["min"] for row in rows) / tokens
    most = max(row["max"] for row in rows) / tokens
    return (
        f"{branch} branch: {mean:.1%} of {tokens} tokens kept (from {least:.1%} to {most:.1%}) "
        f"in {len(rows)} steps, {summary['tflop_by_branch'][branch]:.4g} TFLOP per image"
    )


# ------------------------------------------------------------------------------------------------------ files


def save_record(kept: Sequence[StepCounts], seconds: Seconds, peak_memory: int, path: Path) -> None:
    """Write one batch's kept tokens, time and peak memory in bytes."""
    arrays: dict[str, Any] = {
        "t": np.array([step.t for step in kept]),
        "counts": stack_kept(kept),
        "seconds": np.array(seconds),
        "peak_memory": np.array(peak_memory),
    }
    write_file(path, lambda stream: np.savez_compressed(stream, **arrays), durable=False)


def count_recorded(path: Path) -> int:
    """Images that a file of `save_record` is about; 0 if it cannot be read."""
    try:
        with np.load(path) as arrays:
            counts = arrays["counts"]
            is_whole = arrays["t"].shape == counts.shape[1:2] and arrays["seconds"].shape == (2,)
    except Exception:  # NumPy and zipfile raise many kinds on damaged files
        return 0
    return len(counts) if is_whole else 0


def read_records(paths: Sequence[Path], labels: Sequence[int]) -> SamplingRecord:
    """The files of several batches together, of their first len(labels) images only.

    A last batch that is larger, because an earlier run was asked for more samples, counts in part.
    """
    counts = []
    seconds = np.zeros(2)
    peak_memory = 0
    missing = len(labels)
    for path in paths:
        with np.load(path) as arrays:
            own = arrays["counts"]
            timesteps = arrays["t"].tolist()
            used = own[:missing]
            seconds += arrays["seconds"] * len(used) / len(own)
            # Batches of earlier versions have no entry
            peak_memory = max(peak_memory, int(arrays.get("peak_memory", 0)))
        counts.append(used)
        missing -= len(used)
    return SamplingRecord(timesteps, np.concatenate(counts), labels, Seconds(*seconds.tolist()), peak_memory)


def check_summary(option: str, path: Path) -> None:
    """UserError if writing this summary.json would replace a file of another program."""
    if not path.exists():
        return
    try:
        is_ours = "options" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        is_ours = False
    if not is_ours:
        raise UserError(f"{option} '{path}': exists and is no summary of samples; give another folder")


def save_summary(summary: dict, path: Path) -> None:
    """Write summary.json and the folder that it goes into."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, summary)
