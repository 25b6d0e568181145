"""What samples cost: kept tokens, FLOPs by component and by branch of guidance, and time.

Each image's cost follows from its own kept counts, so attention is counted for its own token pairs.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config
from data.files import write_file
from models import architecture, flops

BRANCHES = ("conditional", "unconditional")


class StepCounts(NamedTuple):
    """Kept tokens of one step."""

    t: int
    conditional: Tensor  # (B,) int64
    unconditional: Tensor | None  # (B,) int64, or None where that branch was not computed


class Seconds(NamedTuple):
    """Time of one batch on its process."""

    denoising: float
    decoding: float  # the autoencoder


def stack_kept(kept: Sequence[StepCounts]) -> np.ndarray:
    """One batch's record as an array (B, steps, 2) int32, the branches last; 0 where a branch was not computed."""
    nothing = torch.zeros_like(kept[0].conditional)
    rows = [
        torch.stack([step.conditional, nothing if step.unconditional is None else step.unconditional])
        for step in kept
    ]
    return torch.stack(rows).permute(2, 0, 1).int().cpu().numpy()


def image_flops(config: Config, counts: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """FLOPs of the denoiser for each image, by branch and component.

    Args:
        counts: (B, steps, 2) as `stack_kept` makes it.

    Returns:
        branch -> component -> (B,) float64, the sum over steps.
    """
    result = {}
    for branch, own in zip(BRANCHES, np.moveaxis(counts, 2, 0).astype(np.float64)):
        computed = (own > 0).sum(1)  # (B,) steps
        if computed.any():
            mean = flops.TokenCounts(own.sum(1) / computed, (own**2).sum(1) / computed)
            result[branch] = {
                name: each * computed
                for name, each in flops.forward_flops(architecture(config), mean).items()
            }
    return result


def image_tflop(config: Config, kept: Sequence[StepCounts]) -> np.ndarray:
    """TFLOP of each image of a batch over all steps and branches, the autoencoder aside: (B,)."""
    parts = image_flops(config, stack_kept(kept))
    return sum(value for components in parts.values() for value in components.values()) / 1e12


def summarise(
    config: Config,
    decoder: dict,
    timesteps: Sequence[int],
    counts: np.ndarray,
    labels: Sequence[int],
    class_names: Sequence[str] | None,
    seconds: Seconds,
) -> dict:
    """The account of a sampling run as plain data.

    Args:
        decoder: the autoencoder's diffusers configuration.
        timesteps: t of each step. counts: (images, steps, 2). labels: of each image.
        seconds: of all images together, added over processes.
    """
    parts, images, tokens = image_flops(config, counts), len(counts), config.tokens
    by_branch = {branch: sum(components.values()) for branch, components in parts.items()}
    components = next(iter(parts.values()))
    return {
        "images": images,
        "steps": len(timesteps),
        "tokens": tokens,
        "tflop_per_image": spread(sum(by_branch.values()) / 1e12),
        "tflop_by_branch": {branch: float(value.mean()) / 1e12 for branch, value in by_branch.items()},
        "tflop_by_component": {
            name: float(sum(own[name] for own in parts.values()).mean()) / 1e12 for name in components
        },
        "tflop_decoding": sum(flops.decoder_flops(decoder, config.latent_size).values()) / 1e12,
        "seconds_per_image": {name: value / images for name, value in seconds._asdict().items()},
        "kept_by_step": [step_row(int(t), counts[:, k]) for k, t in enumerate(timesteps)],
        "kept_by_class": class_rows(counts, np.asarray(labels), tokens, class_names),
    }


def spread(values: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation over images, and extremes."""
    return {name: float(getattr(values, name)()) for name in ("mean", "std", "min", "max")}


def step_row(t: int, counts: np.ndarray) -> dict:
    """Kept tokens of one step, counts (images, 2); None for a branch that was not computed."""
    return {"t": t, **{name: spread(own) if own.any() else None for name, own in zip(BRANCHES, counts.T)}}


def class_rows(
    counts: np.ndarray, labels: np.ndarray, tokens: int, class_names: Sequence[str] | None
) -> list[dict]:
    """Kept share of the conditional branch over all steps, for each class that was sampled: mean and spread over images."""
    shares = counts[:, :, 0].mean(1) / tokens
    return [
        {
            "label": label,
            "name": class_names[label] if class_names else str(label),
            "images": int((labels == label).sum()),
            "share": spread(shares[labels == label]),
        }
        for label in np.unique(labels).tolist()
    ]


def report(summary: dict) -> str:
    """The account in words."""
    cost, seconds = summary["tflop_per_image"], summary["seconds_per_image"]
    lines = [
        f"{summary['images']} images, {sum(seconds.values()):.2f} s each ({seconds['decoding']:.2f} s of it to decode)"
    ]
    for branch in summary["tflop_by_branch"]:
        rows = [row[branch] for row in summary["kept_by_step"] if row[branch]]
        mean, least, most = (
            pick(row[key] for row in rows) / summary["tokens"]
            for key, pick in (
                ("mean", lambda values: float(np.mean(list(values)))),
                ("min", min),
                ("max", max),
            )
        )
        lines.append(
            f"{branch} branch: {mean:.1%} of {summary['tokens']} tokens kept (from {least:.1%} to {most:.1%}) "
            f"in {len(rows)} steps, {summary['tflop_by_branch'][branch]:.4g} TFLOP per image"
        )
    parts = ", ".join(
        f"{name} {value / cost['mean']:.1%}" for name, value in summary["tflop_by_component"].items()
    )
    lines.append(
        f"{cost['mean']:.4g} TFLOP per image over {summary['steps']} steps (std {cost['std']:.2g}): {parts}"
    )
    lines.append(f"{summary['tflop_decoding']:.4g} TFLOP more to decode it")
    return "\n".join(lines)


def save_record(kept: Sequence[StepCounts], seconds: Seconds, path: Path) -> None:
    """One batch's kept tokens and time as a file."""
    arrays = {"t": [step.t for step in kept], "counts": stack_kept(kept), "seconds": seconds}
    write_file(path, lambda stream: np.savez_compressed(stream, **arrays), durable=False)


def read_records(paths: Sequence[Path], images: int) -> tuple[list[int], np.ndarray, Seconds]:
    """Timesteps, kept counts (images, steps, 2) and seconds of several batches together, of their first `images` only."""
    loaded, left = [], images
    for path in paths:
        with np.load(path) as arrays:
            counts = arrays["counts"][
                :left
            ]  # the last batch was larger if more samples were asked for earlier
            loaded.append((arrays["t"], counts, arrays["seconds"] * len(counts) / len(arrays["counts"])))
            left -= len(counts)
    timesteps, counts, seconds = zip(*loaded)
    return timesteps[0].tolist(), np.concatenate(counts), Seconds(*np.sum(seconds, axis=0).tolist())


def save_summary(summary: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda stream: stream.write(json.dumps(summary, indent=1).encode()))
