"""The layout of the official code, which is read but not written: one file per image.

    imagenet256_features/12.npy    (1, C, s, s) float32, a latent in scaled units
    imagenet256_labels/12.npy      (1,)

The number is the image's; the folders carry the image size.
"""

import functools
import hashlib
from pathlib import Path

import numpy as np

from config import UserError
from data.store_files import load_array

# Labels are int64 in training
LARGEST_LABEL = 2**31


class OfficialStore:
    """Features in the official layout: files in numeric order, features and labels paired by name.

    Attributes:
        image_size: in pixels.
        latent_shape: (C, s, s).
        labels: (n,) int64; read when first asked for, because that opens a file per image.
        class_names: the class numbers as text, because the layout stores no names.
        autoencoder: None, because the layout does not store it.
        columns: none, because the layout has none.
    """

    autoencoder = None
    columns: dict[str, tuple[int, ...]] = {}

    def __init__(self, folder: Path, image_size: int):
        folder = Path(folder).absolute()
        self.image_size = image_size
        self._features = folder / f"imagenet{image_size}_features"
        self._labels = folder / f"imagenet{image_size}_labels"
        self._numbers = paired_numbers(self._features, self._labels)
        first = load_array(self._path(0))
        self.latent_shape = first.shape[1:]
        # Raises UserError if the first file is not a latent, or has no label, at all.
        self.latent(0)
        read_label(self._labels / f"{self._numbers[0]}.npy")

    def __len__(self) -> int:
        return len(self._numbers)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        labels = np.empty(len(self), dtype=np.int64)
        for index, number in enumerate(self._numbers):
            labels[index] = read_label(self._labels / f"{number}.npy")
        return labels

    @functools.cached_property
    def class_names(self) -> list[str]:
        largest = int(self.labels.max())
        return [str(label) for label in range(largest + 1)]

    def latent(self, index: int, generator: np.random.Generator | None = None) -> np.ndarray:
        """Latent (C, s, s) float32 of one image, frozen at extraction; `generator` is not used."""
        latent = load_array(self._path(index))
        has_shape = latent.shape == (1, *self.latent_shape) and len(self.latent_shape) == 3
        if not has_shape or latent.dtype.kind != "f":
            raise UserError(
                f"{self._path(index)}: is {latent.dtype} {latent.shape}, "
                "not a latent (1, C, s, s) like the others"
            )
        return latent[0].astype(np.float32)

    def column_values(self, index: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
        """Nothing: see `columns`."""
        return {}

    def column(self, name: str) -> np.ndarray:
        """There is none: see `columns`."""
        raise KeyError(name)

    def is_finite(self, index: int) -> bool:
        """Whether all numbers of one image are finite."""
        return bool(np.isfinite(self.latent(index)).all())

    def describe(self, index: int) -> str:
        """An image for messages: its number in the store and its file."""
        return f"image {index} ({self._path(index).name})"

    def fingerprint(self) -> str:
        """Hash of file names, labels and image size. Reading all latents would take too long."""
        names = repr((self._numbers, self.image_size))
        return hashlib.sha256(names.encode() + self.labels.tobytes()).hexdigest()

    def _path(self, index: int) -> Path:
        return self._features / f"{self._numbers[index]}.npy"


def read_label(file: Path) -> int:
    """The class number in a file. Raises UserError for anything else, such as a one-hot vector."""
    array = load_array(file)
    found = f"{array.dtype} {array.shape}"
    if array.size == 1 and array.dtype.kind in "iuf":
        label = array.item()
        if 0 <= label < LARGEST_LABEL and label == int(label):
            return int(label)
        found = str(label)
    raise UserError(
        f"data.feature_path: {file} holds {found}, not the number of a class, which is 0 or above; "
        "write one whole number per file"
    )


def paired_numbers(features: Path, labels: Path) -> list[int]:
    """Numbers of the images, ascending. Raises UserError unless each has a feature and a label file."""
    if not labels.is_dir():
        raise UserError(f"data.feature_path: {labels} is missing; it belongs beside {features.name}")
    numbers = list_numbered(features)
    unpaired = set(numbers).symmetric_difference(list_numbered(labels))
    problem = ""
    if unpaired:
        problem = f"{len(unpaired)} files lack their counterpart, for example {min(unpaired)}.npy"
    elif not numbers:
        problem = "there is no file"
    if problem:
        raise UserError(
            f"data.feature_path: {features.parent} needs a feature and a label file per image; {problem}"
        )
    return numbers


def list_numbered(folder: Path) -> list[int]:
    """Numbers k of the files k.npy in a folder, ascending. Raises UserError for any other file name."""
    numbers = []
    for file in folder.iterdir():
        if file.name.startswith("."):
            continue
        # "012.npy" is refused, because the number 12 would not lead back to it.
        is_number = file.stem.isascii() and file.stem.isdigit() and str(int(file.stem)) == file.stem
        if file.suffix != ".npy" or not is_number:
            raise UserError(
                f"data.feature_path: {file} is not named after the number of an image, like 12.npy"
            )
        numbers.append(int(file.stem))
    return sorted(numbers)
