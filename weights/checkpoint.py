"""Checkpoints: `NNNNNNN.pt`, plain tensors and plain data only, readable with `torch.load(weights_only=True)`.

A checkpoint is a dictionary:
    format      1
    step        optimizer steps done
    config      the configuration as nested plain data
    autoencoder what `Autoencoder.describe` says of the one behind the features, or None
    features    fingerprint of the feature store
    class_names list of str, or None
    model, ema  state dicts; optimizer: the optimizer's state dict
    averages, skipped   what the run's log needs to go on

The file is PyTorch's zip archive, in which every record carries its CRC-32. Every load compares them, so that a file that is
cut off or has changed bits is never used.

A weights file `*.safetensors` holds the EMA weights alone, and in its metadata the plain data and a CRC-32 of the weights.
"""

import json
import os
import re
import sys
import zipfile
import zlib
from pathlib import Path

import safetensors.torch
import torch

from config import UserError
from data.files import write_file

FORMAT = 1
PLAIN_DATA = ("step", "config", "autoencoder", "features", "class_names")
WEIGHTS = "model.safetensors"  # the weights file in a folder that is laid out for the Hugging Face hub
TYPES = {
    "step": int,
    "config": dict,
    "autoencoder": dict | None,
    "features": str | None,
    "class_names": list | None,
}
AUTOENCODER = {"name", "stride", "channels", "shift", "scale", "sha256"}


def save_checkpoint(folder: Path, state: dict, keep: int) -> Path:
    """Write `folder/NNNNNNN.pt` so that the name never shows an incomplete file, then remove all but the newest `keep`.

    Nothing is removed while none of those newest can be read. Where writing fails (a full disk), the program ends with one
    line and status 1, and earlier checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for cut_off in folder.glob("*.pt.tmp"):  # of a process that was killed while it wrote
        cut_off.unlink()
    path = folder / f"{state['step']:07d}.pt"
    try:
        write_file(path, lambda stream: torch.save({"format": FORMAT, **state}, stream))
    except (
        OSError,
        RuntimeError,
    ) as error:  # PyTorch's writer hides the system's reason behind one of its own
        system = error if isinstance(error, OSError) else error.__context__
        reason = os.strerror(system.errno) if isinstance(system, OSError) else str(error).splitlines()[0]
        sys.exit(
            f"error: {path} could not be written ({reason}); earlier checkpoints are intact: free space and run the same "
            "command again"
        )
    if keep:
        kept, old = list_checkpoints(folder)[-keep:], list_checkpoints(folder)[:-keep]
        if old and any(damage(newest) is None for newest in reversed(kept)):
            for checkpoint in old:
                checkpoint.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first."""
    names = [path for path in folder.glob("*.pt") if re.fullmatch(r"\d{7,}", path.stem)]
    return sorted(names, key=lambda path: int(path.stem))


def damage(path: str | Path) -> str | None:
    """What is wrong with the bytes of a checkpoint, or None: reads the file once and compares all checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                return "it holds compressed records, which PyTorch does not write"
            changed = archive.testzip()
    except Exception as error:  # zipfile raises a dozen kinds on damaged archives
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return f"{changed!r} differs from its checksum"[:160] if changed else None


def load_checkpoint(path: str | Path, option: str = "--ckpt") -> dict:
    """Read a checkpoint onto the CPU: its bytes are checked, then memory-mapped. Executes nothing.

    `path` may also be a weights file or a folder with one; then there is neither "model" nor "optimizer".

    Raises:
        UserError: missing or damaged file, not a checkpoint, or a checkpoint of another format.
    """
    path = Path(path, WEIGHTS) if Path(path, WEIGHTS).is_file() else Path(path)
    if path.suffix == ".safetensors":
        return load_weights(path, option)
    if not path.exists():
        raise UserError(f"{option} '{path}' does not exist; give the path of a checkpoint such as 0400000.pt")
    reason = damage(path)
    if reason is None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever a file made by others makes the unpickler raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    if reason is not None:
        raise UserError(
            f"{option} '{path}' is not a readable checkpoint of this repository ({reason}); give another"
        )
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(
            f"{option} '{path}' is not a checkpoint of this repository (format {FORMAT}); give another"
        )
    return checked(state, ("model", "ema"), f"{option} '{path}' is not a checkpoint of this repository")


def checked(state: dict, weights: tuple[str, ...], refusal: str) -> dict:
    """What a file holds, with None for optional entries that it lacks; UserError unless all are what they should be."""
    state = {**dict.fromkeys(TYPES), **state}
    wrong = [
        key for key, kind in TYPES.items() if not isinstance(state[key], kind) or not is_plain(state[key])
    ]
    tensors = {
        key: list(state[key].values()) if isinstance(state.get(key), dict) else [None] for key in weights
    }
    wrong += [
        key for key, values in tensors.items() if not all(isinstance(value, torch.Tensor) for value in values)
    ]
    if isinstance(state["autoencoder"], dict) and AUTOENCODER - state["autoencoder"].keys():
        wrong.append("autoencoder")
    if wrong:
        raise UserError(f"{refusal} (it lacks {', '.join(wrong)}); give another")
    return state


def is_plain(value) -> bool:
    """Plain data that ends: nothing in it contains itself."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def save_weights(path: Path, state: dict) -> None:
    """Write the EMA weights of a checkpoint to a `.safetensors` file."""
    weights = {name: tensor.contiguous() for name, tensor in state["ema"].items()}
    about = {"format": FORMAT, **{key: state[key] for key in PLAIN_DATA}, "crc32": checksum(weights)}
    content = safetensors.torch.save(weights, {"format": "pt", "checkpoint": json.dumps(about)})
    write_file(path, lambda stream: stream.write(content))


def checksum(weights: dict[str, torch.Tensor]) -> int:
    """CRC-32 of names and values on the CPU."""
    crc = 0
    for name, tensor in sorted(weights.items()):
        crc = zlib.crc32(
            tensor.contiguous().flatten().view(torch.uint8).numpy(), zlib.crc32(name.encode(), crc)
        )
    return crc


def load_weights(path: Path, option: str) -> dict:
    """Read what `save_weights` wrote, and compare its checksum."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("checkpoint", "null"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(
            f"{option} '{path}' is not a readable weights file ({reason}); give another"
        ) from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise UserError(
            f"{option} '{path}' has no configuration in its metadata; make it with python -m weights.convert"
        )
    if about.pop("crc32", None) not in (None, checksum(weights)):
        raise UserError(f"{option} '{path}' is damaged: its weights differ from their checksum; give another")
    return checked(
        {**about, "ema": weights}, ("ema",), f"{option} '{path}' is not a weights file of this repository"
    )
