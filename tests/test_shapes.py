"""The drawn shapes: a function of (seed, index), masks that fit, and a writer that continues."""

import numpy as np
import pytest
from PIL import Image

from config import UserError
from data.streams import rng
from toy import shapes


def test_image_is_a_function_of_seed_and_index():
    image, mask, label = shapes.render(5, image_size=32, seed=3)
    again, mask_again, label_again = shapes.render(5, image_size=32, seed=3)
    assert np.array_equal(image, again)
    assert np.array_equal(mask, mask_again)
    assert label == label_again
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    assert mask.shape == (32, 32)
    assert mask.dtype == bool
    assert not np.array_equal(image, shapes.render(5, image_size=32, seed=4)[0])
    assert not np.array_equal(image, shapes.render(13, image_size=32, seed=3)[0])  # the same class


def test_every_class_occurs_and_names_are_in_folder_order():
    assert [shapes.render(index, 16)[2] for index in range(16)] == 2 * list(range(8))
    assert len(shapes.CLASS_NAMES) == 8
    assert list(shapes.CLASS_NAMES) == sorted(shapes.CLASS_NAMES)


def grow(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask and everything at most this number of pixels away, along either axis."""
    for axis in (0, 1):
        mask = np.any([np.roll(mask, shift, axis) for shift in range(-pixels, pixels + 1)], axis=0)
    return mask


@pytest.mark.parametrize("index", range(8))
def test_mask_is_where_the_image_leaves_its_background(index):
    image, mask, _ = shapes.render(index)
    background = shapes.background(rng(0, "shapes", index), 64) * 255
    difference = np.abs(image - background).max(axis=2)
    assert difference[~grow(mask, 1)].max() < 1  # rounding
    assert (difference[mask] > 10).mean() > 0.95
    assert 0.05 < mask.mean() < 0.5


def test_backgrounds_are_smooth_and_differ():
    images = [shapes.background(rng(0, "shapes", index), 64) for index in range(4)]
    for image in images:
        assert max(np.abs(np.diff(image, axis=axis)).max() for axis in (0, 1)) < 0.02
    assert np.ptp([image.mean(axis=(0, 1)) for image in images], axis=0).max() > 0.2


def test_writing_continues_and_leaves_no_partial_file(tmp_path, monkeypatch):
    shapes.write_images(tmp_path, 8, image_size=16)
    first = tmp_path / "cross" / "000000.png"
    finished = first.stat().st_mtime_ns

    def fail_midway(self, stream, format):
        stream.write(b"half a picture")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fail_midway)
        with pytest.raises(OSError, match="no space left"):
            shapes.write_images(tmp_path, 16, image_size=16)
    assert len(list(tmp_path.glob("*/*.png"))) == 8

    shapes.main(["--output", str(tmp_path), "--num-images", "16", "--image-size", "16"])
    assert first.stat().st_mtime_ns == finished
    assert len(list(tmp_path.glob("*/*.png"))) == 16
    written = np.asarray(Image.open(tmp_path / shapes.CLASS_NAMES[1] / "000009.png"))
    assert np.array_equal(written, shapes.render(9, 16)[0])


def test_images_of_another_size_or_seed_are_not_mixed(tmp_path):
    shapes.write_images(tmp_path, 9, image_size=16, seed=1)
    for image_size, seed in ((8, 1), (16, 2)):
        with pytest.raises(
            UserError, match="holds images of another --image-size or --seed, such as 000000.png"
        ):
            shapes.write_images(tmp_path, 12, image_size, seed)
    shapes.write_images(tmp_path, 12, image_size=16, seed=1)
    assert len(list(tmp_path.rglob("*.png"))) == 12
    # Nor do images from another number on: they may be those that were held out
    with pytest.raises(
        UserError, match="holds images from number 0 on; add --start 0, or give another folder"
    ):
        shapes.write_images(tmp_path, 3, 16, start=2)


@pytest.mark.parametrize("keep", [0, 100])
def test_damaged_images_are_drawn_again(tmp_path, keep):
    shapes.write_images(tmp_path, 3, image_size=16)
    for index in (0, 2):
        path = shapes.image_path(tmp_path, index)
        path.write_bytes(path.read_bytes()[:keep])
    shapes.write_images(tmp_path, 3, image_size=16)
    for index in range(3):
        pixels = np.asarray(Image.open(shapes.image_path(tmp_path, index)))
        assert np.array_equal(pixels, shapes.render(index, 16)[0])


def test_bad_numbers_name_the_option(tmp_path):
    with pytest.raises(UserError, match="--num-images 0"):
        shapes.main(["--output", str(tmp_path), "--num-images", "0"])
