"""Reading `.npz` files of the ADM evaluation suite: images `arr_0`, labels `arr_1`, statistics, our own note.

Nothing is ever unpickled and no header is believed. Members are read as plain arrays, `arr_0` batch by batch.
"""

import json
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from numpy.lib import format as npy

from config import UserError
from data.store_files import sha256_of
from evaluation.metrics import Gaussian
from grid import Grid, is_size
from sampling.npz import CLASS_NAMES

LARGEST = 2**30  # bytes of labels or statistics; images are read in parts
META = "dcdit_meta"  # our note in a .npz, as JSON
META_TYPES = {"extractor": str, "images": int}  # and "image_size", one number or two
# Entries that references of earlier versions lack
OPTIONAL_META_TYPES = {"lossy": int, "content": str}

# Kind of features -> names of mean and covariance.
# Those of Inception are ADM's; the ADM suite ignores the others.
StatisticNames = Mapping[str, tuple[str, str]]
INCEPTION_KEYS: StatisticNames = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
OTHER_KEYS: StatisticNames = {"features": ("feature_mu", "feature_sigma")}


class OpenArray(NamedTuple):
    """A member of a `.npz`, open at its first value."""

    stream: IO[bytes]
    shape: tuple[int, ...]
    dtype: np.dtype
    order: Literal["C", "F"]


def open_array(archive: zipfile.ZipFile, name: str) -> OpenArray:
    """Open a member and check its header.

    Raises:
        ValueError: it holds objects, or not as many bytes as its header claims.
    """
    stream = archive.open(f"{name}.npy")
    is_version_1 = npy.read_magic(stream) == (1, 0)
    read_header = npy.read_array_header_1_0 if is_version_1 else npy.read_array_header_2_0
    shape, fortran_order, dtype = read_header(stream)

    # An object array would have to be unpickled
    if dtype.hasobject:
        raise ValueError(f"{name} holds objects")
    # A header may claim terabytes
    claimed = math.prod(shape) * dtype.itemsize
    present = archive.getinfo(f"{name}.npy").file_size - stream.tell()
    if min(shape, default=0) < 0 or claimed != present:
        raise ValueError(f"{name} does not hold the {shape} {dtype} values that its header claims")
    return OpenArray(stream, shape, dtype, "F" if fortran_order else "C")


def array_names(path: Path) -> set[str]:
    """Names of the arrays in a file."""
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
    return {member.removesuffix(".npy") for member in members if member.endswith(".npy")}


def read_array(path: Path, name: str) -> np.ndarray:
    """A whole array.

    Raises:
        ValueError: it is damaged or too large.
    """
    with zipfile.ZipFile(path) as archive:
        array = open_array(archive, name)
        size = math.prod(array.shape) * array.dtype.itemsize
        if size > LARGEST:
            raise ValueError(f"{name} claims {size} bytes")
        data = array.stream.read(size)
    return np.frombuffer(data, array.dtype).reshape(array.shape, order=array.order)


def read_statistics(path: Path, keys: StatisticNames, count: int | None) -> dict[str, Gaussian]:
    """Stored means and covariances by kind of features, checked for shape; `count` images are behind them."""
    names = array_names(path)
    statistics = {}
    for kind, (mean_key, covariance_key) in keys.items():
        if not {mean_key, covariance_key} <= names:
            continue
        mean = read_array(path, mean_key)
        covariance = read_array(path, covariance_key)
        if mean.dtype.kind not in "fiu" or covariance.dtype.kind not in "fiu":
            raise UserError(f"'{path}': {mean_key} and {covariance_key} must be numbers; make the file again")
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            shapes = f"{mean_key} {mean.shape} and {covariance_key} {covariance.shape}"
            raise UserError(f"'{path}': {shapes} do not belong together")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise UserError(f"'{path}': {mean_key} or {covariance_key} is not finite; make the file again")
        statistics[kind] = Gaussian(mean.astype(np.float64), covariance.astype(np.float64), count)
    return statistics


def read_meta(path: Path) -> dict[str, Any]:
    """The note that `evaluate.py --make-reference` left; evaluation/reference.py says what is in it."""
    meta = json.loads(str(read_array(path, META)))
    if not isinstance(meta, dict):
        raise ValueError(f"{META} is damaged")
    wanted = META_TYPES | {key: kind for key, kind in OPTIONAL_META_TYPES.items() if key in meta}
    for key, kind in wanted.items():
        if not isinstance(meta.get(key), kind):
            raise ValueError(f"{META} is damaged")
    if not is_size(meta.get("image_size")):
        raise ValueError(f"{META} is damaged")
    return meta


def parse_class_names(text: str) -> list[str] | None:
    """Names of classes from JSON; None for anything else than a list of text."""
    try:
        names = json.loads(text)
    except ValueError:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return names


class NpzImages:
    """`arr_0` of an ADM `.npz`: (N, H, W, 3) uint8, read forward through one open stream.

    Attributes:
        size: (height, width).
        labels: `arr_1`, (N,) int64, or None where the file has none, or something else under this name.
        class_names: of all classes, by label, or None where the file has none.
    """

    lossy = 0  # unknown; Source.lossy looks into the note of --make-reference
    notes: Sequence[str] = ()

    def __init__(self, path: Path):
        self.path = path
        # The stream stays open, because a compressed one cannot be entered in the middle
        images = open_array(zipfile.ZipFile(path), "arr_0")
        if images.order == "F":
            raise ValueError("arr_0 is stored column by column")
        shape = images.shape
        if images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise UserError(f"'{path}': arr_0 is {images.dtype} {shape}, but images are uint8 (N, H, W, 3)")
        self.stream = images.stream
        self.start = images.stream.tell()
        self.count = shape[0]
        self.size = Grid(shape[1], shape[2])
        self.labels = self._read_labels()
        self.class_names = self._read_class_names()

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        """What a message calls an image."""
        return f"'{self.path}', image {index}"

    def digest(self) -> str:
        """SHA-256 of the file."""
        return sha256_of(self.path)

    def read(self, index: range) -> np.ndarray:
        """(n, H, W, 3) uint8 for consecutive indices."""
        image_bytes = self.size[0] * self.size[1] * 3
        try:
            self.stream.seek(self.start + index.start * image_bytes)
            data = self.stream.read(len(index) * image_bytes)
        except (EOFError, zipfile.BadZipFile, zlib.error):
            data = b""
        if len(data) != len(index) * image_bytes:
            raise UserError(f"'{self.path}': is damaged before image {index.stop}; copy or make it again")
        return np.frombuffer(data, np.uint8).reshape(-1, *self.size, 3)

    def _read_labels(self) -> np.ndarray | None:
        if "arr_1" not in array_names(self.path):
            return None
        labels = read_array(self.path, "arr_1")
        if labels.shape != (self.count,) or labels.dtype.kind not in "iuf":
            return None
        with np.errstate(invalid="ignore"):  # NaN becomes some number, which differs from it
            numbers = labels.astype(np.int64)
        is_class = (numbers == labels) & (numbers >= 0)
        return numbers if is_class.all() else None

    def _read_class_names(self) -> list[str] | None:
        if CLASS_NAMES not in array_names(self.path):
            return None
        return parse_class_names(str(read_array(self.path, CLASS_NAMES)))
