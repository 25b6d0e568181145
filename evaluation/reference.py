"""The reference batch of a data set: images and statistics in one `.npz` of the ADM format.

With Inception features it holds `arr_0`, `mu`, `sigma`, `mu_s` and `sigma_s`, which the ADM suite reads too.
The statistics cover all images. `arr_0` holds at most 10,000 of them, drawn at random, for precision and
recall.
"""

import json
from pathlib import Path

import numpy as np

from data.files import write_file
from data.streams import rng
from evaluation.adm_npz import INCEPTION_KEYS, META, OTHER_KEYS, read_meta
from evaluation.comparison import PR_REFERENCE_IMAGES
from evaluation.extractors import Extractor
from evaluation.feature_cache import FeatureChunks
from evaluation.image_sets import FolderImages
from sampling.npz import CLASS_NAMES, write_archive

BATCH = 256  # images in memory at a time


def write_reference(path: Path, images: FolderImages, chunks: FeatureChunks, extractor: Extractor) -> int:
    """Write the file and return the number of images in `arr_0`."""
    # The images to keep
    shuffled = rng(0, "reference").permutation(len(images))
    chosen = np.sort(shuffled[:PR_REFERENCE_IMAGES])
    arrays = {}
    if images.labels is not None:
        arrays["arr_1"] = images.labels[chosen]
        arrays[CLASS_NAMES] = np.array(json.dumps(images.class_names))

    # Statistics of all images
    names = INCEPTION_KEYS if extractor.is_inception else OTHER_KEYS
    for kind, (mean_name, covariance_name) in names.items():
        gaussian = chunks.gaussian(kind)
        arrays[mean_name] = gaussian.mean
        arrays[covariance_name] = gaussian.covariance

    # A note on how the file was made
    meta = {
        "extractor": extractor.name,
        "images": len(images),
        "image_size": images.size.plain,
        "lossy": images.lossy,
        "content": images.digest(),
    }
    arrays[META] = np.array(json.dumps(meta))

    shape = (len(chosen), *images.size, 3)
    parts = (images.read(chosen[start : start + BATCH]) for start in range(0, len(chosen), BATCH))
    write_file(path, lambda stream: write_archive(stream, shape, parts, arrays))
    return len(chosen)


def is_reference_of(path: Path, images: FolderImages, extractor: Extractor) -> bool:
    """Whether a file is what `write_reference` makes of these images, or did in an earlier version."""
    try:
        meta = read_meta(path)
    except Exception:  # there is no end to what parsers raise on files of another kind
        return False
    own = {"extractor": extractor.name, "images": len(images), "image_size": images.size.plain}
    if any(meta[key] != value for key, value in own.items()):
        return False
    return meta.get("content") in (None, images.digest())
