"""Batches of decoded images. An image that cannot be decoded is named and left out."""

import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from data.images import ImageFolder, SkippedImage, UnreadableImage
from data.source_files import FileState, read_state
from data.workers import make_loader, read
from grid import Grid


class ImageBatch(NamedTuple):
    """Images of one batch, in the order of their indices."""

    indices: list[int]  # of the decoded images
    images: Tensor  # (len(indices), 3, H, W) uint8
    skipped: list[SkippedImage]
    states: list[FileState]  # of all files, skipped ones included


class Decoded(NamedTuple):
    """An image file: its pixels, or why there are none."""

    source_index: int
    content: np.ndarray | SkippedImage  # (H, W, 3) uint8
    state: FileState


class DecodedImages(Dataset):
    """The images of a folder by index."""

    def __init__(self, images: ImageFolder):
        self.images = images

    def __getitem__(self, index: int) -> Decoded:
        # First the state: a file that changes in between is then noticed by the next extraction
        state = read_state(self.images.root / self.images.paths[index])
        try:
            pixels, _ = self.images[index]
        except UnreadableImage as error:
            return Decoded(index, SkippedImage(index, error.path, error.reason), state)
        return Decoded(index, pixels, state)

    def collate(self, items: list[Decoded]) -> ImageBatch:
        indices: list[int] = []
        decoded: list[np.ndarray] = []
        skipped: list[SkippedImage] = []
        for item in items:
            if isinstance(item.content, SkippedImage):
                skipped.append(item.content)
            else:
                indices.append(item.source_index)
                decoded.append(item.content)
        images = stack_images(decoded, self.images.crop)
        return ImageBatch(indices, images, skipped, [item.state for item in items])


def stack_images(images: list[np.ndarray], size: Grid) -> Tensor:
    """A list of n images (H, W, 3) uint8, which may be empty, to one tensor (n, 3, H, W)."""
    pixels = np.empty((len(images), *size, 3), np.uint8)
    for row, image in enumerate(images):
        pixels[row] = image
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def read_shards(
    images: ImageFolder, shards: Iterable[range], batch_size: int, num_workers: int, pin_memory: bool
) -> Iterable[ImageBatch]:
    """Batches of the images in each shard. No batch spans two shards, whichever process reads them.

    Args:
        images: the folder to read from.
        shards: indices of images, shard by shard.
        batch_size: images per batch; the last batch of a shard may be smaller.
        num_workers: reading processes; 0 reads in this process.
        pin_memory: put the images into page-locked memory, for the copy to a GPU.
    """
    batches: list[list[int]] = []
    for shard in shards:
        for start in range(0, len(shard), batch_size):
            batches.append(list(shard[start : start + batch_size]))
    dataset = DecodedImages(images)
    most_workers = min(os.cpu_count() or 1, len(batches) - 1)
    workers = max(0, min(num_workers, most_workers))
    option = "--num-workers"
    loader = make_loader(dataset, batches, dataset.collate, workers, pin_memory, option)
    return read(loader, option)


def read_all(images: ImageFolder) -> tuple[Tensor, Tensor]:
    """All images of a small folder that decode; the others are named on the screen.

    Returns:
        images (N, 3, H, W) uint8 and labels (N,) int64.
    """
    decoded = []
    labels = []
    for index in tqdm(range(len(images)), desc="reading", unit="img"):
        try:
            pixels, label = images[index]
        except UnreadableImage as error:
            tqdm.write(f"skipped {error}")
            continue
        decoded.append(pixels)
        labels.append(label)
    return stack_images(decoded, images.crop).contiguous(), torch.tensor(labels)
