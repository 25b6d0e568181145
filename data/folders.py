"""Which files of a folder are images, and which class each belongs to.

Order and class numbers are those of torchvision's `ImageFolder`: sorted class folders, files below them sorted
folder by folder. Beyond that:

- The file types are those that the installed Pillow decodes. Other files are counted by type.
- Hidden files and folders are skipped, and so are folders that archivers and systems leave behind.
- A class folder without images keeps its class number.
- A folder with images but without class folders is one class, named after the folder.
- The parent of several data sets, such as train/ and val/, is an error.
"""

import functools
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageFile

from config import UserError

# What archivers, file servers and desktops leave in folders.
JUNK_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
# Folders of these names are parts of a data set, and no classes.
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "eval", "dev"}
# Names that a message lists.
MAX_NAMED = 5
# Classes that the table lists at most, and characters of each name.
MAX_CLASSES = 20
MAX_NAME = 40


class Scan(NamedTuple):
    """The visible files below a folder."""

    images: list[Path]  # sorted by folder and then by name
    other_types: Counter[str]  # number of all other files by type, such as ".txt"


@dataclass(frozen=True)
class Listing:
    """Images and classes of a data set.

    Attributes:
        root: the folder.
        class_names: sorted; the label is the position in this list.
        paths: file names relative to the folder with forward slashes, in the order of their index.
        labels: one class number per path.
        notes: lines that a user should read, such as what is not read and why.
    """

    root: Path
    class_names: list[str]
    paths: list[str]
    labels: list[int]
    notes: list[str]


def list_dataset(root: Path, option: str) -> Listing:
    """List the images of a data set and open none.

    Args:
        root: a folder with one sub-folder of images per class, or with images only.
        option: what the user calls the folder, for messages.

    Raises:
        UserError: there is no such folder, no image, or the folder holds several data sets.
    """
    if not root.is_dir():
        raise UserError(
            f"{option} {root}: no such folder; give a folder with one sub-folder of images per class"
        )
    class_names = list_class_folders(root)
    scans = [scan(root / name) for name in class_names]
    outside = scan(root, deep=False)
    other_types: Counter[str] = sum((folder.other_types for folder in scans), Counter())
    is_flat = not any(folder.images for folder in scans)
    if is_flat:
        class_names = [root.resolve().name]
        scans = [outside]
        other_types += outside.other_types
    if not any(folder.images for folder in scans):
        types = f", but {count_types(other_types)}" if other_types else ""
        raise UserError(
            f"{option} {root}: holds no image{types}; give a folder with one sub-folder of images per class"
        )
    check_is_one_dataset(root, option, class_names, scans)

    # Number the images
    paths = []
    labels = []
    for label, folder in enumerate(scans):
        for path in folder.images:
            paths.append(path.relative_to(root).as_posix())
            labels.append(label)

    # Say what is unusual
    notes = []
    if is_flat:
        notes.append(f"{option} {root}: no class folders, so its {len(paths):,} images are one class")
    empty = [name for name, folder in zip(class_names, scans) if not folder.images]
    if empty:
        notes.append(f"warning: {option} {root}: no image of these classes: {quote_some(empty)}")
    if outside.images and not is_flat:
        notes.append(
            f"warning: {option} {root}: {len(outside.images):,} images beside the class folders are not read, "
            f"such as {quote(outside.images[0].name)}"
        )
    if other_types:
        notes.append(
            f"warning: {option} {root}: files that Pillow does not read are left out: "
            f"{count_types(other_types)}"
        )
    return Listing(root, class_names, paths, labels, notes)


# ------------------------------------------------------------------------------------------- files and folders


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the image formats that it decodes by itself."""
    Image.init()
    formats = []
    for name, (factory, _) in Image.OPEN.items():
        # Pillow recognises files such as HDF5 without decoding them
        is_stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
        # MPEG is a video; EPS is a program, for which Pillow would start Ghostscript
        is_image = Image.MIME.get(name, "image/").startswith("image/")
        if is_image and not is_stub:
            formats.append(name)
    return tuple(formats)


@functools.cache
def image_types() -> tuple[str, ...]:
    """Endings of the files that are read as images, such as ".png"."""
    extensions = Image.registered_extensions()
    return tuple(ending for ending, name in extensions.items() if name in readable_formats())


def is_visible_folder(name: str) -> bool:
    """Whether a folder of this name may hold images of a data set."""
    return not name.startswith(".") and name not in JUNK_FOLDERS


def list_class_folders(root: Path) -> list[str]:
    """Names of the class folders of a data set, sorted."""
    names = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    return sorted(name for name in names if is_visible_folder(name))


def scan(folder: Path, deep: bool = True) -> Scan:
    """The visible files below a folder, linked folders included; not deep: those in the folder itself."""
    images = []
    other_types: Counter[str] = Counter()
    for parent, children, files in os.walk(folder, followlinks=True):
        here = Path(parent)
        # Descend into visible folders only, and not into a link to one of the folders above it.
        ancestors = {here.resolve(), *here.resolve().parents}
        visible = [name for name in children if deep and is_visible_folder(name)]
        children[:] = [name for name in visible if (here / name).resolve() not in ancestors]
        for name in files:
            if name.startswith("."):
                continue
            if name.lower().endswith(image_types()):
                images.append(here / name)
            else:
                other_types[Path(name).suffix.lower()] += 1
    images.sort(key=lambda path: (str(path.parent), path.name))
    return Scan(images, other_types)


# ---------------------------------------------------------------------------------------------------- checks


def check_is_one_dataset(root: Path, option: str, class_names: list[str], scans: list[Scan]) -> None:
    """UserError for the parent of several data sets, of which every folder would become a class.

    The folders of such a parent hold several class folders each and no images, or are called train, val and
    the like. One folder within each class, as in Tiny ImageNet, is no sign of it.
    """
    with_images = []
    nested = []
    with_several_folders = []
    for name, folder in zip(class_names, scans):
        if not folder.images:
            continue
        with_images.append(name)
        parts = [path.relative_to(root / name).parts for path in folder.images if path.parent != root]
        if parts and all(len(part) > 1 for part in parts):
            nested.append(name)
            if len({part[0] for part in parts}) > 1:
                with_several_folders.append(name)
    are_splits = bool(nested) and {name.lower() for name in with_images} <= SPLIT_NAMES
    if with_several_folders == with_images or are_splits:
        raise UserError(
            f"{option} {root}: looks like the parent of data sets: {quote_some(with_images)} hold folders of "
            f"images; give one of them, such as {root / nested[0]}"
        )


# -------------------------------------------------------------------------------------------------- messages


def count_types(types: Counter[str]) -> str:
    """ "3 .heic, 1 .txt", the most frequent first."""
    named = sorted(types.items(), key=lambda item: (-item[1], item[0]))[:MAX_NAMED]
    parts = [f"{count:,} {ending or 'without an ending'}" for ending, count in named]
    rest = types.total() - sum(count for _, count in named)
    if rest:
        parts.append(f"{rest:,} of other types")
    return ", ".join(parts)


def quote_some(names: list[str]) -> str:
    """The first names, safe to print, and the number of all if there are more."""
    quoted = ", ".join(quote(name) for name in names[:MAX_NAMED])
    return quoted if len(names) <= MAX_NAMED else f"{quoted} and {len(names) - MAX_NAMED:,} more"


def quote(name: str) -> str:
    """A file name in one short line: line breaks and bytes that are not UTF-8 are escaped."""
    return repr(name if len(name) <= MAX_NAME else name[: MAX_NAME - 3] + "...")


def class_table(class_names: list[str]) -> str:
    """ "0 'cat', 1 'dog'": the label of each class, the middle left out if there are many."""
    entries = [f"{label} {quote(name)}" for label, name in enumerate(class_names)]
    if len(entries) > MAX_CLASSES:
        entries = [*entries[: MAX_CLASSES - 2], "...", entries[-1]]
    return ", ".join(entries)
