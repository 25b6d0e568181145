"""The feature store: latents of a whole data set on disk, read at random through memory maps.

A store is a folder:

    manifest.json       written last and atomically: its presence means that the store is complete
    labels.npy          (n,) int64
    shard-00000.npy ... (count, views, channels, s, s) each
    settings.json, shard-00000.json ...    only while unfinished: what was asked for, and one record per finished shard

Kinds: `moments` holds posterior mean and standard deviation (2C channels) of the image and, in a second view, of its mirror
image, which is really encoded because an autoencoder is not exactly flip-equivariant; a fresh latent is drawn at every use.
`sample` holds one latent (C channels) drawn at extraction, flipped at random, as the paper's code does. `official` is that
code's layout, one file per image: `imagenet256_features/12.npy` (1, C, s, s) float32 and `imagenet256_labels/12.npy` (1,);
where this code writes it, `imagenet256_manifest.json` lies beside them (and settings and records while unfinished).
All latents are in scaled units (see data/autoencoder.py).

Shard k holds the images k * shard_size ... of the source order, whichever process writes it, so a store does not depend on the
number of processes, and an interrupted extraction repeats unfinished shards only. data/feature_writer.py writes stores.

`python -m data.features --verify PATH` compares a store with its checksums.
"""

import functools
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import numpy as np

import cli
from config import UserError

FORMAT = 1
STORE_KINDS = ("moments", "sample")
SHARD_NAME = re.compile(r"shard-[0-9]{5,}\.npy")
MANIFEST_TYPES = {
    "image_size": int,
    "class_names": list,
    "unreadable": list,
    "autoencoder": dict,
    "labels_sha256": str,
}
MAX_OPEN_SHARDS = 256  # every open memory map holds a file handle, and 1024 is a common limit per process


def open_features(path: str | os.PathLike, image_size: int) -> "FeatureStore | OfficialStore":
    """Open a store or a folder of the official layout; UserError naming `data.feature_path` where that is impossible."""
    folder = Path(path)
    remedy = f"make features with extract_features.py --features-path {path}"
    if (folder / "manifest.json").is_file():
        return FeatureStore(folder, image_size)
    if (folder / f"imagenet{image_size}_settings.json").is_file() or (folder / "settings.json").is_file():
        raise UserError(
            f"data.feature_path: {path} is an unfinished extraction; run its extract_features.py command again"
        )
    if (folder / f"imagenet{image_size}_features").is_dir():
        return OfficialStore(folder, image_size)
    if not folder.is_dir():
        raise UserError(f"data.feature_path: {path} is not a folder; {remedy}")
    raise UserError(
        f"data.feature_path: {path} holds no {image_size}-pixel features; {remedy} --image-size {image_size}"
    )


class FeatureStore:
    """A complete store. Picklable and cheap to open; shards are mapped when first read, in each process for itself.

    Attributes:
        labels: (n,) int64. latent_shape: (C, s, s). image_size: in pixels. class_names: one per class number.
        autoencoder: `Autoencoder.describe()` of the autoencoder that made it.
        kind: "moments" or "sample".
    """

    def __init__(self, folder: Path, image_size: int):
        self.folder = Path(folder).absolute()
        self.manifest = manifest = read_manifest(self.folder / "manifest.json")
        if manifest["image_size"] != image_size:
            raise UserError(
                f"data.image_size: {image_size}, but {folder} holds features of size {manifest['image_size']}"
            )
        self.kind, self.image_size, self.class_names = manifest["kind"], image_size, manifest["class_names"]
        self.autoencoder, self.latent_shape = manifest["autoencoder"], tuple(manifest["latent_shape"])
        self.labels = read_labels(self.folder, manifest)
        if not len(self.labels):
            raise UserError(
                f"data.feature_path: {folder} holds no image; extract features from readable images"
            )
        for shard in manifest["shards"]:
            file = self.folder / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise UserError(
                    f"data.feature_path: {file} is missing or cut off; run the extract_features.py command again"
                )
        self._first = np.cumsum([0] + [shard["count"] for shard in manifest["shards"]])
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": {}}  # a pickled map would be a copy of the data

    def latent(self, index: int, generator: np.random.Generator) -> np.ndarray:
        """Latent (C, s, s) float32 of one image; view and noise are drawn from `generator` where moments are stored."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} latents")
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        views = self._map(shard)[index - self._first[shard]]
        if self.kind == "sample":
            return views[0].astype(np.float32)
        mean, std = np.split(views[generator.integers(len(views))].astype(np.float32), 2)
        return mean + std * generator.standard_normal(mean.shape, dtype=np.float32)

    def fingerprint(self) -> str:
        """Hash of the content: equal stores train equally."""
        content = [self.manifest[key] for key in ("kind", "image_size", "labels_sha256")]
        return hashlib.sha256(
            json.dumps(content + [shard["sha256"] for shard in self.manifest["shards"]]).encode()
        ).hexdigest()

    def _map(self, shard: int) -> np.ndarray:
        """The memory map of a shard, (count, views, C or 2C, s, s)."""
        if shard not in self._maps:
            if len(self._maps) >= MAX_OPEN_SHARDS:
                self._maps.pop(next(iter(self._maps)))
            entry = self.manifest["shards"][shard]
            file = self.folder / entry["file"]
            try:
                array = np.lib.format.open_memmap(file, mode="r")
            except Exception as error:  # NumPy and mmap raise many kinds on strange headers
                raise UserError(
                    f"{file}: cannot be read ({in_a_line(error)}); see python -m data.features --verify"
                ) from None
            if (
                array.shape != (entry["count"], *item_shape(self.manifest))
                or array.dtype != self.manifest["dtype"]
            ):
                raise UserError(
                    f"data.feature_path: {file} is {array.dtype} {array.shape}, which contradicts the manifest"
                )
            self._maps[shard] = array
        return self._maps[shard]


class OfficialStore:
    """The official layout, read as it is: files in numeric order, features and labels paired by name.

    Attributes as in FeatureStore; `labels` is read when first asked for (a file per image), and `autoencoder` and the class
    names are known only where data/feature_writer.py wrote the folder.
    """

    kind = "official"

    def __init__(self, folder: Path, image_size: int):
        folder = Path(folder).absolute()
        self.image_size = image_size
        self._features, self._labels = (
            folder / f"imagenet{image_size}_features",
            folder / f"imagenet{image_size}_labels",
        )
        if not self._labels.is_dir():
            raise UserError(
                f"data.feature_path: {self._labels} is missing; it belongs beside {self._features.name}"
            )
        self._names = list_numbered(self._features)
        odd = set(self._names).symmetric_difference(list_numbered(self._labels))
        if odd or not self._names:
            state = (
                f"{len(odd)} files lack their counterpart, {sorted(odd)[0]}.npy for one"
                if odd
                else "there is no file"
            )
            raise UserError(
                f"data.feature_path: {folder} needs a feature and a label file per image; {state}"
            )
        manifest_path = folder / f"imagenet{image_size}_manifest.json"
        self._manifest = read_json(manifest_path) if manifest_path.is_file() else {}
        self.autoencoder = self._manifest.get("autoencoder")
        self.latent_shape = load_array(self._path(0)).shape[1:]
        self.latent(0, None)  # is it a latent at all?

    def __len__(self) -> int:
        return len(self._names)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        files = (self._labels / f"{name}.npy" for name in self._names)
        return np.array([int(load_array(file).reshape(1)[0]) for file in files], dtype=np.int64)

    @functools.cached_property
    def class_names(self) -> list[str]:
        return self._manifest.get("class_names") or [
            str(label) for label in range(int(self.labels.max()) + 1)
        ]

    def latent(self, index: int, generator: np.random.Generator | None) -> np.ndarray:
        """Latent (C, s, s) float32 of one image, as frozen at extraction; nothing is drawn from `generator`."""
        latent = load_array(self._path(index))
        if latent.shape != (1, *self.latent_shape) or len(self.latent_shape) != 3 or latent.dtype.kind != "f":
            raise UserError(
                f"{self._path(index)}: is {latent.dtype} {latent.shape}, not a latent (1, C, s, s) like the others"
            )
        return latent[0].astype(np.float32)

    def fingerprint(self) -> str:
        """Hash of file names, labels and image size (reading all latents would take too long)."""
        return hashlib.sha256(
            repr((self._names, self.image_size)).encode() + self.labels.tobytes()
        ).hexdigest()

    def _path(self, index: int) -> Path:
        return self._features / f"{self._names[index]}.npy"


def list_numbered(folder: Path) -> list[int]:
    """Numbers n of the files n.npy of a folder, ascending; UserError for any other file name."""
    stems = [name.removesuffix(".npy") for name in os.listdir(folder) if name[0] != "."]
    if odd := [stem for stem in stems if not (stem.isascii() and stem.isdigit() and str(int(stem)) == stem)]:
        raise UserError(
            f"data.feature_path: {folder / odd[0]} is not named after the number of an image, like 12.npy"
        )
    return sorted(map(int, stems))


def in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())


def load_array(file: Path) -> np.ndarray:
    """A whole .npy file; never unpickles. UserError where it is damaged."""
    try:
        with open(file, "rb") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except Exception as error:  # as above, MemoryError among them
        raise UserError(f"{file}: cannot be read ({in_a_line(error)}); extract the features again") from None


# ------------------------------------------------------------------------------------------------- manifest and checksums


def item_shape(settings: dict) -> tuple[int, int, int, int]:
    """Shape of one image in a shard: (views, C or 2C, s, s)."""
    channels, height, width = settings["latent_shape"]
    return settings["views"], channels * (2 if settings["kind"] == "moments" else 1), height, width


def read_json(path: Path) -> dict:
    """A JSON object from a file, else UserError."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({in_a_line(error)}); extract the features again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not what extract_features.py writes; extract the features again")
    return value


def read_manifest(path: Path) -> dict:
    """The manifest of a store, checked: what it says is used for opening files and for reading them."""
    manifest = read_json(path)
    try:
        files = [shard["file"] for shard in manifest["shards"]]
        numbers = [shard[key] for shard in manifest["shards"] for key in ("count", "bytes")] + [
            manifest["count"]
        ]
        sound = (
            (manifest["format"], manifest["kind"] in STORE_KINDS, manifest["views"] in (1, 2))
            == (FORMAT, True, True)
            and manifest["dtype"] in ("float16", "float32")
            and len(manifest["latent_shape"]) == 3
            and all(type(size) is int and 0 < size < 2**16 for size in manifest["latent_shape"])
            and all(type(number) is int and number >= 0 for number in numbers)
            and sum(shard["count"] for shard in manifest["shards"]) == manifest["count"]
            and all(isinstance(shard["sha256"], str) for shard in manifest["shards"])
            and all(isinstance(name, str) for name in manifest["class_names"])
            and all(isinstance(manifest[key], kind) for key, kind in MANIFEST_TYPES.items())
        )
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{path}: is not the manifest of a feature store; extract the features again")
    if strangers := [file for file in files if not (isinstance(file, str) and SHARD_NAME.fullmatch(file))]:
        raise UserError(
            f"{path}: names {strangers[0]!r}, which is no shard of this folder; extract the features again"
        )
    return manifest


def read_labels(folder: Path, manifest: dict) -> np.ndarray:
    """labels.npy, (n,) int64, checked against the manifest."""
    labels = load_array(folder / "labels.npy")
    if labels.dtype != np.int64 or labels.shape != (manifest["count"],):
        raise UserError(
            f"{folder / 'labels.npy'}: does not hold {manifest['count']} labels; extract the features again"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(manifest["class_names"]):
        raise UserError(
            f"{folder / 'labels.npy'}: holds labels that are no class; extract the features again"
        )
    return labels


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def damaged_files(folder: Path) -> list[str]:
    """One line per file of a store that is missing or differs from its checksum."""
    manifest = read_manifest(folder / "manifest.json")
    lines = []
    for name, expected in [(s["file"], s["sha256"]) for s in manifest["shards"]] + [
        ("labels.npy", manifest["labels_sha256"])
    ]:
        if not (folder / name).is_file():
            lines.append(f"{name}: missing")
        elif sha256_of(folder / name) != expected:
            lines.append(f"{name}: differs from its checksum")
    return lines


def main() -> None:
    parser = cli.Parser("Compare a feature store with its checksums.")
    parser.add_argument(
        "--verify", required=True, metavar="PATH", help="a store (the official layout has no checksums)"
    )
    folder = Path(parser.parse_args().verify)
    lines = damaged_files(folder)
    print("\n".join(lines) or f"{folder}: every checksum is right")
    if lines:
        sys.exit(f"{folder}: delete the files named above and run the same extract_features.py command again")


if __name__ == "__main__":
    cli.run(main)
