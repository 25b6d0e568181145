"""Writing feature stores (data/features.py describes them): what is asked for, encoding, and kill-safe files."""

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import UserError
from data.features import FORMAT, MAX_OPEN_SHARDS, list_numbered, read_json, sha256_of
from data.files import write_file
from data.streams import rng

KINDS = ("moments", "sample", "official")


def make_settings(
    kind: str, images, autoencoder, *, flip: bool, dtype: str, shard_size: int | None, seed: int
) -> dict:
    """All that determines a store, as plain data: the first part of its manifest.

    Args:
        images: an ImageFolder; autoencoder: an Autoencoder.
        flip: mirror images, too (`moments`), or draw flips (`sample`, `official`).
        shard_size: images per shard; None: 1024, or more where that would make more than 256 shards.
        seed: of noise and flips, which only `sample` and `official` draw at extraction.
    """
    return {
        "format": FORMAT,
        "kind": kind,
        "views": 2 if kind == "moments" and flip else 1,
        "flip": flip,
        "dtype": dtype,
        "image_size": images.image_size,
        "latent_shape": list(autoencoder.latent_shape(images.image_size)),
        "seed": None if kind == "moments" else seed,
        "shard_size": shard_size or max(1024, math.ceil(len(images) / MAX_OPEN_SHARDS)),
        "source_count": len(images),
        "source_hash": images.source_hash(),
        "autoencoder": autoencoder.describe(),
        "class_names": images.class_names,
    }


def encode_images(autoencoder, images: Tensor, indices: list[int], settings: dict) -> np.ndarray:
    """Images (B, 3, H, W) uint8 with their source indices to what a shard holds of them, (B, views, C or 2C, s, s)."""
    if settings["kind"] == "moments":
        views = [images, images.flip(3)][: settings["views"]]
        features = torch.stack([torch.cat(autoencoder.encode(view), dim=1) for view in views], dim=1)
    else:
        generators = [rng(settings["seed"], "features", index) for index in indices]
        mirrored = torch.tensor([generator.random() < 0.5 for generator in generators]).view(-1, 1, 1, 1)
        mean, std = autoencoder.encode(
            torch.where(mirrored, images.flip(3), images) if settings["flip"] else images
        )
        noise = np.stack(
            [generator.standard_normal(mean.shape[1:], dtype=np.float32) for generator in generators]
        )
        features = (mean + std * torch.from_numpy(noise).to(mean.device)).unsqueeze(1)
    array = features.to(getattr(torch, settings["dtype"])).cpu().numpy()
    if not np.isfinite(array).all():
        where = f"non-finite {settings['dtype']} latents near image {indices[0]}"
        raise UserError(f"--vae {autoencoder.name}: {where}; try --dtype float32")
    return array


class FeatureWriter:
    """Writes one store, by any number of processes that share a file system.

    One process calls `prepare`; then each calls `write` for its share of the missing shards; when none is missing any more,
    one process calls `finish`. A kill at any moment leaves a folder from which the same steps go on.
    """

    def __init__(self, folder: str | os.PathLike, settings: dict, source_labels: list[int]):
        self.folder, self.settings, self.source_labels = Path(folder), settings, source_labels
        self.official = settings["kind"] == "official"
        self.prefix = f"imagenet{settings['image_size']}_" if self.official else ""
        self.manifest_path = self.folder / f"{self.prefix}manifest.json"
        self.settings_path = self.folder / f"{self.prefix}settings.json"
        self.official_folders = self.folder / f"{self.prefix}features", self.folder / f"{self.prefix}labels"
        self.shards = math.ceil(settings["source_count"] / settings["shard_size"])

    def check(self) -> None:
        """UserError where the folder holds another store or strange files. Writes nothing."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--features-path {self.folder}: is not a folder; choose another path")
        begun = [path for path in (self.manifest_path, self.settings_path) if path.exists()]
        known = re.compile(rf"{self.prefix}settings\.json\.tmp")
        if begun:
            self._compare(read_json(begun[0]))
            official = rf"{self.prefix}(features|labels|.*\.json(\.tmp)?)"
            known = re.compile(
                official if self.official else r"(shard-\d+|labels|manifest|settings)\.(npy|json)(\.tmp)?"
            )
        for name in sorted(os.listdir(self.folder)) if self.folder.exists() else []:
            other_size = (
                self.official and re.match(r"imagenet\d+_", name) and not name.startswith(self.prefix)
            )
            if name[0] != "." and not known.fullmatch(name) and not other_size:
                raise UserError(
                    f"--features-path {self.folder}: holds {name}, not of this extraction; choose an empty folder"
                )

    def prepare(self) -> list[int] | None:
        """Make the folder ready. Returns the shards to write, or None where the store is complete.

        A complete store of which files are missing or cut off becomes an unfinished one that lacks their shards.
        """
        self.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        present = self._official_names()
        if self.manifest_path.exists():
            records = self._records_of_manifest()
            intact = [self._intact(shard, record, present) for shard, record in enumerate(records)]
            if all(intact) and (self.official or (self.folder / "labels.npy").exists()):
                self._remove_records()
                return None
            write_json(self.settings_path, self.settings)
            for shard, record in enumerate(records):
                write_json(self._record_path(shard), record)
            self.manifest_path.unlink()
        elif not self.settings_path.exists():
            write_json(self.settings_path, self.settings)
        for shard in set(range(self.shards)) - set(self.missing()):
            if not self._intact(shard, read_json(self._record_path(shard)), present):
                self._record_path(shard).unlink()
        return self.missing()

    def missing(self) -> list[int]:
        """Shards that have no record yet."""
        return [shard for shard in range(self.shards) if not self._record_path(shard).exists()]

    def sources(self, shard: int) -> range:
        """Source indices of a shard."""
        size = self.settings["shard_size"]
        return range(shard * size, min((shard + 1) * size, self.settings["source_count"]))

    def write(self, shard: int, features: np.ndarray, unreadable: list[list]) -> None:
        """Store one shard.

        Args:
            features: (count, views, C or 2C, s, s) of the readable images, in source order.
            unreadable: [source index, path, reason] of each other image.
        """
        sources = self.sources(shard)
        record = {
            "first": sources.start,
            "stop": sources.stop,
            "count": len(features),
            "unreadable": unreadable,
        }
        if self.official:
            write_official(self.official_folders, readable(record), features, self.source_labels)
        else:
            file = self._shard_path(shard)
            write_file(file, lambda stream: np.save(stream, features))
            record |= {"file": file.name, "bytes": file.stat().st_size, "sha256": sha256_of(file)}
        write_json(self._record_path(shard), record)

    def finish(self) -> dict:
        """Turn the records into the manifest, and return it."""
        records = [read_json(self._record_path(shard)) for shard in range(self.shards)]
        indices = [index for record in records for index in readable(record)]
        manifest = self.settings | {"count": len(indices), "shards": records}
        manifest["unreadable"] = [entry for record in records for entry in record.pop("unreadable")]
        if self.official:
            if self._official_names() != set(indices):
                raise UserError(
                    f"--features-path {self.folder}: its files were changed meanwhile; run the same command again"
                )
        else:
            labels = np.array([self.source_labels[index] for index in indices], dtype=np.int64)
            write_file(self.folder / "labels.npy", lambda stream: np.save(stream, labels))
            manifest["labels_sha256"] = sha256_of(self.folder / "labels.npy")
        write_json(self.manifest_path, manifest)
        self._remove_records()
        return manifest

    def _shard_path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.npy"

    def _record_path(self, shard: int) -> Path:
        return self.folder / f"{self.prefix}shard-{shard:05d}.json"

    def _official_names(self) -> set[int]:
        """Numbers that have both a feature and a label file."""
        existing = [
            set(list_numbered(folder)) if folder.exists() else set() for folder in self.official_folders
        ]
        return existing[0] & existing[1]

    def _compare(self, other: dict) -> None:
        """UserError naming the first setting in which an existing store differs."""
        for key, wanted in self.settings.items():
            found = other.get(key)
            if key == "autoencoder" and isinstance(found, dict):  # where it was loaded from does not matter
                found = found | {"name": wanted["name"]}
            if found != wanted:
                raise UserError(
                    f"--features-path {self.folder}: holds features with {key} {shorten(found)}, not {shorten(wanted)}; "
                    "choose another folder or the settings of that store"
                )

    def _records_of_manifest(self) -> list[dict]:
        """What the records held before `finish` merged them."""
        manifest = read_json(self.manifest_path)
        try:
            records = [dict(shard, unreadable=[]) for shard in manifest["shards"]][: self.shards]
            for entry in manifest["unreadable"]:
                records[entry[0] // self.settings["shard_size"]]["unreadable"].append(entry)
        except (KeyError, TypeError, ValueError, IndexError):
            raise UserError(
                f"{self.manifest_path}: is not the manifest of a feature store; choose an empty folder"
            ) from None
        return records + [{}] * (self.shards - len(records))

    def _intact(self, shard: int, record: dict, present: set[int]) -> bool:
        """Whether the files of a record exist in full length (their checksums are `damaged_files`'s business)."""
        try:
            if range(record["first"], record["stop"]) != self.sources(shard) or record["count"] != len(
                readable(record)
            ):
                return False
            file = self._shard_path(shard)
            return (
                present.issuperset(readable(record))
                if self.official
                else file.stat().st_size == record["bytes"]
            )
        except (OSError, KeyError, TypeError, IndexError):
            return False

    def _remove_records(self) -> None:
        for shard in range(self.shards):
            self._record_path(shard).unlink(missing_ok=True)
        self.settings_path.unlink(missing_ok=True)  # last: without it the records would be strangers


def shorten(value) -> str:
    """A setting in an error message; of a long list or dictionary the beginning is enough."""
    text = str(value)
    return text if len(text) <= 80 else text[:80] + "..."


def readable(record: dict) -> list[int]:
    """Source indices of a record's images, without the unreadable ones."""
    return sorted(set(range(record["first"], record["stop"])) - {entry[0] for entry in record["unreadable"]})


def write_official(
    folders: tuple[Path, Path], indices: list[int], latents: np.ndarray, source_labels: list[int]
) -> None:
    """One file of latents (1, C, s, s) float32 and one of labels (1,) int64 per image, named after its source index."""
    for folder in folders:
        folder.mkdir(exist_ok=True)
    for index, latent in zip(indices, latents, strict=True):
        np.save(folders[0] / f"{index}.npy", latent)
        np.save(folders[1] / f"{index}.npy", np.array([source_labels[index]], dtype=np.int64))
    os.sync()  # a record that follows must not outlive these files in a power cut; one fsync per file would take hours


def write_json(path: Path, value: dict) -> None:
    write_file(path, lambda stream: stream.write((json.dumps(value, indent=1) + "\n").encode()))
