"""Checkpoints `NNNNNNN.pt`: tensors and plain data only, readable with `torch.load(weights_only=True)`.

The file is PyTorch's zip archive, in which every record carries its CRC-32. Every load compares them, so a
file that is cut off or has changed bits is never used. `Checkpoint` lists the content.

A weights file `*.safetensors` holds the EMA weights alone. Its metadata hold the plain data and a CRC-32 of
the weights.
"""

import json
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypedDict, cast

import safetensors.torch
import torch
from torch import Tensor

from config import Config, UserError, one_line, printable
from data.files import write_file
from models import build_model
from processes import group
from schema import known_part
from weights.untrusted import is_archive, unpickling_problem
from weights.unwrap import conversion_hint, is_state_dict, precision_problem

FORMAT = 1
WEIGHTS = "model.safetensors"  # the weights file in a folder that is laid out for the Hugging Face hub


class Checkpoint(TypedDict, total=False):
    """What a checkpoint holds. A weights file lacks the last eight entries."""

    format: int  # FORMAT
    step: int  # optimizer steps done
    config: dict  # the configuration as nested plain data
    autoencoder: dict | None  # `Autoencoder.describe()` of the one that made the features
    features: str | None  # fingerprint of the feature store
    class_names: list[str] | None
    # In a weights file that has others in place of the EMA: "model", or the name of an average
    weights: str | None
    ema: dict[str, Tensor]
    model: dict[str, Tensor]
    optimizer: dict
    terms: dict[str, Tensor]  # weights of the terms in training/losses.py
    posthoc: dict[str, dict[str, Tensor]]  # averages of `training.posthoc_ema_stds`
    weight_averages: dict[str, dict[str, Any]]  # those of `training.averages`, with "weights"
    averages: dict[str, Tensor]  # what the log has summed since its last line
    skipped: dict[str, int]  # what the guard has counted
    precision: str  # Accelerate's name of the precision of training: "no" or "bf16"


# Entries of plain data, which a weights file has too. An optional one that is missing is read as None.
PLAIN_TYPES = {
    "step": int,
    "config": dict,
    "autoencoder": dict | None,
    "features": str | None,
    "class_names": list | None,
    "weights": str | None,
}
PLAIN_DATA = tuple(PLAIN_TYPES)
AUTOENCODER_KEYS = {"name", "stride", "channels", "shift", "scale", "sha256"}


# ---------------------------------------------------------------------------------------------------- writing


def save_checkpoint(folder: Path, state: Checkpoint, keep: int) -> Path:
    """Write `folder/NNNNNNN.pt`, then remove all but the newest `keep` checkpoints (0 keeps all).

    The name never shows an incomplete file. If writing fails (a full disk), the program ends with one line
    and status 1, and earlier checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Remove what a process left that was killed while it wrote
    for unfinished in folder.glob("*.pt.tmp"):
        unfinished.unlink()
    path = folder / f"{state['step']:07d}.pt"
    try:
        write_file(path, lambda stream: torch.save({"format": FORMAT, **state}, stream))
    except (OSError, RuntimeError) as error:
        exit_unwritten(path, error)
    if keep:
        remove_old(folder, keep)
    return path


def exit_unwritten(path: Path, error: OSError | RuntimeError) -> NoReturn:
    """End the program with the reason why a file of a checkpoint could not be written."""
    # PyTorch's writer hides the system's error behind a RuntimeError
    system = error if isinstance(error, OSError) else error.__context__
    if isinstance(system, OSError) and system.errno is not None:
        reason = os.strerror(system.errno)
    else:
        reason = str(error).splitlines()[0]
    sys.exit(
        f"error: {path} could not be written ({reason}); earlier checkpoints are intact: "
        "free space and run the same command again"
    )


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, unless none of those can be read."""
    checkpoints = list_checkpoints(folder)
    newest = checkpoints[-keep:]
    old = checkpoints[:-keep]
    if old and any(find_damage(path) is None for path in reversed(newest)):
        for path in old:
            path.unlink()


def save_weights(path: Path, state: Checkpoint) -> None:
    """Write the EMA weights of a checkpoint to a `.safetensors` file."""
    weights = {name: tensor.contiguous() for name, tensor in state["ema"].items()}
    # Everything but the weights goes into the metadata, as JSON
    about = {"format": FORMAT, **plain_data(state), "crc32": checksum(weights)}
    content = safetensors.torch.save(weights, {"format": "pt", "checkpoint": json.dumps(about)})
    write_file(path, lambda stream: stream.write(content))


def plain_data(state: Checkpoint) -> dict[str, Any]:
    """The entries of a checkpoint that a weights file has too, without the weights."""
    entries = cast(dict[str, Any], state)
    return {key: entries.get(key) for key in PLAIN_DATA}


# ---------------------------------------------------------------------------------------------------- reading


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a folder, oldest first."""
    checkpoints = [path for path in folder.glob("*.pt") if is_checkpoint_name(path)]
    return sorted(checkpoints, key=lambda path: int(path.stem))


def newest_checkpoint(run: Path) -> Path:
    """The last checkpoint of a run; UserError if its folder has none."""
    checkpoints = list_checkpoints(run / "checkpoints")
    if not checkpoints:
        raise UserError(f"'{run}': has no checkpoint; give the folder of a run of train.py")
    return checkpoints[-1]


def is_checkpoint_name(path: Path) -> bool:
    """Whether a file is named like a checkpoint of a run, by its step: 0400000.pt."""
    return path.suffix == ".pt" and re.fullmatch(r"\d{7,}", path.stem) is not None


def load_checkpoint(path: str | Path, option: str = "--ckpt") -> Checkpoint:
    """Read a checkpoint onto the CPU: its bytes are checked, then memory-mapped. Executes nothing.

    Args:
        path: a checkpoint, a weights file, or a folder with a weights file.
        option: names the path in error messages.

    Raises:
        UserError: missing or damaged file, not a checkpoint, or a checkpoint of another format.
    """
    path = Path(path)
    if (path / WEIGHTS).is_file():
        path = path / WEIGHTS
    if path.suffix == ".safetensors":
        return load_weights(path, option)
    if not path.exists():
        raise UserError(f"{option} '{path}' does not exist; give the path of a checkpoint such as 0400000.pt")
    if path.is_dir():
        refuse_unconverted(path, option)
        raise UserError(f"{option} '{path}' is a folder{newest_in(path)}")

    # Compare all checksums before anything is unpickled
    problem = find_damage(path)
    is_damaged = problem is not None and is_archive(path)
    if problem is None:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a foreign file can make the unpickler raise anything
            problem = unpickling_problem(error)
    if problem is not None:
        if not is_damaged:
            refuse_unconverted(path, option)
        raise UserError(
            f"{option} '{path}' is not a readable checkpoint of this repository ({problem}); give another"
        )

    # Check what was read
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        if not isinstance(content, dict) or "format" not in content:
            refuse_unconverted(path, option)
        raise UserError(
            f"{option} '{path}' is not a checkpoint of this repository (format {FORMAT}); give another"
        )
    return check_content(
        content, ("model", "ema"), f"{option} '{path}' is not a checkpoint of this repository"
    )


def forget_unknown_keys(state: Checkpoint, name: str) -> None:
    """Leave out of the configuration what this code does not know, such as a fork's keys, with one warning."""
    state["config"], unknown = known_part(Config, state["config"])
    if unknown:
        keys = printable(", ".join(unknown))
        group.print_once(f"warning: {name} has keys of another version, which have no effect here: {keys}")


def newest_in(folder: Path) -> str:
    """How a message about a folder ends: with the newest checkpoint in it, if it is that of a run."""
    checkpoints = list_checkpoints(folder / "checkpoints") or list_checkpoints(folder)
    if checkpoints:
        return f" of checkpoints; give one of them, such as '{checkpoints[-1]}'"
    return " without weights; give the path of a checkpoint such as 0400000.pt"


def refuse_unconverted(path: str | Path, option: str) -> None:
    """Raise a UserError with the command to run if a file or folder holds weights that can be converted."""
    hint = conversion_hint(Path(path))
    if hint is None:
        return
    # Converted weights have no optimizer, so they can be the start of a run but not resume one
    is_start = option in ("--output", "--resume", "training.resume_from_ckpt")
    target = " as training.init_from" if is_start else ""
    raise UserError(f"{option} '{path}' {hint}{target}")


def load_weights(path: Path, option: str) -> Checkpoint:
    """Read what `save_weights` wrote, and compare its checksum."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("checkpoint", "null"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # a number format that this version does not know can raise any kind
        raise UserError(
            f"{option} '{path}' is not a readable weights file ({one_line(error)}); give another"
        ) from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        if about is None:
            refuse_unconverted(path, option)
        raise UserError(f"{option} '{path}' is not a weights file of this repository; give another")
    # Files of other writers may lack a checksum
    if about.pop("crc32", None) not in (None, checksum(weights)):
        raise UserError(f"{option} '{path}' is damaged: its weights differ from their checksum; give another")
    content = {**about, "ema": weights}
    return check_content(content, ("ema",), f"{option} '{path}' is not a weights file of this repository")


def has_metadata(path: Path) -> bool:
    """Whether a safetensors file has the plain data that `save_weights` writes."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return "checkpoint" in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False


def chosen_weights(state: Checkpoint, which: str, source: str) -> dict[str, Tensor]:
    """The weights of a checkpoint: "ema", "model", or the name of an average of `training.averages`.

    Args:
        source: how an error message begins.

    Raises:
        UserError: the checkpoint does not have them.
    """
    if which in ("ema", state.get("weights")):
        return state["ema"]
    # A checkpoint that was converted has the EMA as "model", too
    if "optimizer" not in state:
        own = state.get("weights")
        held = f"'{own}'" if own else "EMA"
        raise UserError(
            f"{source} holds the {held} weights only, so --weights {which} has nothing to take; "
            "leave it out, or give the checkpoint that training wrote"
        )
    if which == "model":
        return state["model"]
    averages = state.get("weight_averages", {})
    if which not in averages:
        known = ", ".join(["ema", "model", *averages])
        raise UserError(f"{source} has no average '{which}'; --weights takes one of {known}")
    # An average has the parameters only
    return state["ema"] | averages[which]["weights"]


def find_damage(path: str | Path) -> str | None:
    """Read a checkpoint's bytes once and compare all checksums. Returns what is wrong, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                return "it holds compressed records, which PyTorch does not write"
            changed = archive.testzip()
    except Exception as error:  # zipfile raises a dozen kinds on damaged archives
        return one_line(error)
    return f"{changed!r} differs from its checksum"[:160] if changed else None


def check_content(content: Mapping[str, Any], weights: tuple[str, ...], refusal: str) -> Checkpoint:
    """Check the type of every entry, and fill in None for optional entries that are missing.

    Args:
        weights: entries that must be state dicts.
        refusal: how the error message begins.

    Raises:
        UserError: an entry is missing or has another type.
    """
    state = {**dict.fromkeys(PLAIN_DATA), **content}
    wrong = []
    for key, kind in PLAIN_TYPES.items():
        if not isinstance(state[key], kind) or not is_plain(state[key]):
            wrong.append(key)
    names = state["class_names"]
    if isinstance(names, list) and not all(isinstance(name, str) for name in names):
        wrong.append("class_names")
    for key in weights:
        if not is_state_dict(state.get(key)):
            wrong.append(key)
    if isinstance(state["autoencoder"], dict) and AUTOENCODER_KEYS - state["autoencoder"].keys():
        wrong.append("autoencoder")
    if wrong:
        raise UserError(f"{refusal} (it lacks {', '.join(wrong)}); give another")
    for key in weights:
        problem = precision_problem(state[key])
        if problem:
            raise UserError(f"{refusal} ({printable(problem)}); give another")
    return cast(Checkpoint, state)


def is_plain(value: object) -> bool:
    """Whether this is plain data that does not contain itself."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def tensor_shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a state dict."""
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def shape_difference(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> str | None:
    """The first tensor that two networks do not have with the same shape, with both shapes; None if there is none.

    Args:
        expected: of the configured network.
        found: of the network in a file.
    """
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            own = found.get(name, "missing")
            wanted = expected.get(name, "missing")
            return printable(f"{name} is {own} there and {wanted} in the configured network")
    return None


def non_finite_tensor(weights: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with a value that is not finite, or None."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            return printable(name)
    return None


def network_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in the network that a configuration describes."""
    with torch.device("meta"):
        return tensor_shapes(build_model(config).state_dict())


def checksum(weights: dict[str, Tensor]) -> int:
    """CRC-32 of names and values on the CPU."""
    crc = 0
    for name, tensor in sorted(weights.items()):
        crc = zlib.crc32(name.encode(), crc)
        # The bytes of any type, bfloat16 among them, which NumPy does not know
        content = tensor.contiguous().flatten().view(torch.uint8)
        crc = zlib.crc32(content.numpy().data, crc)
    return crc
