"""Sets of images as users name them: a folder of image files, an ADM `.npz`, or a reference batch."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from config import UserError, one_line
from data.folders import list_dataset, readable_formats
from data.images import ImageFolder, UnreadableImage, covering_scale, read_rgb
from data.store_files import sha256_of
from evaluation.adm_npz import (
    INCEPTION_KEYS,
    META,
    OTHER_KEYS,
    NpzImages,
    array_names,
    read_meta,
    read_statistics,
)
from evaluation.class_labels import ClassLabels
from evaluation.metrics import Gaussian
from grid import Grid, Size
from sampling.sample_folder import SETTINGS

READERS = 8  # threads that decode image files
LOSSY_FORMATS = ("JPEG", "MPO", "AVIF")  # as Pillow calls them; WebP is lossy or not


class Header(NamedTuple):
    """What the head of an image file says."""

    size: tuple[int, int]  # (width, height)
    is_lossy: bool


def is_lossy(path: Path, image_format: str | None) -> bool:
    """Whether an image file is lossily compressed."""
    if image_format != "WEBP":
        return image_format in LOSSY_FORMATS
    # The first chunk of pixels is "VP8 ", or "VP8L" without loss
    with open(path, "rb") as stream:
        stream.seek(12)
        while len(head := stream.read(8)) == 8:
            kind = head[:4]
            if kind in (b"VP8 ", b"VP8L"):
                return kind == b"VP8 "
            size = int.from_bytes(head[4:], "little")
            stream.seek(size + size % 2, os.SEEK_CUR)
    return False


class FolderImages:
    """Image files below a folder, all of one size, or cropped to `image_size` as training images are.

    They are the files that training reads, by the same rules (data/folders.py).

    Attributes:
        size: (height, width).
        labels: (N,) int64, or None for the folder of sample_ddp.py.
        class_names: names of the class folders, by label, or None where there are no labels.
        notes: lines that a user should read about the files.

    Args:
        option: what the user calls the folder, for messages.
    """

    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    notes: Sequence[str] = ()

    def __init__(self, folder: Path, image_size: Size | None = None, option: str = "--make-reference"):
        self.folder = folder
        self.crop = None if image_size is None else Grid.of(image_size)
        self.dataset = None if self.crop is None else ImageFolder(folder, self.crop, option)
        listing = list_dataset(folder, option) if self.dataset is None else self.dataset.listing
        self.paths = [folder / path for path in listing.paths]
        # The folder of sample_ddp.py is no class, and the other files in it are known
        if (folder / SETTINGS).is_file():
            self.notes = sample_notes(folder, len(self.paths))
        else:
            self.notes = listing.notes
            self.labels = np.array(listing.labels)
            self.class_names = listing.class_names
        self.size = self.crop or self._common_size()

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def lossy(self) -> int:
        """Number of lossily compressed images; those that a crop has scaled do not count."""
        return sum(
            header.is_lossy and (self.crop is None or covering_scale(header.size, self.crop) == 1)
            for header in self._headers
        )

    def digest(self) -> str:
        """SHA-256 of the names and contents of the files, and of the crop."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        total = hashlib.sha256(str(self.crop and self.crop.plain).encode())
        with ThreadPoolExecutor(READERS) as readers:
            digests = readers.map(self._hash_one, self.paths)
            for path, digest in zip(self.paths, digests):
                name = os.fsencode(path.relative_to(self.folder))
                total.update(name + b"\0" + digest)
        return total.hexdigest()

    def name(self, index: int) -> str:
        """What a message calls an image."""
        return f"'{self.paths[index]}'"

    def read(self, index: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n, H, W, 3) uint8."""
        with ThreadPoolExecutor(READERS) as readers:
            images = list(readers.map(self._read_one, index))
        return np.stack(images)

    def _common_size(self) -> Grid:
        """Rows and columns. UserError where the images differ in size."""
        sizes = [header.size for header in self._headers]
        for path, size in zip(self.paths, sizes):
            if size != sizes[0]:
                example = f"{self.paths[0].name} is {sizes[0]}, {path.name} is {size}"
                raise UserError(
                    f"'{self.folder}': mixes image sizes ({example}); --make-reference crops images to one size"
                )
        width, height = sizes[0]
        return Grid(height, width)

    @functools.cached_property
    def _headers(self) -> list[Header]:
        with ThreadPoolExecutor(READERS) as readers:
            return list(readers.map(self._header, self.paths))

    def _read_one(self, index: int) -> np.ndarray:
        path = self.paths[index]
        with self._naming(path):
            if self.dataset is None:
                return np.asarray(read_rgb(path, str(path)))
            image, _ = self.dataset[index]
            return image

    def _header(self, path: Path) -> Header:
        """What can be said without decoding the image."""
        with self._naming(path), Image.open(path, formats=readable_formats()) as image:
            return Header(image.size, is_lossy(path, image.format))

    def _hash_one(self, path: Path) -> bytes:
        with self._naming(path):
            return bytes.fromhex(sha256_of(path))

    @contextlib.contextmanager
    def _naming(self, path: Path) -> Iterator[None]:
        """Turn any error while reading a file into a UserError with its path."""
        try:
            # Opening a pipe would wait for ever
            if not path.is_file():
                raise UnreadableImage(str(path), "not a regular file, or a link to nothing")
            yield
        except UnreadableImage as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"'{self.folder}': unreadable image {reason}; remove it") from None
        except Exception as error:  # Pillow raises nearly every built-in error on damaged files
            reason = f"{path}: {one_line(error, 300)}"
            raise UserError(f"'{self.folder}': unreadable image {reason}; remove it") from None


def sample_notes(folder: Path, count: int) -> list[str]:
    """A line if a folder of sample_ddp.py has other images than those of its last call."""
    try:
        last = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["images"]
    except (OSError, ValueError, LookupError, TypeError):
        return [f"note: '{folder}': sampling is unfinished; the {count} images so far are compared"]
    if last == count:
        return []
    return [
        f"note: '{folder}': all {count} images are compared; '{folder}.npz' has the {last} of the last call"
    ]


@dataclass(frozen=True, eq=False)
class Source:
    """One side of a comparison, as found on disk."""

    path: Path
    images: FolderImages | NpzImages | None
    inception: dict[str, Gaussian] = field(default_factory=dict)  # stored statistics of Inception features
    other: dict[str, Gaussian] = field(default_factory=dict)  # stored statistics of another extractor
    meta: dict[str, Any] = field(default_factory=dict)  # of --make-reference: extractor, images, image_size

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the images, where it is known."""
        if self.images is not None:
            return self.images.size
        if self.meta:
            return Grid.of(self.meta["image_size"])
        return None

    @property
    def labels(self) -> ClassLabels | None:
        """Class of each image, where it is known."""
        if self.images is None or self.images.labels is None:
            return None
        return ClassLabels(self.images.labels, self.images.class_names)

    @property
    def lossy(self) -> int:
        """Number of lossily compressed images, or of images of a reference that were."""
        return self.meta.get("lossy", 0) or (self.images.lossy if self.images is not None else 0)

    @property
    def notes(self) -> Sequence[str]:
        """Lines that a user should read about the files."""
        return self.images.notes if self.images is not None else ()

    def stored(self, extractor: str) -> dict[str, Gaussian]:
        """Statistics of this kind of extractor, given by its name."""
        return self.inception if extractor.startswith("inception:") else self.other

    def count(self, extractor: str) -> int | None:
        """Images behind the statistics, where it is known."""
        stored = self.stored(extractor)
        if "features" in stored:
            return stored["features"].count
        return len(self.images) if self.images is not None else None


def open_source(path: str | Path, option: str) -> Source:
    """Open what SAMPLES, REFERENCE or another option names.

    Args:
        option: its name, for messages about folders.

    Raises:
        UserError: a missing path, another kind of file, several image sizes, or arrays of the wrong shape.
    """
    path = Path(path)
    if path.is_dir():
        return Source(path, FolderImages(path, option=option))
    if not path.exists():
        raise UserError(
            f"'{path}': does not exist; give an ADM .npz, a folder of images or a file of --make-reference"
        )
    try:
        source = open_npz(path)
    except UserError:
        raise
    except Exception as error:  # there is no end to what parsers raise on damaged files
        reason = one_line(error, 120)
        raise UserError(
            f"'{path}': is not a readable .npz of plain arrays ({reason}); give images or an ADM .npz"
        ) from None
    if source.images is None and not source.inception and not source.other:
        raise UserError(f"'{path}': holds neither images (arr_0) nor statistics (mu, sigma)")
    return source


def open_npz(path: Path) -> Source:
    """Whatever an ADM `.npz` holds."""
    names = array_names(path)
    images = NpzImages(path) if "arr_0" in names else None
    meta = read_meta(path) if META in names else {}
    inception = read_statistics(path, INCEPTION_KEYS, meta.get("images"))
    other = read_statistics(path, OTHER_KEYS, meta.get("images"))
    return Source(path, images, inception, other, meta)
