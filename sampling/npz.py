"""The file of samples that the ADM evaluation suite reads.

`arr_0` holds images (N, H, W, 3) uint8, `arr_1` labels (N,) int64, if the images have any.
"""

import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from data.files import write_file


def write_npz(path: Path, pngs: list[Path], labels: list[int] | None) -> None:
    """Collect PNG files of one size into a .npz, one image in memory at a time."""
    write_file(path, lambda stream: _write(stream, pngs, labels))


def _write(stream: BinaryIO, pngs: list[Path], labels: list[int] | None) -> None:
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
        if labels is None:
            return
        with archive.open("arr_1.npy", "w", force_zip64=True) as file:
            npy.write_array(file, np.array(labels, dtype=np.int64))
