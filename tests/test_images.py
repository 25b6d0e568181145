"""Image folders: ADM's crop, torchvision's order, and what real folders hold."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder as TorchvisionFolder

from config import UserError
from data.folders import class_table, scan
from data.images import ImageFolder, UnreadableImage, center_crop


def noise_image(width: int, height: int, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


def one_image(tmp_path, image: Image.Image, name: str = "x.png", **options) -> np.ndarray:
    """Save an image as the only one of a folder and read it back, cropped to 8 x 8."""
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / name, **options)
    return ImageFolder(tmp_path, 8)[0][0]


def test_crop_of_right_height_cuts_the_centre():
    image = noise_image(width=41, height=32)
    assert np.array_equal(center_crop(image, 32), np.asarray(image)[:, 4:36])


def test_crop_halves_with_the_mean_of_four():
    image = noise_image(64, 64)
    mean = np.asarray(image).reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(center_crop(image, 32) - mean).max() <= 1  # Pillow rounds twice, per direction


def test_crop_is_the_three_steps_of_adm():
    image = noise_image(width=200, height=150)
    steps = image.resize((100, 75), Image.Resampling.BOX).resize((50, 37), Image.Resampling.BOX)
    steps = steps.resize((43, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(center_crop(image, 32), np.asarray(steps)[:, 5:37])


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (8, 8), (9, 300), (300, 9), (100, 100)])
def test_crop_gives_the_size_and_keeps_a_constant(size):
    crop = center_crop(Image.new("RGB", size, (10, 20, 30)), 8)
    assert crop.shape == (8, 8, 3)
    assert crop.dtype == np.uint8
    assert (crop == (10, 20, 30)).all()


def test_order_and_labels_are_torchvisions(tmp_path):
    names = ["b/x10.png", "b/x9.PNG", "b/deep/er/1.jpg", "b/deep-1/2.jpg", "B/1.png", "a b/ü.png"]
    names += ["z/notes.txt", "z/1.bmp"]
    for name in names:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        noise_image(9, 9).save(file, format="PNG")

    folder = ImageFolder(tmp_path, 8)
    torchvision_folder = TorchvisionFolder(tmp_path)
    assert folder.class_names == torchvision_folder.classes
    samples = [(str(tmp_path / path), label) for path, label in zip(folder.paths, folder.labels)]
    assert samples == torchvision_folder.samples
    image, label = folder[3]
    assert image.shape == (8, 8, 3)
    assert label == folder.labels[3]


def test_source_hash_follows_names_and_labels(tiny_images, tmp_path):
    first = ImageFolder(tiny_images, 8).source_hash()
    copy = shutil.copytree(tiny_images, tmp_path / "copy")
    assert ImageFolder(copy, 16).source_hash() == first
    (copy / "a" / "0.png").rename(copy / "b" / "0.png")
    assert ImageFolder(copy, 16).source_hash() != first


def test_empty_class_keeps_its_number_and_hidden_names_are_skipped(tiny_images, tmp_path):
    copy = shutil.copytree(tiny_images, tmp_path / "copy")
    (copy / "aa").mkdir()
    (copy / ".cache").mkdir()
    (copy / "a" / "._0.png").write_bytes(b"resource fork")
    images = ImageFolder(copy, 8)
    assert images.class_names == ["a", "aa", "b", "c"]
    assert sorted(set(images.labels)) == [0, 2, 3]
    assert len(images) == 10


def test_linked_folders_are_followed_once(tiny_images, tmp_path):
    copy = shutil.copytree(tiny_images, tmp_path / "copy")
    (copy / "d").symlink_to(tiny_images / "a")
    (copy / "a" / "loop").symlink_to(copy)
    images = ImageFolder(copy, 8)
    assert images.class_names == ["a", "b", "c", "d"]
    assert len(images) == 14


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "no image"])
def test_folders_without_images_are_user_errors(tmp_path, kind):
    root = tmp_path / "data"
    if kind == "file":
        root.write_text("x")
    elif kind != "missing":
        root.mkdir()
    if kind == "no image":
        (root / "a" / "x.png").mkdir(parents=True)  # a folder, whatever its name
    with pytest.raises(UserError, match="--data-path .*data"):
        ImageFolder(root, 8)


def make_files(root: Path, *names: str) -> Path:
    """Files with these names; those that end in an image type are images of 9 x 9 pixels."""
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix in (".png", ".gif", ".jfif"):
            noise_image(9, 9).save(file)
        else:
            file.write_bytes(b"x")
    return root


def test_a_folder_without_class_folders_is_one_class(tmp_path):
    images = ImageFolder(make_files(tmp_path / "faces", "1.png", "2.png", ".cache/3.png"), 8)
    assert images.class_names == ["faces"]
    assert images.labels == [0, 0]
    assert images.paths == ["1.png", "2.png"]
    (note,) = images.notes
    assert "faces: no class folders, so its 2 images are one class" in note


def test_what_is_not_read_is_counted_by_type(tmp_path):
    heic = ["a/1.HEIC", "a/2.heic", "b/3.heic", "a/notes.txt", "b/none"]
    images = ImageFolder(make_files(tmp_path, "a/1.png", "beside.png", *heic), 8)
    empty, beside, types = images.notes
    assert empty.endswith("no image of these classes: 'b'")
    assert beside.endswith("1 images beside the class folders are not read, such as 'beside.png'")
    assert types.endswith("left out: 3 .heic, 1 without an ending, 1 .txt")
    with pytest.raises(UserError, match="b: holds no image, but 1 without an ending, 1 .heic"):
        ImageFolder(tmp_path / "b", 8)


def test_the_types_are_those_that_pillow_decodes(tmp_path):
    names = ["a/1.gif", "a/2.jfif", "a/3.hdf", "a/4.eps", "a/5.mpg"]
    images = ImageFolder(make_files(tmp_path, *names), 8)
    assert images.paths == names[:2]
    assert images[0][0].shape == (8, 8, 3)
    # The content decides what a file is: a program in PostScript is none, whatever its name
    (tmp_path / "a" / "1.gif").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    )
    with pytest.raises(UnreadableImage, match="cannot identify"):
        images[0]


def test_junk_folders_are_no_classes(tmp_path):
    junk = ["__MACOSX/a/1.png", ".ipynb_checkpoints/1.png", "a/@eaDir/1.png"]
    assert ImageFolder(make_files(tmp_path, "a/1.png", *junk), 8).paths == ["a/1.png"]
    assert [path.name for path in scan(tmp_path).images] == ["1.png"]


PARENTS = [
    ["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png"],
    ["train/a/1.png", "val/a/1.png", "labels.csv"],
    ["train/a/1.png", "train/b/1.png", "test/1.png"],
    ["PetImages/cat/1.png", "PetImages/dog/1.png"],
]


@pytest.mark.parametrize("names", PARENTS)
def test_the_parent_of_data_sets_is_recognised(tmp_path, names):
    example = tmp_path / names[0].split("/")[0]
    with pytest.raises(UserError, match=f"parent of data sets.*give one of them, such as {example}$"):
        ImageFolder(make_files(tmp_path, *names), 8)
    assert ImageFolder(example, 8).class_names


def test_one_folder_within_each_class_is_no_parent(tmp_path):
    names = ["n01/images/1.png", "n01/images/2.png", "n02/images/1.png"]
    assert ImageFolder(make_files(tmp_path, *names), 8).labels == [0, 0, 1]


def test_class_table_is_safe_and_short():
    assert class_table(["1", "10", "2"]) == "0 '1', 1 '10', 2 '2'"
    names = ["caf\udce9", "new\nline", "x" * 200, *map(str, range(100))]
    table = class_table(names)
    assert table.startswith("0 'caf\\udce9', 1 'new\\nline', 2 'xxx")
    assert table.endswith("17 '14', ..., 102 '99'")
    assert "\n" not in table
    assert len(table) < 400


@pytest.mark.parametrize(
    "kind", ["empty", "text", "truncated", "dangling", "pipe", "bomb", "elongated", "float"]
)
def test_unreadable_files_say_why(tmp_path, kind):
    file = tmp_path / "a" / "x.png"
    file.parent.mkdir()
    if kind == "dangling":
        file.symlink_to(tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "bomb":
        file.write_bytes(
            b"P5 20000 20000 255\n" + bytes(1000)
        )  # whatever it is called, Pillow sees a PGM of 400 megapixels
    elif kind == "elongated":
        Image.new("1", (1, 2**21)).save(file)
    elif kind == "float":
        Image.new("F", (9, 9)).save(file, format="TIFF")
    else:
        noise_image(50, 50).save(file)
        whole = file.read_bytes()
        file.write_bytes({"empty": b"", "text": b"not an image", "truncated": whole[: len(whole) // 2]}[kind])
    with pytest.raises(UnreadableImage) as caught:
        ImageFolder(tmp_path, 8)[0]
    assert caught.value.path == "a/x.png"
    assert caught.value.reason
    assert "\n" not in str(caught.value)


def test_sixteen_bit_grey_is_scaled(tmp_path):
    image = one_image(tmp_path, Image.fromarray(np.full((8, 8), 0x8080, np.uint16)))
    assert (image == 0x80).all()


def test_transparency_is_composited_onto_white(tmp_path):
    assert (one_image(tmp_path, Image.new("RGBA", (8, 8), (0, 0, 0, 0))) == 255).all()


def test_transparent_palette_is_composited_onto_white(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([9, 9, 9, 50, 60, 70])
    image.paste(0, (0, 0, 8, 4))
    pixels = one_image(tmp_path, image, transparency=0)
    assert (pixels[:4] == 255).all()
    assert (pixels[4:] == (50, 60, 70)).all()


def test_cmyk_becomes_rgb(tmp_path):
    image = one_image(tmp_path, Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "x.jpg", quality=100)
    assert np.abs(image.astype(int) - (0, 255, 255)).max() <= 3


def test_exif_orientation_is_not_applied(tmp_path):
    image, exif = Image.new("L", (8, 8)), Image.Exif()
    image.paste(255, (0, 0, 8, 4))
    exif[0x0112] = 6  # rotate by 90 degrees for display
    pixels = one_image(tmp_path, image, exif=exif)
    assert (pixels[:4] == 255).all()
    assert (pixels[4:] == 0).all()
