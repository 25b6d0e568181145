"""Checkpoints: `NNNNNNN.pt`, plain tensors and plain data only, readable with `torch.load(weights_only=True)`.

A checkpoint is a dictionary:
    format      1
    step        optimizer steps done
    config      the configuration as nested plain data
    autoencoder what `Autoencoder.describe` says of the one behind the features, or None
    features    fingerprint of the feature store
    class_names list of str, or None
    model, ema  state dicts; optimizer: the optimizer's state dict

A weights file `*.safetensors` holds the EMA weights alone, and all of the plain data in its metadata.
"""

import json
import pickle
import re
from pathlib import Path

import safetensors.torch
import torch

from config import UserError
from data.files import write_file

FORMAT = 1
PLAIN_DATA = ("step", "config", "autoencoder", "features", "class_names")
WEIGHTS = "model.safetensors"  # the weights file in a folder that is laid out for the Hugging Face hub


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

    `path` may also be a weights file or a folder with one; then there is neither "model" nor "optimizer".

    Raises:
        UserError: missing file, not a checkpoint, or a checkpoint of another format.
    """
    path = Path(path, WEIGHTS) if Path(path, WEIGHTS).is_file() else Path(path)
    if path.suffix == ".safetensors":
        return load_weights(path, option)
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


def save_weights(path: Path, state: dict) -> None:
    """Write the EMA weights of a checkpoint to a `.safetensors` file."""
    about = {"format": FORMAT, **{key: state[key] for key in PLAIN_DATA}}
    weights = {name: tensor.contiguous() for name, tensor in state["ema"].items()}
    content = safetensors.torch.save(weights, {"format": "pt", "checkpoint": json.dumps(about)})
    write_file(path, lambda stream: stream.write(content))


def load_weights(path: Path, option: str) -> dict:
    """Read what `save_weights` wrote."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("checkpoint", "null"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{option} '{path}' is not a readable weights file ({error}); give another") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise UserError(f"{option} '{path}' has no configuration in its metadata; make it with python -m models.convert")
    return {**about, "ema": weights}
