"""Writing feature stores: what is stored, encoding, and files that survive a kill.

data/features.py describes the folder that is written.
"""

import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import OneProcessError, UserError
from data.autoencoder import Autoencoder
from data.features import MAX_OPEN_SHARDS
from data.files import write_file, write_json
from data.folders import Listing
from data.images import ImageFolder, SkippedImage
from data.source_files import (
    FileState,
    SourceChanges,
    SourceFiles,
    compare_sources,
    find_unchanged,
    glance,
    read_sources,
    write_sources,
)
from data.store_files import FORMAT, item_shape, read_json, sha256_of
from data.streams import rng

# The files of a store, and what a kill leaves of them.
STORE_FILE = re.compile(
    r"(shard-\d+|column-[a-z0-9_]+|labels|manifest|settings|sources)\.(npy|npz|json)(\.tmp)?"
)
# Settings that differ after images were added or removed.
SOURCE_SETTINGS = ("source_count", "source_hash", "class_names")
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
    image_size: int | list[int]  # the side of a square, or [height, width]
    latent_shape: tuple[int, int, int]  # (C, h, w)
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
            image_size=images.crop.plain,
            latent_shape=autoencoder.latent_shape(images.crop),
            seed=None if is_moments else options.seed,
            shard_size=options.shard_size or max(1024, least_shard_size),
            source_count=len(images),
            source_hash=images.source_hash(),
            autoencoder=autoencoder.describe(),
            class_names=images.class_names,
        )

    @property
    def item_shape(self) -> tuple[int, int, int, int]:
        """Shape of one image in a shard: (views, C or 2C, h, w)."""
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
        (B, views, C or 2C, h, w) in the store's dtype.

    Raises:
        OneProcessError: a number is not finite in this dtype.
    """
    if settings.kind == "moments":
        features = encode_moments(autoencoder, images, settings.views)
    else:
        features = draw_latents(autoencoder, images, indices, settings)
    array = features.to(getattr(torch, settings.dtype)).cpu().numpy()
    finite = np.isfinite(array.reshape(len(array), -1)).all(1)
    if not finite.all():
        image = indices[int(finite.argmin())]
        where = f"non-finite {settings.dtype} latents of image {image}"
        # Another process may have none
        raise OneProcessError(f"--vae {autoencoder.name}: {where}; try --dtype float32")
    return array


def encode_moments(autoencoder: Autoencoder, images: Tensor, views: int) -> Tensor:
    """Moments of each image and, with two views, of its mirror image: (B, views, 2C, h, w)."""
    moments = [torch.cat(autoencoder.encode(images), dim=1)]
    if views == 2:
        mirrored = images.flip(3)
        moments.append(torch.cat(autoencoder.encode(mirrored), dim=1))
    return torch.stack(moments, dim=1)


def draw_latents(
    autoencoder: Autoencoder, images: Tensor, indices: list[int], settings: StoreSettings
) -> Tensor:
    """One latent of each image or, at random, of its mirror image: (B, 1, C, h, w)."""
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

    def __init__(self, folder: str | os.PathLike, settings: StoreSettings, source: Listing):
        """
        Args:
            folder: of the store; `prepare` makes it.
            settings: of the store.
            source: the images.
        """
        self.folder = Path(folder)
        self.settings = settings
        self.source = source
        self.manifest_path = self.folder / "manifest.json"
        self.settings_path = self.folder / "settings.json"
        self.labels_path = self.folder / "labels.npy"
        self.sources_path = self.folder / "sources.npz"
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
                # The images may have changed: see `find_changes`. Only older complete stores list no files
                can_change = path == self.settings_path or self.sources_path.exists()
                self._compare(read_json(path), ignore=SOURCE_SETTINGS if can_change else ())
                is_store = True
                break
        for name in sorted(os.listdir(self.folder)):
            belongs = STORE_FILE.fullmatch(name) if is_store else name == UNFINISHED_SETTINGS
            if not belongs and not name.startswith("."):
                raise UserError(
                    f"--features-path {self.folder}: holds {name}, which is not part of a feature store; "
                    "choose an empty folder"
                )

    def find_changes(self) -> SourceChanges | None:
        """What has happened to the images of a complete store. None if there is none or it lists no files.

        Raises:
            UserError: most of the images of the store, complete or not, are gone or replaced.
        """
        if not self.manifest_path.exists():
            self._refuse_other_images(self._recorded_sources())
            return None
        stored = read_sources(self.sources_path)
        if stored is None and self.sources_path.exists():
            raise UserError(
                f"--features-path {self.folder}: {self.sources_path.name} is damaged, so nothing says which images "
                "were replaced since; remove the folder to encode all images"
            )
        if stored is None:
            self._compare(read_json(self.manifest_path))
            return None
        return self._refuse_other_images(stored)

    def list_has_changed(self) -> bool:
        """Whether an unfinished store was begun with images of other names or classes than the present ones."""
        if self.manifest_path.exists() or not self.settings_path.exists():
            return False
        return not self._has_present_sources(read_json(self.settings_path))

    def _recorded_sources(self) -> SourceFiles:
        """The images of an unfinished store that have been encoded."""
        names: list[str] = []
        states: list[FileState] = []
        for path in sorted(self.folder.glob("shard-*.json")):
            try:
                record = read_json(path)
                own_names = list(record["names"])
                own_states = [FileState(*state) for state in record["states"]]
            except (UserError, KeyError, TypeError):
                continue  # a damaged record; `prepare` removes it
            names += own_names
            states += own_states
        return SourceFiles(names, states)

    def _refuse_other_images(self, stored: SourceFiles) -> SourceChanges:
        """Compare the images of a store with the present ones. UserError if most are gone or replaced."""
        changes = compare_sources(self.source.root, self.source.paths, stored)
        lost = [*changes.gone, *changes.changed]
        if 2 * len(lost) > len(stored.names):
            raise UserError(
                f"--features-path {self.folder}: holds features of other images than --data-path "
                f"{self.source.root}: {len(lost):,} of its {len(stored.names):,} images are gone or replaced, "
                f"such as {lost[0]!r}; choose another folder, or remove this one to encode all images"
            )
        return changes

    def prepare(self, changes: SourceChanges | None = None) -> list[int] | None:
        """Make the folder ready. Returns the shards to write, or None if the store is complete.

        A complete store becomes an unfinished one that lacks some shards if files are missing or cut off, or
        if images have been added, replaced or removed since. An unfinished one keeps the shards whose images are
        unchanged.

        Args:
            changes: the result of `find_changes`; None: the images are those of the store.
        """
        self.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.manifest_path.exists():
            manifest = read_json(self.manifest_path)
            kept = self._intact_records(manifest, changes)
            if len(kept) == self.shards and self._is_complete(manifest):
                self._remove_records()
                return None
            self._reopen(kept)
            if manifest.get("columns"):
                names = ", ".join(manifest["columns"])
                print(
                    f"{self.folder}: the columns {names} belong to the images as they were; "
                    "add them again with python -m data.columns"
                )
        elif not self.settings_path.exists() or self.list_has_changed():
            write_json(self.settings_path, self.settings.to_json())

        # A shard whose file is damaged, or whose images have changed, is written again
        for shard in range(self.shards):
            path = self._record_path(shard)
            if path.exists() and not self._has_current_record(shard):
                path.unlink()
        return self.missing()

    def write(
        self, shard: int, features: np.ndarray, skipped: list[SkippedImage], states: list[FileState]
    ) -> None:
        """Store one shard.

        Args:
            shard: its number.
            features: (count, views, C or 2C, h, w) of the decoded images, in source order.
            skipped: every other image of the shard.
            states: of the shard's files, skipped ones included.
        """
        file = self._shard_path(shard)
        write_file(file, lambda stream: np.save(stream, features))
        sources = self.sources(shard)
        record = {
            "first": sources.start,
            "stop": sources.stop,
            "count": len(features),
            "unreadable": skipped,
            "names": self._names(shard),
            "states": states,
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
        states: list[FileState] = []
        for shard, record in enumerate(records):
            indices += stored_images(record)
            skipped += record.pop("unreadable")
            del record["names"]
            states += record.pop("states", None) or self._glance_at(shard)

        labels = np.array([self.source.labels[index] for index in indices], dtype=np.int64)
        write_file(self.labels_path, lambda stream: np.save(stream, labels))
        write_sources(self.sources_path, SourceFiles(self.source.paths, states))
        manifest = self.settings.to_json() | {
            "count": len(indices),
            "shards": records,
            "unreadable": skipped,
            "labels_sha256": sha256_of(self.labels_path),
            "sources_sha256": sha256_of(self.sources_path),
        }
        write_json(self.manifest_path, manifest)
        self._remove_records()

    def _shard_path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.npy"

    def _record_path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.json"

    def _glance_at(self, shard: int) -> list[FileState]:
        """The states of a shard's files, for records of older stores, which have none."""
        return [glance(self.source.root / name) for name in self._names(shard)]

    def _names(self, shard: int) -> list[str]:
        """The names of a shard's files."""
        sources = self.sources(shard)
        return self.source.paths[sources.start : sources.stop]

    def _compare(self, stored: dict[str, Any], ignore: Sequence[str] = ()) -> None:
        """Raise UserError naming the first setting in which an existing store differs."""
        for key, wanted in self.settings.to_json().items():
            found = stored.get(key)
            # The same weights may have been loaded from another place.
            if key == "autoencoder" and isinstance(found, dict):
                found = found | {"name": wanted["name"]}
            if found == wanted or key in ignore:
                continue
            difference = f"{key} {shorten(found)}, not {shorten(wanted)}"
            if key in SOURCE_SETTINGS:
                raise UserError(
                    f"--features-path {self.folder}: holds features of other images ({difference}); "
                    "choose another folder, or remove this one to encode all images"
                )
            raise UserError(
                f"--features-path {self.folder}: holds features with {difference}; "
                "choose another folder or the settings of that store"
            )

    def _is_complete(self, manifest: dict[str, Any]) -> bool:
        """Whether a manifest and the files beside the shards are those of the present images."""
        # Older stores have no list of their sources
        files = {self.labels_path: manifest["labels_sha256"]}
        if "sources_sha256" in manifest:
            files[self.sources_path] = manifest["sources_sha256"]
        if not all(path.exists() and sha256_of(path) == checksum for path, checksum in files.items()):
            return False
        return self._has_present_sources(manifest)

    def _has_present_sources(self, stored: dict[str, Any]) -> bool:
        """Whether settings or a manifest are about the present images and classes."""
        wanted = self.settings.to_json()
        return all(stored.get(key) == wanted[key] for key in SOURCE_SETTINGS)

    def _has_current_record(self, shard: int) -> bool:
        """Whether the record of a shard can be read and is that of its file and its present images."""
        try:
            record = read_json(self._record_path(shard))
        except UserError:
            return False
        return self._is_current(shard, record)

    def _intact_records(
        self, manifest: dict[str, Any], changes: SourceChanges | None
    ) -> dict[int, dict[str, Any]]:
        """By shard, the records as before `finish` merged them: of whole files, whose images are unchanged."""
        records = self._records_of_manifest(manifest)
        kept = {}
        for shard, record in enumerate(records[: self.shards]):
            if not self._is_intact(shard, record):
                continue
            images = slice(record["first"], record["stop"])
            if changes is not None:
                if not all(changes.in_place[images]):
                    continue
                record["states"] = changes.states[images]
            record["names"] = self._names(shard)
            kept[shard] = record
        return kept

    def _records_of_manifest(self, manifest: dict[str, Any]) -> list[dict[str, Any]]:
        """One record per shard of the manifest, with its unreadable images."""
        try:
            records = [dict(shard, unreadable=[]) for shard in manifest["shards"]]
            for entry in manifest["unreadable"]:
                shard = entry[0] // self.settings.shard_size
                records[shard]["unreadable"].append(entry)
        except (KeyError, TypeError, ValueError, IndexError):
            raise UserError(
                f"{self.manifest_path}: is not the manifest of a feature store; choose an empty folder"
            ) from None
        return records

    def _is_intact(self, shard: int, record: dict[str, Any]) -> bool:
        """Whether the file of a record exists in full length. `damaged_files` compares checksums."""
        try:
            sources = range(record["first"], record["stop"])
            is_whole = sources == self.sources(shard) and record["count"] == len(stored_images(record))
            return is_whole and self._shard_path(shard).stat().st_size == record["bytes"]
        except (OSError, KeyError, TypeError, IndexError):
            return False

    def _is_current(self, shard: int, record: dict[str, Any]) -> bool:
        """Whether a record's file is intact and its images, if their states are known, are unchanged."""
        names = self._names(shard)
        if not self._is_intact(shard, record) or record.get("names") != names:
            return False
        states = [FileState(*state) for state in record.get("states", [])]
        return all(find_unchanged(self.source.root, names[: len(states)], states))

    def _reopen(self, records: dict[int, dict[str, Any]]) -> None:
        """Turn a complete store into an unfinished one with these records."""
        write_json(self.settings_path, self.settings.to_json())
        for shard in range(self.shards):
            if shard in records:
                write_json(self._record_path(shard), records[shard])
            else:
                self._record_path(shard).unlink(missing_ok=True)
        self.manifest_path.unlink()

    def _remove_records(self) -> None:
        """Remove what only an unfinished store holds, and shards of images that are gone."""
        for path in self.folder.glob("shard-*.json"):
            path.unlink(missing_ok=True)
        present = {self._shard_path(shard) for shard in range(self.shards)}
        for path in set(self.folder.glob("shard-*.npy")) - present:
            path.unlink(missing_ok=True)
        # Last, because `check` accepts records only beside the settings or the manifest.
        self.settings_path.unlink(missing_ok=True)


def stored_shard_size(folder: str | os.PathLike) -> int | None:
    """Images per shard of the store in a folder, complete or not; None if there is none."""
    for name in ("manifest.json", "settings.json"):
        path = Path(folder) / name
        if path.is_file():
            size = read_json(path).get("shard_size")
            return size if type(size) is int and size > 0 else None
    return None


def stored_images(record: dict[str, Any]) -> list[int]:
    """Source indices of the images that a record's shard holds, in order."""
    skipped = {entry[0] for entry in record["unreadable"]}
    return [index for index in range(record["first"], record["stop"]) if index not in skipped]


def shorten(value: object) -> str:
    """A setting in an error message; of a long list or dictionary the beginning is enough."""
    text = str(value)
    return text if len(text) <= 80 else text[:80] + "..."
