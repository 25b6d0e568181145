"""Reading latents out of feature stores."""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.meters import medians
from benchmarks.report import Row
from benchmarks.workload import Setup
from data.feature_writer import FeatureWriter, StoreSettings
from data.features import Features, open_features
from data.folders import Listing

KINDS = ("moments", "sample", "official")
LATENT_SHAPE = (4, 32, 32)


def measure_loading(images: int, setup: Setup) -> list[Row]:
    """Latents per second out of each kind of store, read at random, with the page cache cold and warm."""
    return [measure_store(kind, images, setup.seconds / len(KINDS)) for kind in KINDS]


def measure_store(kind: str, images: int, seconds: float) -> Row:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = make_store(folder, kind, images)
        generator = np.random.default_rng(0)
        order = generator.permutation(images)

        def read() -> None:
            for index in order:
                store.latent(int(index), generator)

        # Cold; not measured, 0 images/s, where the cache cannot be emptied
        cold = float("inf")
        if empty_page_cache(folder):
            start = time.perf_counter()
            read()
            cold = time.perf_counter() - start

        warm = medians({kind: read}, torch.device("cpu"), seconds)[kind]
    return {"store": kind, "cold images/s": images / cold, "warm images/s": images / warm}


def make_store(folder: Path, kind: str, images: int) -> Features:
    """A store of random latents."""
    generator = np.random.default_rng(0)
    if kind == "official":
        write_official(folder, images, generator)
        return open_features(folder, 256)
    settings = StoreSettings(
        kind=kind,
        views=2 if kind == "moments" else 1,
        flip=True,
        dtype="float32",
        image_size=256,
        latent_shape=LATENT_SHAPE,
        seed=0,
        shard_size=1024,
        source_count=images,
        source_hash="",
        autoencoder={},
        class_names=["one"],
    )
    names = [f"{index}.png" for index in range(images)]
    writer = FeatureWriter(folder, settings, Listing(folder, ["one"], names, [0] * images, []))
    for shard in writer.prepare() or []:
        shape = (len(writer.sources(shard)), *settings.item_shape)
        writer.write(shard, generator.standard_normal(shape, dtype=np.float32), [], [])
    writer.finish()
    return open_features(folder, 256)


def write_official(folder: Path, images: int, generator: np.random.Generator) -> None:
    """The official layout: a file of latents and a file of labels per image."""
    features = folder / "imagenet256_features"
    labels = folder / "imagenet256_labels"
    features.mkdir()
    labels.mkdir()
    for index in range(images):
        latent = generator.standard_normal((1, *LATENT_SHAPE), dtype=np.float32)
        np.save(features / f"{index}.npy", latent)
        np.save(labels / f"{index}.npy", np.zeros(1, np.int64))


def empty_page_cache(folder: Path) -> bool:
    """Ask the operating system to drop the files from its cache. False if it cannot, as on macOS."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in folder.rglob("*.npy"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return True
