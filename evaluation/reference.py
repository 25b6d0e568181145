"""The reference batch of a data set: images and statistics in one `.npz` of the ADM format.

With Inception features it holds `arr_0`, `mu`, `sigma`, `mu_s`, `sigma_s`, which the ADM suite reads too. The statistics are
those of all images; `arr_0` holds up to 10,000 of them, drawn at random, for precision and recall.
"""

import json
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from data.files import write_file
from data.streams import rng
from evaluation.image_sets import INCEPTION_KEYS, META, OTHER_KEYS, FolderImages
from evaluation.measure import PR_REFERENCE_IMAGES, Chunks, Extractor


def write_reference(path: Path, images: FolderImages, chunks: Chunks, extractor: Extractor) -> int:
    """Write the file; returns how many images `arr_0` holds."""
    chosen = np.sort(rng(0, "reference").permutation(len(images))[:PR_REFERENCE_IMAGES])
    arrays = {"arr_1": images.labels[chosen]} if images.labels is not None else {}
    for kind, names in (INCEPTION_KEYS if extractor.is_inception else OTHER_KEYS).items():
        arrays |= dict(zip(names, chunks.gaussian(kind)))
    meta = {"extractor": extractor.name, "images": len(images), "image_size": images.size[0]}
    arrays[META] = np.array(json.dumps(meta))
    write_file(path, lambda stream: _write(stream, images, chosen, arrays))
    return len(chosen)


def _write(stream: BinaryIO, images: FolderImages, chosen: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(chosen), *images.size, 3)}
            npy.write_array_header_1_0(file, header)
            for start in range(0, len(chosen), 256):
                file.write(images.read(chosen[start : start + 256]).tobytes())
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                npy.write_array(file, values, allow_pickle=False)
