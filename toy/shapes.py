"""The embedded data set: textured objects on smooth backgrounds, drawn by formula, nothing to download.

    python -m toy.shapes --output DIR --image-size 64 --num-images 4096 --seed 0 --start 0

Image i is a function of (seed, i) alone. The detail is all in the object: its outline and a two-colour texture, whose colours
follow the class. The background is a smooth gradient between two random colours: a router that drops redundant tokens has
something to find, and since the colours are not known beforehand, the network has to look at background and object alike.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import cli
from config import UserError
from data.files import write_file
from data.streams import rng

SUPERSAMPLING = 3  # subpixels per pixel and axis
OUTLINE = 0.86  # the object's rim, from this level to 1, has the darker colour


# A level function takes object coordinates (u to the right, v down, radius about 1) and is below 1 inside the object.


def polygon_level(u: np.ndarray, v: np.ndarray, corners: int, inradius: float) -> np.ndarray:
    """Regular polygon standing on an edge: the largest distance along the normals of its edges."""
    angles = np.pi / 2 + 2 * np.pi * np.arange(corners) / corners
    normals = [(np.float32(np.cos(a)), np.float32(np.sin(a))) for a in angles]
    return np.maximum.reduce([x * u + y * v for x, y in normals]) / inradius


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
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u, v / 2.4), np.maximum(u / 2.4, v)) / 0.42


def star_level(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five-pointed star: in each of ten mirrored sectors, the distance along one edge's normal."""
    sector = np.abs((np.arctan2(u, -v) / (2 * np.pi / 5) + 0.5) % 1 - 0.5) * (2 * np.pi / 5)
    inner, outer = 0.64, 1.24
    tip, notch = np.array([outer, 0.0]), inner * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    normal = np.array([notch[1] - tip[1], tip[0] - notch[0]])
    normal = (normal / (normal @ tip)).astype(np.float32)
    return np.hypot(u, v) * (normal[0] * np.cos(sector) + normal[1] * np.sin(sector))


def heart_level(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A circle sheared upwards by sqrt(|u|)."""
    return np.hypot(u / 1.02, (v + 0.12 + 0.62 * np.sqrt(np.abs(u)) - 0.35) / 0.95)


# A texture takes the same coordinates and is True where the second colour shows.


def stripes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return v / 0.5 % 1 < 0.5


def checker(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (u / 0.72 % 1 < 0.5) ^ (v / 0.72 % 1 < 0.5)


def dots(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    row = np.floor(v / 0.5)
    return np.hypot((u / 0.5 + row / 2) % 1 - 0.5, v / 0.5 % 1 - 0.5) < 0.32


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


# class name: level, texture, first colour (and the rim), second colour
CLASSES = {
    "cross": (cross_level, diagonals, (0.80, 0.16, 0.14), (0.98, 0.94, 0.90)),
    "disk": (disk_level, stripes, (0.92, 0.42, 0.08), (1.00, 0.88, 0.62)),
    "heart": (heart_level, dots, (0.80, 0.12, 0.36), (1.00, 0.80, 0.86)),
    "hexagon": (hexagon_level, hexagon_bands, (0.42, 0.20, 0.62), (0.88, 0.78, 0.98)),
    "ring": (ring_level, spokes, (0.13, 0.15, 0.20), (0.96, 0.96, 0.94)),
    "square": (square_level, checker, (0.10, 0.30, 0.70), (0.80, 0.90, 1.00)),
    "star": (star_level, star_bands, (0.62, 0.42, 0.02), (1.00, 0.86, 0.20)),
    "triangle": (triangle_level, triangle_bands, (0.06, 0.42, 0.28), (0.74, 0.94, 0.66)),
}
CLASS_NAMES = tuple(CLASSES)  # sorted, so that label = position, as in any image folder


def background(draw: np.random.Generator, image_size: int) -> np.ndarray:
    """A linear gradient between two random colours, across the image: (H, W, 3) float32 in [0, 1]."""
    angle = draw.uniform(0, 2 * np.pi)
    first, second = draw.uniform(0.15, 0.9, size=(2, 3)).astype(np.float32)
    axis = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size - 0.5
    along = np.float32(np.cos(angle)) * axis[None, :] + np.float32(np.sin(angle)) * axis[:, None]
    ramp = np.clip(along + 0.5, 0, 1)[:, :, None]
    return first * (1 - ramp) + second * ramp


def object_coordinates(draw: np.random.Generator, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Object coordinates u, v of every subpixel, (H', W') float32 with H' = H * SUPERSAMPLING."""
    centre_x, centre_y = draw.uniform(0.44, 0.56, size=2)  # in units of the image, as is the radius
    radius, angle = draw.uniform(0.31, 0.37), np.deg2rad(draw.uniform(-20, 20))
    subpixels = image_size * SUPERSAMPLING
    axis = (np.arange(subpixels, dtype=np.float32) + 0.5) / subpixels
    x, y = (axis[None, :] - centre_x) / radius, (axis[:, None] - centre_y) / radius
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = cos * x + sin * y, cos * y - sin * x
    return u.astype(np.float32), v.astype(np.float32)


def pixel_coverage(inside: np.ndarray) -> np.ndarray:
    """Share of each pixel's subpixels that are True: (H', W') bool -> (H, W, 1) float32."""
    s, count = SUPERSAMPLING, inside.view(np.uint8)
    count = sum(count[row::s, column::s] for row in range(s) for column in range(s))
    return count[:, :, None] / np.float32(s * s)


def render(index: int, image_size: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
    """Draw image `index` at any size.

    Returns:
        image (H, W, 3) uint8; mask (H, W) bool, True where the object covers at least half of the pixel; label, index % 8.
    """
    draw = rng(seed, "shapes", index)
    label = index % len(CLASSES)
    level_of, texture_of, first, second = CLASSES[CLASS_NAMES[label]]
    image = background(draw, image_size)
    u, v = object_coordinates(draw, image_size)
    first, second = (
        np.asarray(colour, dtype=np.float32) + draw.uniform(-0.03, 0.03) for colour in (first, second)
    )

    level = level_of(u, v)
    covered = pixel_coverage(level < 1)
    covered_by_second = pixel_coverage((level < OUTLINE) & texture_of(u, v))
    image = image * (1 - covered) + first * (covered - covered_by_second) + second * covered_by_second
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), covered[:, :, 0] >= 0.5, label


def write_image(folder: Path, index: int, image_size: int, seed: int) -> None:
    """Write `folder/<class name>/<index>.png` under a temporary name first: what has its final name is complete."""
    path = folder / CLASS_NAMES[index % len(CLASSES)] / f"{index:06d}.png"
    if path.exists():
        return
    image, _, _ = render(index, image_size, seed)
    write_file(path, lambda stream: Image.fromarray(image).save(stream, format="PNG"), durable=False)


def write_images(
    folder: str | Path, num_images: int, image_size: int = 64, seed: int = 0, start: int = 0
) -> None:
    """Write images start ... start + num_images - 1 into an image folder with one subfolder per class.

    Finished images are kept as they are, so the same call again continues an interrupted one.
    """
    for option, value, least in (
        ("num-images", num_images, 1),
        ("image-size", image_size, 1),
        ("seed", seed, 0),
        ("start", start, 0),
    ):
        if value < least:
            raise UserError(f"--{option} {value}: must be at least {least}")
    folder = Path(folder)
    for name in CLASS_NAMES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(start, start + num_images), desc="images", unit="img"):
        write_image(folder, index, image_size, seed)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser("Write the embedded data set as an image folder.")
    parser.add_argument("--output", required=True, help="folder that gets one subfolder per class")
    parser.add_argument("--image-size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--num-images", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="index of the first image")
    args = parser.parse_args(argv)
    write_images(args.output, args.num_images, args.image_size, args.seed, args.start)


if __name__ == "__main__":
    cli.run(main)
