"""Writing feature stores: what is stored, encoding, and files that survive a kill.

data/features.py describes the folder that is written.
"""

import math
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import UserError
from data.autoencoder import Autoencoder
from data.features import MAX_OPEN_SHARDS
from data.files import write_file, write_json
from data.images import ImageFolder, SkippedImage
from data.store_files import FORMAT, item_shape, read_json, sha256_of
from data.streams import rng

# The files of a store, and what a kill leaves of them.
STORE_FILE = re.compile(r"(shard-\d+|labels|manifest|settings)\.(npy|json)(\.tmp)?")
# What a kill can leave before the folder says what it holds.
UNFINISHED_SETTINGS = "settings.json.tmp"


# --------------------------------------------------------------------------------------- what a store holds


@dataclass(frozen=True)
class StoreOptions:
    """What a user chooses of a store."""

    kind: str = "moments"  # or "sample"
    flip: bool = True  # moments: mirror images too; sample: draw flips
    dtype: str = "float16"  # or "float32"
    shard_size: int | None = None  # images per shard; None: 1024, or more to keep to 256 shards
    seed: int = 0  # of noise and flips; moments draw none at extraction


@dataclass(frozen=True)
class StoreSettings:
    """Everything that determines a store: the first part of its manifest."""

    kind: str
    views: int  # 2: the image and its mirror image
    flip: bool
    dtype: str
    image_size: int
    latent_shape: tuple[int, int, int]  # (C, s, s)
    seed: int | None
    shard_size: int
    source_count: int  # images in the source folder, undecodable ones included
    source_hash: str
    autoencoder: dict[str, Any]
    class_names: list[str]

    @classmethod
    def plan(cls, options: StoreOptions, images: ImageFolder, autoencoder: Autoencoder) -> "StoreSettings":
        """The settings of a store of these images. Raises UserError if their size does not fit the stride."""
        is_moments = options.kind == "moments"
        least_shard_size = math.ceil(len(images) / MAX_OPEN_SHARDS)
        return cls(
            kind=options.kind,
            views=2 if is_moments and options.flip else 1,
            flip=options.flip,
            dtype=options.dtype,
            image_size=images.image_size,
            latent_shape=autoencoder.latent_shape(images.image_size),
            seed=None if is_moments else options.seed,
            shard_size=options.shard_size or max(1024, least_shard_size),
            source_count=len(images),
            source_hash=images.source_hash(),
            autoencoder=autoencoder.describe(),
            class_names=images.class_names,
        )

    @property
    def item_shape(self) -> tuple[int, int, int, int]:
        """Shape of one image in a shard: (views, C or 2C, s, s)."""
        return item_shape(self.kind, self.views, self.latent_shape)

    def to_json(self) -> dict[str, Any]:
        """Plain data, equal to what is read back from a file."""
        return {"format": FORMAT, **asdict(self), "latent_shape": list(self.latent_shape)}

    def __str__(self) -> str:
        bytes_per_image = math.prod(self.item_shape) * np.dtype(self.dtype).itemsize
        gigabytes = self.source_count * bytes_per_image / 1e9
        return (
            f"{self.kind} store of {self.source_count:,} x {self.item_shape} {self.dtype}, "
            f"{gigabytes:.2f} GB, {len(self.class_names)} classes, shards of {self.shard_size} images"
        )


# -------------------------------------------------------------------------------------------------- encoding


def encode_images(
    autoencoder: Autoencoder, images: Tensor, indices: list[int], settings: StoreSettings
) -> np.ndarray:
    """Encode images for a store.

    Args:
        autoencoder: that of the settings.
        images: (B, 3, H, W) uint8.
        indices: B source indices, which noise and flips depend on.
        settings: of the store.

    Returns:
        (B, views, C or 2C, s, s) in the store's dtype.

    Raises:
        UserError: a number is not finite in this dtype.
    """
    if settings.kind == "moments":
        features = encode_moments(autoencoder, images, settings.views)
    else:
        features = draw_latents(autoencoder, images, indices, settings)
    array = features.to(getattr(torch, settings.dtype)).cpu().numpy()
    if not np.isfinite(array).all():
        where = f"non-finite {settings.dtype} latents near image {indices[0]}"
        raise UserError(f"--vae {autoencoder.name}: {where}; try --dtype float32")
    return array


def encode_moments(autoencoder: Autoencoder, images: Tensor, views: int) -> Tensor:
    """Moments of each image and, with two views, of its mirror image: (B, views, 2C, s, s)."""
    moments = [torch.cat(autoencoder.encode(images), dim=1)]
    if views == 2:
        mirrored = images.flip(3)
        moments.append(torch.cat(autoencoder.encode(mirrored), dim=1))
    return torch.stack(moments, dim=1)


def draw_latents(
    autoencoder: Autoencoder, images: Tensor, indices: list[int], settings: StoreSettings
) -> Tensor:
    """One latent of each image or, at random, of its mirror image: (B, 1, C, s, s)."""
    assert settings.seed is not None, "only moments are extracted without a seed"
    flips = torch.empty(len(indices), dtype=torch.bool)
    noise = torch.empty(len(indices), *settings.latent_shape)
    for row, index in enumerate(indices):
        generator = rng(settings.seed, "features", index)
        flips[row] = generator.random() < 0.5
        drawn = generator.standard_normal(settings.latent_shape, dtype=np.float32)
        noise[row] = torch.from_numpy(drawn)

    if settings.flip:
        images = torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)
    mean, std = autoencoder.encode(images)
    latents = mean + std * noise.to(mean.device)
    return latents.unsqueeze(1)


# --------------------------------------------------------------------------------------------------- writing


class FeatureWriter:
    """Writes one store, by any number of processes that share a file system.

    One process calls `prepare`; then each process calls `write` for its share of the missing shards, and one
    process calls `finish`. After a kill at any moment, the same calls complete the store.
    """

    def __init__(self, folder: str | os.PathLike, settings: StoreSettings, source_labels: list[int]):
        """
        Args:
            folder: of the store; `prepare` makes it.
            settings: of the store.
            source_labels: class number of every source image.
        """
        self.folder = Path(folder)
        self.settings = settings
        self.source_labels = source_labels
        self.manifest_path = self.folder / "manifest.json"
        self.settings_path = self.folder / "settings.json"
        self.labels_path = self.folder / "labels.npy"
        self.shards = math.ceil(settings.source_count / settings.shard_size)

    def sources(self, shard: int) -> range:
        """Source indices of a shard."""
        start = shard * self.settings.shard_size
        stop = min(start + self.settings.shard_size, self.settings.source_count)
        return range(start, stop)

    def missing(self) -> list[int]:
        """Shards that have no record yet."""
        return [shard for shard in range(self.shards) if not self._record_path(shard).exists()]

    def check(self) -> None:
        """Raise UserError if the folder holds a different store or other files. Writes nothing."""
        if not self.folder.exists():
            return
        is_store = False
        for path in (self.manifest_path, self.settings_path):
            if path.exists():
                self._compare(read_json(path))
                is_store = True
                break
        for name in sorted(os.listdir(self.folder)):
            belongs = STORE_FILE.fullmatch(name) if is_store else name == UNFINISHED_SETTINGS
            if not belongs and not name.startswith("."):
                raise UserError(
                    f"--features-path {self.folder}: holds {name}, which is not part of a feature store; "
                    "choose an empty folder"
                )

    def prepare(self) -> list[int] | None:
        """Make the folder ready. Returns the shards to write, or None if the store is complete.

        If files of a complete store are missing or cut off, the store becomes an unfinished one that lacks
        their shards.
        """
        self.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.manifest_path.exists():
            records = self._records_of_manifest()
            intact = [self._is_intact(shard, record) for shard, record in enumerate(records)]
            if all(intact) and self.labels_path.exists():
                self._remove_records()
                return None
            self._reopen(records)
        elif not self.settings_path.exists():
            write_json(self.settings_path, self.settings.to_json())

        # A shard whose file is damaged is written again
        for shard in range(self.shards):
            path = self._record_path(shard)
            if path.exists() and not self._is_intact(shard, read_json(path)):
                path.unlink()
        return self.missing()

    def write(self, shard: int, features: np.ndarray, skipped: list[SkippedImage]) -> None:
        """Store one shard.

        Args:
            shard: its number.
            features: (count, views, C or 2C, s, s) of the decoded images, in source order.
            skipped: every other image of the shard.
        """
        file = self._shard_path(shard)
        write_file(file, lambda stream: np.save(stream, features))
        sources = self.sources(shard)
        record = {
            "first": sources.start,
            "stop": sources.stop,
            "count": len(features),
            "unreadable": skipped,
            "file": file.name,
            "bytes": file.stat().st_size,
            "sha256": sha256_of(file),
        }
        write_json(self._record_path(shard), record)

    def finish(self) -> None:
        """Wait for the last shard, write the labels and merge the records of all shards into the manifest."""
        # Not a barrier of the process group: other processes may be slow for longer than its timeout.
        while self.missing():
            time.sleep(0.5)
        records = [read_json(self._record_path(shard)) for shard in range(self.shards)]
        indices: list[int] = []
        skipped: list[list] = []
        for record in records:
            indices += stored_images(record)
            skipped += record.pop("unreadable")

        labels = np.array([self.source_labels[index] for index in indices], dtype=np.int64)
        write_file(self.labels_path, lambda stream: np.save(stream, labels))
        manifest = self.settings.to_json() | {
            "count": len(indices),
            "shards": records,
            "unreadable": skipped,
            "labels_sha256": sha256_of(self.labels_path),
        }
        write_json(self.manifest_path, manifest)
        self._remove_records()

    def _shard_path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.npy"

    def _record_path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.json"

    def _compare(self, stored: dict[str, Any]) -> None:
        """Raise UserError naming the first setting in which an existing store differs."""
        for key, wanted in self.settings.to_json().items():
            found = stored.get(key)
            # The same weights may have been loaded from another place.
            if key == "autoencoder" and isinstance(found, dict):
                found = found | {"name": wanted["name"]}
            if found != wanted:
                raise UserError(
                    f"--features-path {self.folder}: holds features with {key} {shorten(found)}, "
                    f"not {shorten(wanted)}; "
                    "choose another folder or the settings of that store"
                )

    def _records_of_manifest(self) -> list[dict[str, Any]]:
        """One record per shard, as before `finish` merged them; empty where the manifest lacks a shard."""
        manifest = read_json(self.manifest_path)
        try:
            records = [dict(shard, unreadable=[]) for shard in manifest["shards"]][: self.shards]
            for entry in manifest["unreadable"]:
                shard = entry[0] // self.settings.shard_size
                records[shard]["unreadable"].append(entry)
        except (KeyError, TypeError, ValueError, IndexError):
            raise UserError(
                f"{self.manifest_path}: is not the manifest of a feature store; choose an empty folder"
            ) from None
        lacking = self.shards - len(records)
        return records + [{}] * lacking

    def _is_intact(self, shard: int, record: dict[str, Any]) -> bool:
        """Whether the file of a record exists in full length. `damaged_files` compares checksums."""
        try:
            sources = range(record["first"], record["stop"])
            is_whole = sources == self.sources(shard) and record["count"] == len(stored_images(record))
            return is_whole and self._shard_path(shard).stat().st_size == record["bytes"]
        except (OSError, KeyError, TypeError, IndexError):
            return False

    def _reopen(self, records: list[dict[str, Any]]) -> None:
        """Turn a complete store into an unfinished one."""
        write_json(self.settings_path, self.settings.to_json())
        for shard, record in enumerate(records):
            write_json(self._record_path(shard), record)
        self.manifest_path.unlink()

    def _remove_records(self) -> None:
        """Remove what only an unfinished store holds."""
        for shard in range(self.shards):
            self._record_path(shard).unlink(missing_ok=True)
        # Last, because `check` accepts records only beside the settings or the manifest.
        self.settings_path.unlink(missing_ok=True)


def stored_images(record: dict[str, Any]) -> list[int]:
    """Source indices of the images that a record's shard holds, in order."""
    skipped = {entry[0] for entry in record["unreadable"]}
    return [index for index in range(record["first"], record["stop"]) if index not in skipped]


def shorten(value: object) -> str:
    """A setting in an error message; of a long list or dictionary the beginning is enough."""
    text = str(value)
    return text if len(text) <= 80 else text[:80] + "..."
