"""Training samples as a function of (seed, micro-step, image), for any number of processes.

A micro-step is one forward and backward pass over a global batch. Its images, their order, latents,
timesteps, noise and label dropout follow from the seed and its number, so a resumed run and a run on other
processes see the same batches, and no state of a random generator is ever stored.
"""

import contextlib
import functools
from collections.abc import Generator, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from config import OneProcessError, UserError
from data.features import Features
from data.streams import rng
from data.workers import make_loader as make_worker_loader
from data.workers import read
from diffusion.process import draw_timestep

WORKERS_OPTION = "data.num_workers"


class Sample(NamedTuple):
    """One image of a batch."""

    x0: np.ndarray  # (C, S, S) float32, scaled latent
    noise: np.ndarray  # (C, S, S) float32
    t: int  # timestep
    label: int  # the null label if it was dropped
    image: int  # image number in the feature store
    columns: dict[str, np.ndarray]  # of the feature store


class Batch(NamedTuple):
    """One process's share of a global batch."""

    x0: Tensor  # (B, C, S, S) scaled latents
    noise: Tensor  # (B, C, S, S)
    t: Tensor  # (B,) int64
    labels: Tensor  # (B,) int64, the null label where dropped
    images: Tensor  # (B,) int64, image numbers in the feature store
    # By name, what the columns of the feature store hold of these images, in the view of x0: (B, ...)
    columns: Mapping[str, Tensor] = MappingProxyType({})


@functools.lru_cache(maxsize=1)
def permutation(images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of all images in an epoch."""
    return rng(seed, "order", epoch).permutation(images)


class Order(Sampler):
    """Lists of (micro_step, image) keys, one list per micro-step, for this process.

    Each epoch is a permutation of the images; a last incomplete batch is left out. Process r takes the r-th
    of `world` equal parts of the global batch, so groups of neighbours stay together for any number of
    processes.

    Args:
        images: number of images in the feature store.
        global_batch: images per micro-step over all processes.
        micro_steps: numbers of the micro-steps to list.
    """

    def __init__(self, images: int, global_batch: int, seed: int, micro_steps: range, rank: int, world: int):
        self.images = images
        self.global_batch = global_batch
        self.seed = seed
        self.micro_steps = micro_steps
        local = global_batch // world
        self.part = slice(rank * local, (rank + 1) * local)

    def __len__(self) -> int:
        return len(self.micro_steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for micro_step in self.micro_steps:
            images = self.global_batch_of(micro_step)[self.part].tolist()
            yield [(micro_step, image) for image in images]

    def global_batch_of(self, micro_step: int) -> np.ndarray:
        """Image numbers in a micro-step's batch over all processes."""
        micro_steps_per_epoch = self.images // self.global_batch
        epoch, position = divmod(micro_step, micro_steps_per_epoch)
        start = position * self.global_batch
        return permutation(self.images, self.seed, epoch)[start : start + self.global_batch]


def sample_stream(seed: int, micro_step: int, image: int) -> np.random.Generator:
    """The random numbers of one sample, of which the latent is drawn first."""
    return rng(seed, "train", micro_step, image)


class Samples(Dataset):
    """The training sample for a (micro_step, image) key.

    Args:
        dropout: probability that the label becomes the null label.
        timestep_sampling: a distribution of `diffusion.process.draw_timestep`.
    """

    def __init__(
        self,
        store: Features,
        seed: int,
        diffusion_steps: int,
        dropout: float,
        null_label: int,
        timestep_sampling: str = "uniform",
    ):
        self.store = store
        self.seed = seed
        self.diffusion_steps = diffusion_steps
        self.timestep_sampling = timestep_sampling
        self.dropout = dropout
        self.null_label = null_label

    def __getitem__(self, key: tuple[int, int]) -> Sample | UserError:
        """Draw the sample. Errors are returned: a loader process would turn a raised one into a traceback."""
        try:
            return self.draw(*key)
        except UserError as error:
            return error

    def draw(self, micro_step: int, image: int) -> Sample:
        # One stream per sample, whose draws are always in this order
        stream = sample_stream(self.seed, micro_step, image)
        x0 = self.store.latent(image, stream)
        noise = stream.standard_normal(x0.shape, dtype=np.float32)
        t = draw_timestep(stream, self.diffusion_steps, self.timestep_sampling)
        is_dropped = stream.random() < self.dropout
        label = self.null_label if is_dropped else int(self.store.labels[image])
        columns: dict[str, np.ndarray] = {}
        if self.store.columns:
            columns = self.store.column_values(image, sample_stream(self.seed, micro_step, image))
        return Sample(x0, noise, t, label, image, columns)


def collate(samples: list[Sample | UserError]) -> Batch | UserError:
    """Join samples into a batch, or return the first error among them."""
    drawn = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        drawn.append(sample)
    x0, noise, t, labels, images, columns = zip(*drawn)
    joined = {}
    for name in columns[0]:
        joined[name] = torch.from_numpy(np.stack([values[name] for values in columns]))
    return Batch(
        torch.from_numpy(np.stack(x0)),
        torch.from_numpy(np.stack(noise)),
        torch.tensor(t),
        torch.tensor(labels),
        torch.tensor(images),
        joined,
    )


def make_loader(order: Order, samples: Samples, workers: int, pin_memory: bool) -> DataLoader:
    """A loader that gives a Batch or a UserError per micro-step."""
    return make_worker_loader(samples, order, collate, workers, pin_memory, WORKERS_OPTION)


def read_batches(loader: DataLoader, patience: float | None = None) -> Generator[Batch, None, None]:
    """The batches of a loader, each of which may take `patience` seconds.

    Raises:
        OneProcessError: an image cannot be read, which only the process that needs it can tell.
        NoBatch: a loader process has died, or none gives a batch.
    """
    # Leaving this block, also by an error, ends the loader's processes
    with contextlib.closing(read(loader, WORKERS_OPTION, patience)) as batches:
        for batch in batches:
            if isinstance(batch, UserError):
                raise OneProcessError(str(batch))
            yield batch
