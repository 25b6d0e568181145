"""Images and statistics to evaluate: an ADM `.npz`, a folder of image files, or a reference of `evaluate.py --make-reference`.

Nothing here is ever unpickled: `.npz` members are read as plain arrays, `arr_0` batch by batch.
"""

import contextlib
import hashlib
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from config import UserError
from data.images import UnreadableImage, center_crop, list_images, read_rgb
from evaluation.metrics import Gaussian

READERS = 8  # threads that decode image files
INCEPTION_KEYS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # ADM's
OTHER_KEYS = {
    "features": ("feature_mu", "feature_sigma")
}  # of any other extractor: names that the ADM suite does not take
LARGEST = 2**30  # bytes of labels and statistics; images are read in parts
META = "dcdit_meta"  # our note in a .npz, JSON text


class FolderImages:
    """Image files below a folder, all of one size, or cropped to `image_size` like training images.

    Attributes:
        size: (height, width). labels: (N,) int64 from the class sub-folders, or None where files lie outside of them.
    """

    def __init__(self, folder: Path, image_size: int | None = None):
        self.folder, self.image_size = folder, image_size
        self.paths = list_images(folder)
        if not self.paths:
            raise UserError(f"'{folder}': holds no images")
        self.size = (image_size, image_size) if image_size else self._common_size()
        classes = sorted(
            entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."
        )
        tops = [path.relative_to(folder).parts[0] for path in self.paths]
        self.labels = np.array([classes.index(top) for top in tops]) if set(tops) <= set(classes) else None

    def __len__(self) -> int:
        return len(self.paths)

    def _common_size(self) -> tuple[int, int]:
        with ThreadPoolExecutor(READERS) as readers:
            sizes = list(readers.map(self._header_size, self.paths))
        for path, size in zip(self.paths, sizes):
            if size != sizes[0]:
                raise UserError(
                    f"'{self.folder}': mixes image sizes ({self.paths[0].name} is {sizes[0]}, {path.name} is {size}); "
                    "--make-reference crops a data set to one size"
                )
        return sizes[0][1], sizes[0][0]

    def digest(self) -> str:
        """SHA-256 of names and contents of the files, and of the crop."""
        total = hashlib.sha256(str(self.image_size).encode())
        with ThreadPoolExecutor(READERS) as readers:
            for path, digest in zip(self.paths, readers.map(self._hash_one, self.paths)):
                total.update(os.fsencode(path.relative_to(self.folder)) + b"\0" + digest)
        return total.hexdigest()

    def read(self, index: range | np.ndarray) -> np.ndarray:
        """(n, H, W, 3) uint8."""
        with ThreadPoolExecutor(READERS) as readers:
            return np.stack(list(readers.map(lambda i: self._read_one(self.paths[i]), index)))

    def _read_one(self, path: Path) -> np.ndarray:
        with self._naming(path):
            image = read_rgb(path, str(path))
        return center_crop(image, self.image_size) if self.image_size else np.asarray(image)

    def _header_size(self, path: Path) -> tuple[int, int]:
        """Width and height."""
        with self._naming(path), Image.open(path) as image:
            return image.size

    def _hash_one(self, path: Path) -> bytes:
        with self._naming(path):
            return hash_file(path)

    @contextlib.contextmanager
    def _naming(self, path: Path) -> Iterator[None]:
        """UserError with the path instead of whatever reading it raises; opening a pipe would wait for ever."""
        try:
            if not path.is_file():
                raise UnreadableImage(str(path), "not a regular file, or a link to nothing")
            yield
        except Exception as error:  # Pillow's readers raise nearly every built-in error on damaged files
            reason = (
                error if isinstance(error, UnreadableImage) else f"{path}: {type(error).__name__}: {error}"
            )
            raise UserError(
                f"'{self.folder}': unreadable image {' '.join(str(reason).split())[:300]}; remove it"
            ) from None


class NpzImages:
    """`arr_0` of an ADM `.npz`: (N, H, W, 3) uint8, read forward through one open stream.

    Attributes:
        size: (height, width). labels: (N,) int64, `arr_1` where the file has it.
    """

    def __init__(self, path: Path):
        self.path = path
        # It stays open: compressed, it reads forward only.
        self.stream, shape, dtype, order = open_array(zipfile.ZipFile(path), "arr_0")
        if order == "F":
            raise ValueError("arr_0 is stored column by column")
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise UserError(f"'{path}': arr_0 is {dtype} {shape}, but images are uint8 (N, H, W, 3)")
        self.count, self.size, self.start = shape[0], shape[1:3], self.stream.tell()
        labels = read_array(path, "arr_1")
        self.labels = labels if labels is not None and labels.shape == (self.count,) else None

    def __len__(self) -> int:
        return self.count

    def digest(self) -> str:
        return hash_file(self.path).hex()

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


class Source(NamedTuple):
    """One side of a comparison, as found on disk."""

    path: Path
    images: FolderImages | NpzImages | None
    inception: dict[str, Gaussian]  # stored statistics of ADM's form
    other: dict[str, Gaussian]  # stored statistics of another extractor
    meta: dict  # what --make-reference noted: extractor, images, image_size

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the images, where it is known."""
        if self.images is not None:
            return tuple(self.images.size)
        return (self.meta["image_size"],) * 2 if self.meta else None

    def stored(self, extractor: str) -> dict[str, Gaussian]:
        """Statistics of this kind of extractor."""
        return self.inception if extractor.startswith("inception:") else self.other

    def count(self, extractor: str) -> int | None:
        """Images behind the statistics, where it is known."""
        stored = self.stored(extractor)
        return stored["features"].count if "features" in stored else len(self.images)


def open_source(path: str | Path) -> Source:
    """Open what SAMPLES or REFERENCE names.

    Raises:
        UserError: a missing path, another kind of file, images of several sizes, or arrays of the wrong shape.
    """
    path = Path(path)
    if path.is_dir():
        return Source(path, FolderImages(path), {}, {}, {})
    if not path.exists():
        raise UserError(
            f"'{path}': does not exist; give an ADM .npz, a folder of images or a file of --make-reference"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
        images = NpzImages(path) if "arr_0" in names else None
        meta = read_meta(path) if META in names else {}
        inception, other = (read_statistics(path, names, keys, meta) for keys in (INCEPTION_KEYS, OTHER_KEYS))
    except UserError:
        raise
    except Exception as error:  # there is no end to what parsers raise on damaged files
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"'{path}': is not a readable .npz of plain arrays ({reason}); give images or an ADM .npz"
        ) from None
    if images is None and not inception and not other:
        raise UserError(f"'{path}': holds neither images (arr_0) nor statistics (mu, sigma)")
    return Source(path, images, inception, other, meta)


def read_statistics(path: Path, names: set[str], keys: dict, meta: dict) -> dict[str, Gaussian]:
    """Stored means and covariances, checked for shape."""
    found = {}
    for kind, (mean_key, covariance_key) in keys.items():
        if not {mean_key, covariance_key} <= names:
            continue
        mean, covariance = read_array(path, mean_key), read_array(path, covariance_key)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise UserError(
                f"'{path}': {mean_key} {mean.shape} and {covariance_key} {covariance.shape} do not belong together"
            )
        found[kind] = Gaussian(mean.astype(np.float64), covariance.astype(np.float64), meta.get("images"))
    return found


def read_meta(path: Path) -> dict:
    """What --make-reference noted."""
    meta = json.loads(str(read_array(path, META)))
    kinds = {"extractor": str, "images": int, "image_size": int}
    if not isinstance(meta, dict) or any(not isinstance(meta.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{META} is damaged")
    return meta


def read_array(path: Path, name: str) -> np.ndarray | None:
    """A whole member, or None where the file has none of this name."""
    with zipfile.ZipFile(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            return None
        stream, shape, dtype, order = open_array(archive, name)
        size = math.prod(shape) * dtype.itemsize
        if size > LARGEST:
            raise ValueError(f"{name} claims {size} bytes")
        return np.frombuffer(stream.read(size), dtype).reshape(shape, order=order)


def open_array(archive: zipfile.ZipFile, name: str) -> tuple[IO[bytes], tuple[int, ...], np.dtype, str]:
    """A member, open at its first value, with shape, type and order.

    ValueError unless its header claims as many bytes as there are.
    """
    stream, info = archive.open(f"{name}.npy"), archive.getinfo(f"{name}.npy")
    read = npy.read_array_header_1_0 if npy.read_magic(stream) == (1, 0) else npy.read_array_header_2_0
    shape, fortran_order, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError(f"{name} holds objects")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != info.file_size - stream.tell():
        raise ValueError(f"{name} does not hold the {shape} {dtype} values that its header claims")
    return stream, shape, dtype, "F" if fortran_order else "C"


def hash_file(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.digest()
