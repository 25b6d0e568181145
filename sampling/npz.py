"""The file of samples that the ADM evaluation suite reads.

`arr_0` holds images (N, H, W, 3) uint8, `arr_1` labels (N,) int64 if the images have any, and CLASS_NAMES the names
of all classes where they are known. The suite ignores the last.
"""

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from data.files import write_file

# Names of the classes by label, as JSON in an array of text
CLASS_NAMES = "dcdit_class_names"


def write_npz(path: Path, pngs: list[Path], labels: list[int] | None, class_names: list[str] | None) -> None:
    """Collect PNG files of one size into a .npz, one image in memory at a time."""
    arrays = {}
    if labels is not None:
        arrays["arr_1"] = np.array(labels, dtype=np.int64)
    if labels is not None and class_names:
        arrays[CLASS_NAMES] = np.array(json.dumps(class_names))
    # The header needs the shape of all images
    with Image.open(pngs[0]) as first:
        width, height = first.size
    shape = (len(pngs), height, width, 3)
    pixels = (np.asarray(Image.open(png).convert("RGB")) for png in pngs)
    write_file(path, lambda stream: write_archive(stream, shape, pixels, arrays))


def write_archive(
    stream: BinaryIO, shape: tuple[int, ...], parts: Iterable[np.ndarray], arrays: dict[str, np.ndarray]
) -> None:
    """Write `arr_0`, images (N, H, W, 3) uint8 of this shape from its parts in order, and the other arrays."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            npy.write_array_header_1_0(file, header)
            for part in parts:
                file.write(part.tobytes())
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                npy.write_array(file, values, allow_pickle=False)
