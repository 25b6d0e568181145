"""Checkpoints: `NNNNNNN.pt`, plain tensors and plain data only, readable with `torch.load(weights_only=True)`.

A checkpoint is a dictionary:
    format      1
    step        optimizer steps done
    config      the configuration as nested plain data
    autoencoder what `Autoencoder.describe` says of the one behind the features, or None
    features    fingerprint of the feature store
    class_names list of str, or None
    model, ema  state dicts; optimizer: the optimizer's state dict
"""

import pickle
import re
from pathlib import Path

import torch

from config import UserError
from data.files import write_file

FORMAT = 1


def save_checkpoint(folder: Path, state: dict, keep: int) -> Path:
    """Write `folder/NNNNNNN.pt` so that the name never shows an incomplete file, then remove all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{state['step']:07d}.pt"
    write_file(path, lambda stream: torch.save({"format": FORMAT, **state}, stream))
    if keep:
        for old in list_checkpoints(folder)[:-keep]:
            old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first."""
    names = [path for path in folder.glob("*.pt") if re.fullmatch(r"\d{7,}", path.stem)]
    return sorted(names, key=lambda path: int(path.stem))


def load_checkpoint(path: str | Path, option: str = "--ckpt") -> dict:
    """Read a checkpoint onto the CPU, memory-mapped: only what is used is read. Executes nothing.

    Raises:
        UserError: missing file, not a checkpoint, or a checkpoint of another format.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{option} '{path}' does not exist; give the path of a checkpoint such as 0400000.pt") from None
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0][:160]
        raise UserError(f"{option} '{path}' is not a readable checkpoint of this repository ({reason})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{option} '{path}' is not a checkpoint of this repository (format {FORMAT})")
    return state
