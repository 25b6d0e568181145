"""The images of a data set, as 8-bit RGB, all cropped to one size at their centre.

data/folders.py says which files these are. The crop is ADM's, which the DiT literature trains on, and its
counterpart for sizes that are no square. Unusual files are treated as follows:

- EXIF orientation is NOT applied: the training sets of the literature are not rotated either.
- Transparent pixels are composited onto white; CMYK, palette and grey images become RGB; 16-bit grey is
  scaled to 8 bits.
- The first frame of an animation or of a multi-page file is used.
- A file that does not decode completely raises `UnreadableImage`: truncated or empty files, other formats
  under an image's name, dangling links, pipes and devices, decompression bombs (Pillow's limit), and grey
  images of floating-point numbers, which have no defined range.
"""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.folders import list_dataset, readable_formats
from grid import Grid, Size

# A 1 x 100,000 image would grow to gigabytes when it is resized until it covers the crop.
MAX_RESIZED_PIXELS = 2**26


class UnreadableImage(Exception):
    """An image file that cannot be decoded: `path` and a one-line `reason`."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class SkippedImage(NamedTuple):
    """An image that was left out because it cannot be decoded."""

    source_index: int
    path: str
    reason: str


class ImageFolder:
    """Images of a folder by index.

    Attributes:
        listing: all of the following.
        class_names: names of the class folders, sorted; the label is the position in this list.
        paths: file names relative to `root` with forward slashes, in the order of the index.
        labels: one class number per path.
        notes: lines that a user should read, such as which files are not images.
    """

    def __init__(self, root: str | os.PathLike, image_size: Size, option: str = "--data-path"):
        """List the files and open none. `option` is what the user calls the folder.

        Args:
            image_size: of the crop in pixels: the side of a square, or [height, width].

        Raises:
            UserError: there is no such folder, no image, or the folder holds several data sets.
        """
        self.root = Path(root)
        self.crop = Grid.of(image_size)
        listing = list_dataset(self.root, option)
        self.listing = listing
        self.class_names = listing.class_names
        self.paths = listing.paths
        self.labels = listing.labels
        self.notes = listing.notes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Returns the image, (H, W, 3) uint8, and its label. Raises UnreadableImage."""
        path = self.paths[index]
        image = read_rgb(self.root / path, path)
        width, height = image.size
        resized_pixels = width * height * covering_scale(image.size, self.crop) ** 2
        if resized_pixels > MAX_RESIZED_PIXELS:
            raise UnreadableImage(path, f"{width} x {height} pixels are too elongated to resize")
        return center_crop(image, self.crop), self.labels[index]

    def source_hash(self) -> str:
        """SHA-256 of the list of relative paths and labels, not of the files' contents."""
        digest = hashlib.sha256()
        for path, label in zip(self.paths, self.labels, strict=True):
            digest.update(os.fsencode(path) + b"\0%d\0" % label)
        return digest.hexdigest()


def read_rgb(file: Path, name: str) -> Image.Image:
    """Decode a file completely, to 8-bit RGB. Raises UnreadableImage with `name` as its path."""
    # Opening a pipe would wait for ever.
    if not file.is_file():
        raise UnreadableImage(name, "not a regular file, or a link to nothing")
    try:
        with Image.open(file, formats=readable_formats()) as image:
            return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise nearly every built-in error on damaged files
        message = f"{type(error).__name__}: {error}".replace(str(file), name)
        reason = " ".join(message.split())[:300]
        raise UnreadableImage(name, reason) from None


def is_whole_png(file: Path) -> bool:
    """Whether all parts of a PNG file are there and have the right checksums. The pixels are not decoded."""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            image.verify()
    except Exception:  # Pillow raises nearly every built-in error on damaged files
        return False
    return True


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to "RGB". Raises ValueError for pixels whose range is unknown."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):
        return wide_grey_to_rgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def wide_grey_to_rgb(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits. Pillow's own conversion clips at 255: the image would become white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("integer pixels outside 0 .. 65535")
    rounded = (values * 255 + 65535 // 2) // 65535
    return Image.fromarray(rounded.astype(np.uint8)).convert("RGB")


def center_crop(image: Image.Image, size: Size) -> np.ndarray:
    """ADM's crop: halve while twice too large, resize until the crop is just covered, cut out the centre.

    Args:
        image: RGB, any size.
        size: of the crop: the side of a square, or [height, width].

    Returns:
        (H, W, 3) uint8.
    """
    crop = Grid.of(size)
    # Box halvings first: a large bicubic step would alias.
    while image.width >= 2 * crop.columns and image.height >= 2 * crop.rows:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)

    # Resize until one side is that of the crop, and the other at least as long
    scale = covering_scale(image.size, crop)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)

    # Cut out the centre
    left = (image.width - crop.columns) // 2
    top = (image.height - crop.rows) // 2
    return np.array(image)[top : top + crop.rows, left : left + crop.columns]


def covering_scale(size: tuple[int, int], crop: Grid) -> float:
    """The factor at which an image of this (width, height) just covers the crop."""
    width, height = size
    return max(crop.rows / height, crop.columns / width)
