"""Reading the files of a feature store. Nothing that they claim is used before it is checked."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from config import UserError, one_line
from config_keys import COLUMN_NAME
from grid import is_size

FORMAT = 1
STORE_KINDS = ("moments", "sample")
DTYPES = ("float16", "float32")
SHARD_NAME = re.compile(r"shard-[0-9]{5,}\.npy")
MAX_LATENT_SIDE = 2**16

# The entries of a manifest that readers use, beside "image_size", which is one number or two.
MANIFEST_TYPES: dict[str, type] = {
    "format": int,
    "kind": str,
    "views": int,
    "dtype": str,
    "latent_shape": list,
    "count": int,
    "shards": list,
    "unreadable": list,
    "class_names": list,
    "autoencoder": dict,
    "labels_sha256": str,
}
SHARD_TYPES: dict[str, type] = {"file": str, "count": int, "bytes": int, "sha256": str}
COLUMN_TYPES: dict[str, type] = {"dtype": str, "views": int, "shape": list, "bytes": int, "sha256": str}
MAX_COLUMN_SIZE = 2**31  # numbers per image


def item_shape(kind: str, views: int, latent_shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Shape of one image in a shard: (views, C or 2C, h, w)."""
    channels, height, width = latent_shape
    if kind == "moments":
        channels = 2 * channels
    return views, channels, height, width


def load_array(file: Path) -> np.ndarray:
    """A complete .npy file; never unpickles. Raises UserError if it is damaged."""
    try:
        with open(file, "rb") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except Exception as error:  # NumPy raises many kinds on strange headers, MemoryError among them
        raise UserError(f"{file}: cannot be read ({one_line(error)}); extract the features again") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError for anything else."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = f"cannot be read ({one_line(error)})"
        raise UserError(f"{path}: {reason}; remove its folder and extract the features again") from None
    if not isinstance(value, dict):
        reason = "was not written by extract_features.py"
        raise UserError(f"{path}: {reason}; remove its folder and extract the features again")
    return value


def read_manifest(path: Path) -> dict[str, Any]:
    """The checked manifest of a store. Raises UserError if it is damaged or leads out of the folder."""
    manifest = read_json(path)
    if not has_types(manifest, MANIFEST_TYPES) or not is_consistent(manifest):
        raise UserError(f"{path}: is not the manifest of a feature store; extract the features again")
    for shard in manifest["shards"]:
        if not SHARD_NAME.fullmatch(shard["file"]):
            raise UserError(
                f"{path}: names {shard['file']!r}, which is not a shard of this folder; "
                "extract the features again"
            )
    return manifest


def has_types(value: object, types: dict[str, type]) -> bool:
    """Whether `value` is a dictionary with these keys and exactly these types: True is not an int."""
    if not isinstance(value, dict):
        return False
    return all(type(value.get(key)) is expected for key, expected in types.items())


def is_consistent(manifest: dict[str, Any]) -> bool:
    """Whether the entries of a manifest, whose types are right, make sense together."""
    # What is stored
    if manifest["format"] != FORMAT or manifest["kind"] not in STORE_KINDS:
        return False
    if manifest["views"] not in (1, 2) or manifest["dtype"] not in DTYPES:
        return False
    if not all(isinstance(name, str) for name in manifest["class_names"]):
        return False
    if not is_size(manifest.get("image_size")) or len(manifest["latent_shape"]) != 3:
        return False
    for side in manifest["latent_shape"]:
        if type(side) is not int or not 0 < side < MAX_LATENT_SIDE:
            return False

    # How many images there are, and in which shards
    total = 0
    for shard in manifest["shards"]:
        if not has_types(shard, SHARD_TYPES) or shard["count"] < 0 or shard["bytes"] < 0:
            return False
        total += shard["count"]
    return total == manifest["count"] and has_sound_columns(manifest)


def has_sound_columns(manifest: dict[str, Any]) -> bool:
    """Whether the entries about columns, which older manifests lack, have names and shapes that can be."""
    columns = manifest.get("columns", {})
    if not isinstance(columns, dict):
        return False
    for name, entry in columns.items():
        if not re.fullmatch(COLUMN_NAME, name) or not has_types(entry, COLUMN_TYPES):
            return False
        if entry["dtype"] not in DTYPES or entry["views"] not in (1, 2):
            return False
        if not all(type(side) is int and side > 0 for side in entry["shape"]):
            return False
        if math.prod(entry["shape"]) > MAX_COLUMN_SIZE:
            return False
    return True


def column_file(name: str) -> str:
    """Name of the file of a column."""
    return f"column-{name}.npy"


def read_labels(folder: Path, manifest: dict[str, Any]) -> np.ndarray:
    """labels.npy, (n,) int64, checked against the manifest."""
    path = folder / "labels.npy"
    count = manifest["count"]
    labels = load_array(path)
    if labels.dtype != np.int64 or labels.shape != (count,):
        raise UserError(f"{path}: does not hold {count} labels; extract the features again")
    if count and not 0 <= labels.min() <= labels.max() < len(manifest["class_names"]):
        raise UserError(f"{path}: holds labels that are not a class; extract the features again")
    return labels


def sha256_of(file: Path) -> str:
    """Checksum of a file of any size."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()
