"""The file of samples that the ADM evaluation suite reads.

`arr_0` holds images (N, H, W, 3) uint8, `arr_1` labels (N,) int64 if the images have any, and CLASS_NAMES the names
of all classes where they are known. The suite ignores the last.
"""

import json
import zipfile
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
    write_file(path, lambda stream: _write(stream, pngs, arrays))


def _write(stream: BinaryIO, pngs: list[Path], arrays: dict[str, np.ndarray]) -> None:
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        # The header, which needs the shape of all images, and then one image after the other
        with Image.open(pngs[0]) as first:
            width, height = first.size
        shape = (len(pngs), height, width, 3)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            npy.write_array_header_1_0(file, header)
            for png in pngs:
                pixels = np.asarray(Image.open(png).convert("RGB"))
                file.write(pixels.tobytes())
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                npy.write_array(file, values, allow_pickle=False)
