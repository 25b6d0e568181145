"""Training samples as a function of (seed, micro-step, image), for any number of processes.

A micro-step is one forward and backward pass over a global batch. Its images, their order, latents, timesteps, noise and label
dropout follow from the seed and its number, so a resumed run or one on other processes sees the same batches and nothing
about randomness is ever stored.
"""

import functools
import multiprocessing
import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from config import OneProcessError, UserError
from data.features import FeatureStore
from data.streams import rng


class Batch(NamedTuple):
    """One process's share of a global batch."""

    x0: Tensor  # (B, C, S, S) scaled latents
    noise: Tensor  # (B, C, S, S)
    t: Tensor  # (B,) int64
    labels: Tensor  # (B,) int64, the null label where dropped
    index: Tensor  # (B,) int64, image numbers in the feature store


@functools.lru_cache(maxsize=1)
def permutation(images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of all images in an epoch."""
    return rng(seed, "order", epoch).permutation(images)


class Order(Sampler):
    """Lists of (micro_step, image) keys, one list per micro-step, for this process.

    Each epoch is a permutation of the images; a last incomplete batch is left out. Process r takes the r-th of `world` equal
    parts of the global batch, so groups of neighbours stay together for any number of processes.
    """

    def __init__(
        self, images: int, global_batch: int, seed: int, first: int, last: int, rank: int, world: int
    ):
        self.images, self.global_batch, self.seed = images, global_batch, seed
        self.micro_steps = range(first, last)
        local = global_batch // world
        self.part = slice(rank * local, (rank + 1) * local)

    def __len__(self) -> int:
        return len(self.micro_steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for micro_step in self.micro_steps:
            yield [(micro_step, image) for image in self.global_batch_of(micro_step)[self.part].tolist()]

    def global_batch_of(self, micro_step: int) -> np.ndarray:
        """Image numbers of a micro-step's batch over all processes."""
        epoch, position = divmod(micro_step, self.images // self.global_batch)
        return permutation(self.images, self.seed, epoch)[position * self.global_batch :][: self.global_batch]


class Samples(Dataset):
    """A training sample for a (micro_step, image) key."""

    def __init__(self, store: FeatureStore, seed: int, diffusion_steps: int, dropout: float, null_label: int):
        self.store, self.seed, self.diffusion_steps = store, seed, diffusion_steps
        self.dropout, self.null_label = dropout, null_label

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, int, int, int]:
        micro_step, image = key
        draw = rng(self.seed, "train", micro_step, image)
        x0 = self.store.latent(image, draw)
        noise = draw.standard_normal(x0.shape, dtype=np.float32)
        t = int(draw.integers(self.diffusion_steps))
        dropped = draw.random() < self.dropout
        return x0, noise, t, self.null_label if dropped else int(self.store.labels[image]), image


def collate(samples: list[tuple]) -> Batch:
    x0, noise, *numbers = zip(*samples)
    return Batch(*(torch.from_numpy(np.stack(x)) for x in (x0, noise)), *(torch.tensor(x) for x in numbers))


def leave_signals(worker: int) -> None:
    """A signal to the whole process group must not end a worker while the training process writes its last checkpoint."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def make_loader(order: Order, samples: Samples, workers: int, pin_memory: bool) -> DataLoader:
    """A loader of one Batch per micro-step."""
    return DataLoader(
        samples,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals,
    )


def next_batch(batches: Iterator[Batch]) -> Batch:
    """The next batch; what is wrong with its images only the process that reads them can say."""
    try:
        return next(batches)
    except UserError as error:  # from a loader process it comes as the last line of a traceback
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for (
            worker
        ) in multiprocessing.active_children():  # at the end of the program it would wait for them in vain
            worker.kill()
        name = f"{UserError.__module__}.{UserError.__name__}: "
        raise OneProcessError(str(error).splitlines()[-1].removeprefix(name)) from None
