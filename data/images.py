"""A folder of images with one sub-folder per class, as centre-cropped 8-bit RGB squares.

Order and class numbers are torchvision's `ImageFolder` (sorted class folders, files below them sorted folder by folder); the
crop is ADM's, which the DiT literature trains on. What real folders hold is treated as follows:

- EXIF orientation is NOT applied: the training sets of the literature are not rotated either.
- Transparent pixels are composited onto white; CMYK, palette and grey images become RGB; 16-bit grey is scaled to 8 bits.
- Of an animation or a multi-page file the first frame counts.
- Files and folders whose name starts with a dot are not looked at. A class folder without images keeps its class number.
- A file that does not decode completely raises `UnreadableImage`: truncated or empty files, other formats under an image's
  name, dangling links, pipes and devices, decompression bombs (Pillow's limit), and grey images of floating-point numbers,
  which have no defined range.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
from PIL import Image

from config import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
MAX_RESIZED_PIXELS = 2**26  # a 1 x 100,000 image would grow to gigabytes when its shorter side is resized


class UnreadableImage(Exception):
    """An image file that gives no picture: `path` and a one-line `reason`."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class ImageFolder:
    """Images of a folder by index.

    Attributes:
        class_names: names of the class folders, sorted; the label is the position in this list.
        paths: file names relative to `root` with forward slashes, in the order of the index.
        labels: one class number per path.
    """

    def __init__(self, root: str | os.PathLike, image_size: int):
        """Lists the files and opens none. UserError where there is no folder, no class folder or no image."""
        self.root, self.image_size = Path(root), image_size
        if not self.root.is_dir():
            raise UserError(
                f"--data-path {root}: no such folder; give a folder with one sub-folder of images per class"
            )
        self.class_names = sorted(
            entry.name for entry in os.scandir(self.root) if entry.is_dir() and entry.name[0] != "."
        )
        if not self.class_names:
            raise UserError(
                f"--data-path {root}: holds no sub-folders; put the images of each class into their own sub-folder"
            )
        self.paths: list[str] = []
        self.labels: list[int] = []
        for label, name in enumerate(self.class_names):
            found = list_images(self.root / name)
            self.paths += [path.relative_to(self.root).as_posix() for path in found]
            self.labels += [label] * len(found)
        if not self.paths:
            raise UserError(
                f"--data-path {root}: no image in its sub-folders; known file types are {' '.join(EXTENSIONS)}"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Returns the image, (image_size, image_size, 3) uint8, and its label; raises UnreadableImage."""
        image = read_rgb(self.root / self.paths[index], self.paths[index])
        width, height = image.size
        if max(width, height) * self.image_size**2 > MAX_RESIZED_PIXELS * min(width, height):
            raise UnreadableImage(self.paths[index], f"{width} x {height} pixels are too elongated to resize")
        return center_crop(image, self.image_size), self.labels[index]

    def source_hash(self) -> str:
        """SHA-256 of the list of relative paths and labels, not of the files' contents."""
        digest = hashlib.sha256()
        for path, label in zip(self.paths, self.labels, strict=True):
            digest.update(os.fsencode(path) + b"\0%d\0" % label)
        return digest.hexdigest()


def list_images(folder: Path) -> list[Path]:
    """Image files below a folder, linked folders included, sorted by folder and then by name."""
    found = []
    for parent, children, files in os.walk(folder, followlinks=True):
        here = Path(parent)
        ancestors = {here.resolve(), *here.resolve().parents}
        children[:] = [
            name for name in children if name[0] != "." and (here / name).resolve() not in ancestors
        ]  # no cycles
        found += [here / name for name in files if name[0] != "." and name.lower().endswith(EXTENSIONS)]
    return sorted(found, key=lambda path: (str(path.parent), path.name))


def read_rgb(file: Path, name: str) -> Image.Image:
    """Decode a file completely, to 8-bit RGB. Raises UnreadableImage, which carries `name`."""
    if not file.is_file():  # opening a pipe would wait for ever
        raise UnreadableImage(name, "not a regular file, or a link to nothing")
    try:
        with Image.open(file) as image:
            return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise nearly every built-in error on damaged files
        reason = " ".join(f"{type(error).__name__}: {error}".replace(str(file), name).split())
        raise UnreadableImage(name, reason[:300]) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to "RGB"; ValueError for floating-point pixels and for integers beyond 16 bits."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255: a 16-bit image would become white
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("integer pixels outside 0 .. 65535")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def center_crop(image: Image.Image, image_size: int) -> np.ndarray:
    """ADM's crop: halve while twice too large, resize the shorter side to `image_size`, cut out the centre.

    Args:
        image: RGB, any size.

    Returns:
        (image_size, image_size, 3) uint8.
    """
    while min(image.size) >= 2 * image_size:  # box halvings first: a large bicubic step would alias
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return np.array(image)[top : top + image_size, left : left + image_size]
