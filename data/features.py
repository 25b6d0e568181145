"""The feature store: latents of a complete data set on disk, read at random through memory maps.

A store is a folder:

    manifest.json          written last and atomically: the store is complete as soon as it is there
    labels.npy             (n,) int64
    sources.npz            names, sizes, times and checksums of the image files (data/source_files.py)
    shard-00000.npy ...    (count, views, channels, h, w) each
    column-NAME.npy ...    (n, 1 or views, ...) each, of any shape per image (data/columns.py adds them)

While an extraction is unfinished, the folder has no manifest; it holds settings.json (what is extracted) and
one record shard-00000.json per finished shard instead.

There are two kinds. `moments` holds posterior mean and standard deviation (2C channels), from which every use draws
a fresh latent. It has two views: the image and its mirror image, which is encoded too, because an autoencoder is
not exactly flip-equivariant. `sample` holds one latent (C channels) drawn at extraction, flipped at random, as the
paper's code does. All latents are in scaled units (see data/autoencoder.py).

Shard k holds the images k * shard_size ... of the source order, whichever process writes it. A store
therefore does not depend on the number of processes, and an interrupted extraction repeats unfinished shards
only.

data/feature_writer.py writes stores. `open_features` also opens the official layout
(data/official_layout.py). `python -m data.features --verify PATH` compares a store with its checksums.
"""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import cli
from config import UserError, one_line
from data.official_layout import OfficialStore
from data.source_files import read_sources
from data.store_files import column_file, item_shape, read_labels, read_manifest, sha256_of
from grid import Grid, Size

# Every open memory map holds a file handle, and 1024 is a common limit per process.
MAX_OPEN_SHARDS = 256


def open_features(path: str | os.PathLike, image_size: Size, columns: Sequence[str] = ()) -> "Features":
    """Open a store or a folder of the official layout.

    Args:
        columns: those to read, which are then a part of the fingerprint.

    Raises:
        UserError: there is neither, or it lacks a column.
    """
    folder = Path(path)
    image = Grid.of(image_size)
    remedy = f"make features with extract_features.py --features-path {path}"
    if (folder / "manifest.json").is_file():
        return FeatureStore(folder, image, columns)
    if (folder / "settings.json").is_file():
        raise UserError(
            f"data.feature_path: {path} is an unfinished extraction; "
            "run its extract_features.py command again"
        )
    if (folder / f"imagenet{image.plain}_features").is_dir():
        if columns:
            raise UserError(
                f"data.feature_path: {path} has the official layout, which has no columns such as {columns[0]}; "
                f"{remedy}"
            )
        return OfficialStore(folder, image.rows)
    if not folder.is_dir():
        raise UserError(f"data.feature_path: {path} is not a folder; {remedy}")
    if not image.is_square and any(folder.glob("imagenet*_features")):
        raise UserError(
            f"data.image_size: {image.plain} is no square, which the official layout of {path} does not have; "
            "give one number, or make features with extract_features.py"
        )
    option = str(image.plain).strip("[]").replace(",", "")
    raise UserError(
        f"data.feature_path: {path} holds no {image.plain}-pixel features; {remedy} --image-size {option}"
    )


class FeatureStore:
    """A complete store. Picklable and cheap to open; each process maps a shard when it first reads from it.

    Attributes:
        manifest: the checked manifest.
        kind: "moments" or "sample".
        image: rows and columns of the images' pixels.
        latent_shape: (C, h, w).
        labels: (n,) int64.
        columns: by name, the shape per image of every column that was opened.
        class_names: one per class number.
        autoencoder: `Autoencoder.describe()` of the autoencoder that encoded the images.
    """

    def __init__(self, folder: Path, image: Grid, columns: Sequence[str] = ()):
        self.folder = Path(folder).absolute()
        self.manifest = read_manifest(self.folder / "manifest.json")
        self.kind: str = self.manifest["kind"]
        self.image = Grid.of(self.manifest["image_size"])
        self.latent_shape: tuple[int, ...] = tuple(self.manifest["latent_shape"])
        self.class_names: list[str] = self.manifest["class_names"]
        self.autoencoder: dict[str, Any] = self.manifest["autoencoder"]
        self._check_size(image)

        self.labels = read_labels(self.folder, self.manifest)
        self._check_files()

        # Shard k holds the images _first[k] ... _first[k + 1] - 1.
        counts = [shard["count"] for shard in self.manifest["shards"]]
        self._first = np.cumsum([0, *counts])
        self._maps: dict[int, np.ndarray] = {}
        self.columns: dict[str, tuple[int, ...]] = {}
        self._columns: dict[str, np.ndarray] = {}
        for name in columns:
            self.columns[name] = tuple(self._column_entry(name)["shape"])
            self._open_column(name)  # a file that cannot be read ends the program here

    def _check_size(self, image: Grid) -> None:
        if self.image != image:
            raise UserError(
                f"data.image_size: {image.plain}, but {self.folder} holds features of size {self.image.plain}"
            )

    def _check_files(self) -> None:
        if not len(self.labels):
            raise UserError(
                f"data.feature_path: {self.folder} holds no image; extract features from readable images"
            )
        for shard in self.manifest["shards"]:
            file = self.folder / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise UserError(
                    f"data.feature_path: {file} is missing or cut off; "
                    "run the extract_features.py command again"
                )

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        # A pickled map would be a copy of the data.
        return self.__dict__ | {"_maps": {}, "_columns": {}}

    def latent(self, index: int, generator: np.random.Generator) -> np.ndarray:
        """Latent (C, h, w) float32 of one image. From moments, view and noise are drawn with `generator`."""
        views = self._views(index)
        if self.kind == "sample":
            return views[0].astype(np.float32)

        view = views[generator.integers(len(views))]
        mean, std = np.split(view.astype(np.float32), 2)
        noise = generator.standard_normal(mean.shape, dtype=np.float32)
        return mean + std * noise

    def column_values(self, index: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
        """What the opened columns hold of one image, by name.

        Args:
            generator: one that gives the same numbers as that of `latent`, whose view is then the same.
        """
        view = 0
        if self.kind == "moments":
            view = int(generator.integers(self.manifest["views"]))
        values = {}
        for name in self.columns:
            views = self._column(name)[index]  # (1 or views, ...)
            values[name] = np.array(views[view % len(views)])
        return values

    def column(self, name: str) -> np.ndarray:
        """The memory map of an opened column without its mirror images: (n, ...)."""
        return self._column(name)[:, 0]

    def is_finite(self, index: int) -> bool:
        """Whether all stored numbers of one image are finite."""
        return bool(np.isfinite(self._views(index)).all())

    def shard_file(self, index: int) -> str:
        """Name of the file that holds an image."""
        return self.manifest["shards"][self._shard_of(index)]["file"]

    def describe(self, index: int) -> str:
        """An image for messages: its number in the store and the name of its file, if the store lists files."""
        return f"image {index} ({self.file_names[index]!r})" if self.file_names else f"image {index}"

    @functools.cached_property
    def file_names(self) -> list[str]:
        """Names of the image files by number in the store; empty for older stores."""
        sources = read_sources(self.folder / "sources.npz")
        if sources is None:
            return []
        skipped = {entry[0] for entry in self.manifest["unreadable"]}
        names = [name for index, name in enumerate(sources.names) if index not in skipped]
        return names if len(names) == len(self) else []

    def fingerprint(self) -> str:
        """Hash of the content: equal stores train equally."""
        content = [self.manifest[key] for key in ("kind", "image_size", "labels_sha256")]
        content += [shard["sha256"] for shard in self.manifest["shards"]]
        content += [[name, self._column_entry(name)["sha256"]] for name in self.columns]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _shard_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} latents")
        return int(np.searchsorted(self._first, index, side="right")) - 1

    def _views(self, index: int) -> np.ndarray:
        """What is stored of an image, (views, C or 2C, h, w)."""
        shard = self._shard_of(index)
        return self._map(shard)[index - self._first[shard]]

    def _map(self, shard: int) -> np.ndarray:
        """The memory map of a shard, (count, views, C or 2C, h, w)."""
        if shard not in self._maps:
            if len(self._maps) >= MAX_OPEN_SHARDS:
                oldest = next(iter(self._maps))
                del self._maps[oldest]
            self._maps[shard] = self._open_map(shard)
        return self._maps[shard]

    def _open_map(self, shard: int) -> np.ndarray:
        """Map the file of a shard. Raises UserError unless it holds what the manifest says."""
        entry = self.manifest["shards"][shard]
        file = self.folder / entry["file"]
        try:
            array = np.lib.format.open_memmap(file, mode="r")
        except Exception as error:  # NumPy and mmap raise many kinds on strange headers
            reason = one_line(error)
            raise UserError(
                f"{file}: cannot be read ({reason}); see python -m data.features --verify"
            ) from None
        shape = item_shape(self.kind, self.manifest["views"], self.latent_shape)
        if array.shape != (entry["count"], *shape) or array.dtype != self.manifest["dtype"]:
            raise UserError(
                f"data.feature_path: {file} is {array.dtype} {array.shape}, which contradicts the manifest"
            )
        return array

    def _column_entry(self, name: str) -> dict[str, Any]:
        """The entry of a column in the manifest."""
        columns = self.manifest.get("columns", {})
        if name not in columns:
            known = f"has {', '.join(columns)}" if columns else "has none"
            raise UserError(
                f"data.feature_path: {self.folder} has no column {name} (it {known}); "
                f"add it with python -m data.columns {self.folder} {name} FILE.npy"
            )
        return columns[name]

    def _column(self, name: str) -> np.ndarray:
        """The memory map of a column, (n, 1 or views, ...)."""
        if name not in self._columns:
            self._columns[name] = self._open_column(name)
        return self._columns[name]

    def _open_column(self, name: str) -> np.ndarray:
        """Map the file of a column. Raises UserError unless it holds what the manifest says."""
        entry = self._column_entry(name)
        file = self.folder / column_file(name)
        try:
            array = np.lib.format.open_memmap(file, mode="r")
        except Exception as error:  # as for shards
            raise UserError(
                f"{file}: cannot be read ({one_line(error)}); add it again with python -m data.columns"
            ) from None
        if array.shape != (len(self), entry["views"], *entry["shape"]) or array.dtype != entry["dtype"]:
            raise UserError(
                f"{file}: is {array.dtype} {array.shape}, which contradicts the manifest; "
                "add it again with python -m data.columns"
            )
        return array


# What `open_features` returns.
Features = FeatureStore | OfficialStore


def damaged_files(folder: Path) -> list[str]:
    """One line per file of a store that is missing or differs from its checksum."""
    manifest = read_manifest(folder / "manifest.json")
    checksums = {shard["file"]: shard["sha256"] for shard in manifest["shards"]}
    checksums["labels.npy"] = manifest["labels_sha256"]
    if "sources_sha256" in manifest:  # not in older stores
        checksums["sources.npz"] = manifest["sources_sha256"]
    for name, entry in manifest.get("columns", {}).items():
        checksums[column_file(name)] = entry["sha256"]
    lines = []
    for name, expected in checksums.items():
        if not (folder / name).is_file():
            lines.append(f"{name}: missing")
        elif sha256_of(folder / name) != expected:
            lines.append(f"{name}: differs from its checksum")
    return lines


def non_finite_images(folder: Path) -> list[str]:
    """One line per image of a store, whose files are whole, with a NaN or an infinity in its features."""
    image_size = read_manifest(folder / "manifest.json")["image_size"]
    store = FeatureStore(folder, Grid.of(image_size))
    lines = []
    for index in range(len(store)):
        if not store.is_finite(index):
            lines.append(f"{store.shard_file(index)}: {store.describe(index)} is not finite")
    return lines


def main() -> None:
    parser = cli.Parser(
        "Compare a feature store with its checksums, and look for numbers that are not finite."
    )
    verify_help = "a feature store (the official layout has no checksums)"
    parser.add_argument("--verify", required=True, metavar="PATH", help=verify_help)
    folder = Path(parser.parse_args().verify)
    if not folder.is_dir():
        raise UserError(f"--verify '{folder}': does not exist; give the folder of extract_features.py")
    lines = damaged_files(folder)
    if not lines:
        lines = non_finite_images(folder)
    if not lines:
        print(f"{folder}: every checksum is right, and all numbers are finite")
        return
    print("\n".join(lines))
    remedy = "delete the files named above and run the same extract_features.py command again"
    if all(line.startswith("column-") for line in lines):
        remedy = "add the columns named above again with python -m data.columns"
    sys.exit(f"{folder}: {remedy}")


if __name__ == "__main__":
    cli.run(main)
