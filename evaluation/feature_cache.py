"""Features of images, kept on disk in chunks.

Each chunk is a file. Processes share the work by writing different chunks, and an interrupted run finds those
that are done. No result depends on the number of processes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from config import OneProcessError, UserError
from data.files import write_file
from evaluation.adm_npz import NpzImages
from evaluation.extractors import Extractor, ExtractorOutput
from evaluation.image_sets import FolderImages
from evaluation.metrics import Gaussian, Moments
from models.ops.precision import tf32
from processes.group import Processes

FORMAT = 1  # of cached features; raise it whenever their meaning changes
CHUNK = 256  # images per file
BATCH = 64  # images per call of the extractor, as in the ADM suite


class FeatureChunks:
    """`folder/NNNNN.npz`: the same arrays in every file, for `size` consecutive images out of `count`."""

    def __init__(self, folder: Path, count: int, size: int):
        self.folder = folder
        self.count = count
        self.ranges = [range(start, min(start + size, count)) for start in range(0, count, size)]

    def path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:05d}.npz"

    def missing(self, processes: Processes) -> list[int]:
        """Chunks that this process has to compute: their file is missing or damaged. Every file is read."""
        missing = []
        for chunk in range(len(self.ranges))[processes.rank :: processes.world]:
            path = self.path(chunk)
            exists = path.is_file()
            if exists and is_whole(path, len(self.ranges[chunk])):
                continue
            if exists:
                print(f"'{path}' is damaged; these features are computed again")
            missing.append(chunk)
        return missing

    def images_in(self, chunks: list[int]) -> int:
        """Number of images in some of the chunks."""
        return sum(len(self.ranges[chunk]) for chunk in chunks)

    def write(self, chunk: int, arrays: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(self.path(chunk), lambda stream: np.savez(stream, **arrays), shared=True)

    def has(self, name: str) -> bool:
        """Whether the chunks hold an array of this name."""
        with np.load(self.path(0), allow_pickle=False) as arrays:
            return name in arrays.files

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """One array, chunk by chunk."""
        for chunk in range(len(self.ranges)):
            with np.load(self.path(chunk), allow_pickle=False) as arrays:
                yield arrays[name]

    def read(self, name: str) -> np.ndarray:
        """One array for all images: (count, ...)."""
        return np.concatenate(list(self.parts(name)))

    def mean(self, name: str) -> float:
        """Mean of an array over all images."""
        return float(self.read(name).mean())

    def gaussian(self, name: str) -> Gaussian:
        """Mean and covariance over all images, with one chunk in memory at a time."""
        parts = self.parts(name)
        first = next(parts)
        moments = Moments(first.shape[1])
        moments.add(first)
        for rows in parts:
            moments.add(rows)
        return moments.gaussian()


def is_whole(path: Path, images: int) -> bool:
    """Whether a file holds finite arrays with a row for each image, among them the features."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                values = arrays[name]
                if len(values) != images or not np.isfinite(values).all():
                    return False
            return "features" in arrays.files
    except Exception:  # NumPy and zipfile raise a dozen kinds on damaged files
        return False


def extract(
    images: FolderImages | NpzImages, extractor: Extractor, cache: Path, processes: Processes
) -> FeatureChunks:
    """Features of all images, in a folder of `cache` named by the content of images and extractor.

    Collective: every process calls it, and returns when all chunks exist.
    """
    # Equal content has an equal folder
    made_of = f"{images.digest()[:32]}-{extractor.name.replace(':', '-')[:48]}"
    if extractor.tf32:
        made_of += "-tf32"
    chunks = FeatureChunks(cache / f"{FORMAT}-{made_of}", len(images), CHUNK)
    missing = chunks.missing(processes)
    with progress_bar(chunks.images_in(missing), "features", processes) as bar:
        for chunk in missing:
            pixels = read_pixels(images, chunks.ranges[chunk])
            outputs = []
            for batch in pixels.split(BATCH):
                outputs.append(run_extractor(extractor, batch))
                bar.update(len(batch))
            arrays = as_arrays(outputs)
            check_finite(arrays, [images.name(index) for index in chunks.ranges[chunk]])
            chunks.write(chunk, arrays)
    # Other processes may still be writing theirs
    if processes.world > 1:
        dist.barrier()
    return chunks


def progress_bar(images: int, title: str, processes: Processes) -> tqdm:
    """A bar of the first process's share of the images."""
    return tqdm(total=images, unit="img", desc=title, disable=processes.rank > 0)


def read_pixels(images: FolderImages | NpzImages, index: range) -> Tensor:
    """(n, 3, H, W) uint8."""
    try:
        pixels = images.read(index)
    except UserError as error:
        # Only the process whose share holds the damaged image knows about it
        raise OneProcessError(str(error)) from None
    return torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).contiguous()


def run_extractor(extractor: Extractor, images: Tensor) -> ExtractorOutput:
    """Features of images (B, 3, H, W) uint8, in full float32 unless TF32 was asked for, which costs digits."""
    with tf32(extractor.tf32):
        return extractor(images.to(extractor.device))


def check_finite(arrays: dict[str, np.ndarray], names: list[str]) -> None:
    """Refuse features that are not finite, naming the first image that has them.

    Raises:
        OneProcessError: only the process whose share holds the image knows about it.
    """
    for values in arrays.values():
        is_finite = np.isfinite(values).reshape(len(values), -1).all(1)
        if not is_finite.all():
            name = names[int(is_finite.argmin())]
            raise OneProcessError(
                f"{name}: its features are not finite; give --features with whole weights, in float32"
            )


def as_arrays(outputs: list[ExtractorOutput]) -> dict[str, np.ndarray]:
    """Outputs for consecutive batches as arrays (n, ...), without those that the extractor does not give."""
    arrays = {}
    for name in ExtractorOutput._fields:
        values = [getattr(output, name) for output in outputs]
        if values[0] is not None:
            arrays[name] = torch.cat(values).cpu().numpy()
    return arrays
