"""A data set drawn by formula, with nothing to download: textured objects on smooth backgrounds.

    python -m toy.shapes --output DIR --image-size 64 --num-images 4096 --seed 0 --start 0

Image i is a function of (seed, i) alone. All detail is in the object: its outline and a two-colour texture,
whose colours follow the class. The background is a smooth gradient between two random colours. A router that
drops redundant tokens therefore has something to find; and because the colours are not known beforehand, the
network has to look at background and object alike.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

import cli
from config import UserError
from data.files import write_file
from data.images import is_whole_png
from data.streams import rng

# Subpixels per pixel and axis.
SUPERSAMPLING = 3
# The rim of the object, from this level to 1, has the darker colour.
OUTLINE = 0.86


# ---------------------------------------------------------------------------------------------------- levels

# A level function takes object coordinates (u to the right, v down, radius about 1).
# It is below 1 inside the object.


def polygon_level(u: np.ndarray, v: np.ndarray, corners: int, inradius: float) -> np.ndarray:
    """Regular polygon standing on an edge: the largest distance along the normals of its edges."""
    angles = np.pi / 2 + 2 * np.pi * np.arange(corners) / corners
    distances = [np.float32(np.cos(angle)) * u + np.float32(np.sin(angle)) * v for angle in angles]
    return np.maximum.reduce(distances) / inradius


def disk_level(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v)


def square_level(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) / 0.85


def triangle_level(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return polygon_level(u, v - 0.15, corners=3, inradius=0.68)


def hexagon_level(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return polygon_level(u, v, corners=6, inradius=0.9)


def ring_level(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(u, v) - 0.7) / 0.35


def cross_level(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u = np.abs(u)
    v = np.abs(v)
    upright = np.maximum(u, v / 2.4)
    across = np.maximum(u / 2.4, v)
    return np.minimum(upright, across) / 0.42


def star_level(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five-pointed star: in each of ten mirrored sectors, the distance along the normal of one edge."""
    # Angle from the nearest tip
    turn = 2 * np.pi / 5
    angle = np.abs((np.arctan2(u, -v) / turn + 0.5) % 1 - 0.5) * turn

    # The edge runs from a tip to the notch beside it; scale its normal to level 1 at the tip
    inner = 0.64
    outer = 1.24
    tip = np.array([outer, 0.0])
    notch = inner * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    normal = np.array([notch[1] - tip[1], tip[0] - notch[0]])
    normal = (normal / (normal @ tip)).astype(np.float32)
    return np.hypot(u, v) * (normal[0] * np.cos(angle) + normal[1] * np.sin(angle))


def heart_level(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A circle sheared upwards by sqrt(|u|)."""
    sheared = v + 0.12 + 0.62 * np.sqrt(np.abs(u)) - 0.35
    return np.hypot(u / 1.02, sheared / 0.95)


# -------------------------------------------------------------------------------------------------- textures

# A texture takes the same coordinates and is True where the second colour shows.


def stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return v / 0.5 % 1 < 0.5


def checker(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    column = u / 0.72 % 1 < 0.5
    row = v / 0.72 % 1 < 0.5
    return column ^ row


def dots(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    row = np.floor(v / 0.5)
    from_centre_u = (u / 0.5 + row / 2) % 1 - 0.5
    from_centre_v = v / 0.5 % 1 - 0.5
    return np.hypot(from_centre_u, from_centre_v) < 0.32


def spokes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.arctan2(v, u) / (2 * np.pi / 8) % 1 < 0.5


def diagonals(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (u + v) / 0.6 % 1 < 0.5


def star_bands(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return star_level(u, v) / 0.56 % 1 < 0.5


def hexagon_bands(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return hexagon_level(u, v) / 0.44 % 1 < 0.5


def triangle_bands(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return triangle_level(u, v) / 0.5 % 1 < 0.5


# --------------------------------------------------------------------------------------------------- classes

Colour = tuple[float, float, float]
Plane = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Appearance(NamedTuple):
    """How the objects of a class look."""

    level: Plane
    texture: Plane
    first_colour: Colour  # also of the rim
    second_colour: Colour


CLASSES = {
    "cross": Appearance(cross_level, diagonals, (0.80, 0.16, 0.14), (0.98, 0.94, 0.90)),
    "disk": Appearance(disk_level, stripes, (0.92, 0.42, 0.08), (1.00, 0.88, 0.62)),
    "heart": Appearance(heart_level, dots, (0.80, 0.12, 0.36), (1.00, 0.80, 0.86)),
    "hexagon": Appearance(hexagon_level, hexagon_bands, (0.42, 0.20, 0.62), (0.88, 0.78, 0.98)),
    "ring": Appearance(ring_level, spokes, (0.13, 0.15, 0.20), (0.96, 0.96, 0.94)),
    "square": Appearance(square_level, checker, (0.10, 0.30, 0.70), (0.80, 0.90, 1.00)),
    "star": Appearance(star_level, star_bands, (0.62, 0.42, 0.02), (1.00, 0.86, 0.20)),
    "triangle": Appearance(triangle_level, triangle_bands, (0.06, 0.42, 0.28), (0.74, 0.94, 0.66)),
}
# Sorted, so that the label is the position, as in any image folder.
CLASS_NAMES = tuple(CLASSES)


# --------------------------------------------------------------------------------------------------- drawing


def gradient(angle: float, first: np.ndarray, second: np.ndarray, image_size: int) -> np.ndarray:
    """A linear gradient between two colours across the image: (H, W, 3) float32. `angle` is its direction."""
    axis = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size - 0.5
    along = np.float32(np.cos(angle)) * axis[None, :] + np.float32(np.sin(angle)) * axis[:, None]
    ramp = np.clip(along + 0.5, 0, 1)[:, :, None]
    return first * (1 - ramp) + second * ramp


def background(draw: np.random.Generator, image_size: int) -> np.ndarray:
    """A gradient between two random colours: (H, W, 3) float32 in [0, 1]."""
    angle = draw.uniform(0, 2 * np.pi)
    first, second = draw.uniform(0.15, 0.9, size=(2, 3)).astype(np.float32)
    return gradient(angle, first, second, image_size)


def object_coordinates(draw: np.random.Generator, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Object coordinates u, v of every subpixel, (H', W') float32 with H' = H * SUPERSAMPLING."""
    # Place of the object; lengths in units of the image
    centre_x, centre_y = draw.uniform(0.44, 0.56, size=2)
    radius = draw.uniform(0.31, 0.37)
    angle = np.deg2rad(draw.uniform(-20, 20))

    # Shift, scale and turn the coordinates of the image
    subpixels = image_size * SUPERSAMPLING
    axis = (np.arange(subpixels, dtype=np.float32) + 0.5) / subpixels
    x = (axis[None, :] - centre_x) / radius
    y = (axis[:, None] - centre_y) / radius
    u = np.cos(angle) * x + np.sin(angle) * y
    v = np.cos(angle) * y - np.sin(angle) * x
    return u.astype(np.float32), v.astype(np.float32)


def pixel_coverage(inside: np.ndarray) -> np.ndarray:
    """Share of each pixel's subpixels that are True: (H', W') bool -> (H, W, 1) float32."""
    side = len(inside) // SUPERSAMPLING
    subpixels = inside.reshape(side, SUPERSAMPLING, side, SUPERSAMPLING)
    count = subpixels.sum(axis=(1, 3), dtype=np.uint8)
    return count[:, :, None] / np.float32(SUPERSAMPLING**2)


def render(index: int, image_size: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
    """Draw image `index` at any size.

    Returns:
        image: (H, W, 3) uint8.
        mask: (H, W) bool, True where the object covers at least half of the pixel.
        label: index % 8.
    """
    label = index % len(CLASSES)
    appearance = CLASSES[CLASS_NAMES[label]]

    # Random numbers in a fixed order: background, place of the object, shades of its two colours
    draw = rng(seed, "shapes", index)
    image = background(draw, image_size)
    u, v = object_coordinates(draw, image_size)
    first = np.asarray(appearance.first_colour, dtype=np.float32) + draw.uniform(-0.03, 0.03)
    second = np.asarray(appearance.second_colour, dtype=np.float32) + draw.uniform(-0.03, 0.03)

    # Paint the object over the background
    level = appearance.level(u, v)
    covered = pixel_coverage(level < 1)
    covered_by_second = pixel_coverage((level < OUTLINE) & appearance.texture(u, v))
    covered_by_first = covered - covered_by_second
    image = image * (1 - covered) + first * covered_by_first + second * covered_by_second

    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    mask = covered[:, :, 0] >= 0.5
    return pixels, mask, label


# --------------------------------------------------------------------------------------------------- writing


def image_path(folder: Path, index: int) -> Path:
    """`folder/<class name>/<index>.png`."""
    return folder / CLASS_NAMES[index % len(CLASSES)] / f"{index:06d}.png"


def write_image(folder: Path, index: int, image_size: int, seed: int) -> None:
    """Write an image unless it is there; one that a power cut has emptied or cut off is not."""
    path = image_path(folder, index)
    if path.exists() and is_whole_png(path):
        return
    pixels, _, _ = render(index, image_size, seed)
    image = Image.fromarray(pixels)
    write_file(path, lambda stream: image.save(stream, format="PNG"), durable=False)


def check_images(folder: Path, image_size: int, seed: int, start: int) -> None:
    """UserError if a folder holds other images than those from `start` on, of this size and seed."""
    numbers = [int(path.stem) for path in folder.glob("*/*.png") if path.stem.isdecimal()]
    if not numbers:
        return
    first = min(numbers)
    if first != start:
        raise UserError(
            f"--output {folder}: holds images from number {first} on; add --start {first}, or give another folder"
        )
    path = image_path(folder, first)
    if not is_whole_png(path):
        return
    pixels, _, _ = render(first, image_size, seed)
    with Image.open(path) as image:
        is_same = np.array_equal(np.asarray(image), pixels)
    if not is_same:
        raise UserError(
            f"--output {folder}: holds images of another --image-size or --seed, such as {path.name}; "
            "give another folder"
        )


def write_images(
    folder: str | Path, num_images: int, image_size: int = 64, seed: int = 0, start: int = 0
) -> None:
    """Write images start ... start + num_images - 1 into an image folder with one sub-folder per class.

    Finished images are kept, so the same call again continues an interrupted one.

    Raises:
        UserError: the folder holds images of another size, seed or start.
    """
    folder = Path(folder)
    check_images(folder, image_size, seed, start)
    for name in CLASS_NAMES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(start, start + num_images), desc="images", unit="img"):
        write_image(folder, index, image_size, seed)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("Draw the shapes as an image folder.")
    parser.add_argument("--output", required=True, help="folder that gets one sub-folder per class")
    parser.add_argument("--image-size", type=int, default=64, help="pixels per side (default: %(default)s)")
    parser.add_argument("--num-images", type=int, default=4096, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--start", type=int, default=0, help="index of the first image (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    cli.check_at_least(args, 1, "num_images", "image_size")
    cli.check_at_least(args, 0, "start")
    cli.check_seed(args)
    cli.check_output("--output", args.output)
    write_images(args.output, args.num_images, args.image_size, args.seed, args.start)


if __name__ == "__main__":
    cli.run(main)
