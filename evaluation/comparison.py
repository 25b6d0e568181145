"""The comparison of two sets of images by every metric that their features allow."""

import math
from pathlib import Path

import numpy as np
import torch

from config import UserError
from data.streams import rng
from evaluation import metrics
from evaluation.class_labels import ClassLabels, match_classes
from evaluation.extractors import Extractor
from evaluation.feature_cache import FeatureChunks, extract
from evaluation.image_sets import Source
from evaluation.metrics import Gaussian
from processes.group import Processes

# Keys of `compare` -> names for people
METRIC_NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "frechet_distance": "Fréchet distance",
    "kid": "KID",
    "kid_std": "KID, std",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "class_accuracy": "class accuracy",
}
INCEPTION_WIDTHS = {"features": 2048, "spatial": 2023}
# Reference images that precision and recall use at most, as in the ADM suite
PR_REFERENCE_IMAGES = 10_000


class FeatureSet:
    """One side of a comparison: features image by image, or stored statistics, or both.

    Stored statistics take precedence over those of the features, as in the ADM suite.

    Args:
        name: for messages.
        chunks: features of the images, or None.
        stored: statistics by kind, "features" or "spatial".
        labels: class of each image, or None.
    """

    def __init__(
        self,
        name: str,
        chunks: FeatureChunks | None,
        stored: dict[str, Gaussian],
        labels: ClassLabels | None,
    ):
        self.name = name
        self.chunks = chunks
        self.labels = labels
        self._gaussians = dict(stored)

    def gaussian(self, kind: str) -> Gaussian | None:
        """Statistics of one kind, computed once; None where there are none."""
        if kind not in self._gaussians and self.chunks is not None and self.chunks.has(kind):
            self._gaussians[kind] = self.chunks.gaussian(kind)
        return self._gaussians.get(kind)

    @property
    def count(self) -> int | None:
        """Images behind the statistics, where it is known."""
        return self._features.count

    @property
    def width(self) -> int:
        """Features per image."""
        return len(self._features.mean)

    @property
    def _features(self) -> Gaussian:
        """Statistics of the features, which every side has (see `check_source`)."""
        features = self.gaussian("features")
        assert features is not None
        return features


def check_source(source: Source, extractor: Extractor) -> None:
    """Check, before any work, that a side can be compared by the features of this extractor.

    Raises:
        UserError: statistics of another extractor or of the wrong size, or too few images.
    """
    # Statistics of the right features
    stored = source.stored(extractor.name)
    made_with = source.meta.get("extractor")
    if made_with and made_with != extractor.name:
        raise UserError(
            f"'{source.path}': was made with the features {made_with[:24]}, not {extractor.name[:24]}; "
            "make it again with the same --features"
        )
    if source.images is None and "features" not in stored:
        raise UserError(f"'{source.path}': holds statistics of other features only; give its images")
    if extractor.is_inception:
        check_widths(source, stored)

    # Enough images for precision and recall
    least = metrics.NEIGHBOURS + 1
    if source.images is not None and len(source.images) < least:
        count = len(source.images)
        raise UserError(f"'{source.path}': {count} images are too few; give at least {least}")


def check_widths(source: Source, stored: dict[str, Gaussian]) -> None:
    """UserError unless stored statistics have the sizes of Inception's features."""
    for kind, gaussian in stored.items():
        width = len(gaussian.mean)
        if width != INCEPTION_WIDTHS[kind]:
            raise UserError(
                f"'{source.path}': {kind} have {width} values, but Inception gives {INCEPTION_WIDTHS[kind]}"
            )


def check_sizes(samples: tuple[int, int] | None, reference: tuple[int, int] | None) -> None:
    """UserError unless both sides have images of one (height, width), as far as it is known."""
    if samples and reference and samples != reference:
        drawn = f"{samples[0]} x {samples[1]}"
        known = f"{reference[0]} x {reference[1]}"
        raise UserError(
            f"the samples are {drawn} pixels and the reference's images {known}; compare images of one size"
        )


def measure_source(source: Source, extractor: Extractor, cache: Path, processes: Processes) -> FeatureSet:
    """Features and statistics of one side. Collective."""
    chunks = None
    if source.images is not None:
        chunks = extract(source.images, extractor, cache, processes)
    return FeatureSet(str(source.path), chunks, source.stored(extractor.name), source.labels)


def compare(samples: FeatureSet, reference: FeatureSet, extractor: Extractor) -> dict[str, float]:
    """Every metric that the two sides and the extractor allow.

    Keys: `fid`, `sfid` and `inception_score` of Inception; `frechet_distance` of any other extractor;
    `kid`, and `kid_std` of one subset; `precision` and `recall`; `class_accuracy` where the extractor knows the
    samples' classes.

    Raises:
        UserError: a metric is not finite, or the sides have features of different width.
    """
    values = distances(samples, reference, extractor)
    # The others need features image by image
    if samples.chunks is not None and samples.chunks.has("logits"):
        logits = samples.chunks.read("logits")
        values |= classifier_metrics(logits, samples.labels, extractor)
    if samples.chunks is not None and reference.chunks is not None:
        # In float64, which MPS does not have
        device = extractor.device if extractor.device.type == "cuda" else torch.device("cpu")
        values |= kernel_metrics(samples.chunks, reference.chunks, device)
        values |= manifold_metrics(samples.chunks, reference.chunks, device)

    for name, value in values.items():
        if not math.isfinite(value):
            sides = f"{samples.name} and {reference.name}"
            raise UserError(f"{METRIC_NAMES[name]} of {sides} is not finite; give other --features")
    return values


def distances(samples: FeatureSet, reference: FeatureSet, extractor: Extractor) -> dict[str, float]:
    """Fréchet distances of the features, and of the spatial features where both sides have them."""
    names = {"features": "fid" if extractor.is_inception else "frechet_distance", "spatial": "sfid"}
    values = {}
    for kind, name in names.items():
        drawn = samples.gaussian(kind)
        known = reference.gaussian(kind)
        if drawn is not None and known is not None:
            if len(drawn.mean) != len(known.mean):
                widths = f"{len(known.mean)} features, and the samples' images {len(drawn.mean)}"
                raise UserError(f"{reference.name}: has statistics of {widths}; make it again")
            values[name] = metrics.frechet_distance(drawn, known)
    return values


def classifier_metrics(
    logits: np.ndarray, labels: ClassLabels | None, extractor: Extractor
) -> dict[str, float]:
    """Inception Score, or the class accuracy of another classifier that knows all classes of the labels."""
    if extractor.is_inception:
        return {"inception_score": metrics.inception_score(logits)}
    numbers = match_classes(labels, extractor.class_names, logits.shape[1]).numbers
    if numbers is None:
        return {}
    return {"class_accuracy": metrics.class_accuracy(logits, numbers)}


def class_note(samples: FeatureSet, extractor: Extractor) -> str:
    """Why the class accuracy is missing or how classes were matched; nothing where there is nothing to say."""
    if extractor.is_inception or samples.chunks is None or not samples.chunks.has("logits"):
        return ""
    num_classes = samples.chunks.read("logits").shape[1]
    return match_classes(samples.labels, extractor.class_names, num_classes).note


def kernel_metrics(
    samples: FeatureChunks, reference: FeatureChunks, device: torch.device
) -> dict[str, float]:
    """KID, and its standard deviation over subsets where both sides have more images than a subset."""
    distance = metrics.kernel_distance(reference.read("features"), samples.read("features"), device)
    values = {"kid": distance.mean}
    if distance.std is not None:
        values["kid_std"] = distance.std
    return values


def manifold_metrics(
    samples: FeatureChunks, reference: FeatureChunks, device: torch.device
) -> dict[str, float]:
    """Precision and recall against all reference images, or against a fixed random choice of 10,000."""
    known = reference.read("features")
    if len(known) > PR_REFERENCE_IMAGES:
        shuffled = rng(0, "precision and recall").permutation(len(known))
        known = known[np.sort(shuffled[:PR_REFERENCE_IMAGES])]
    precision, recall = metrics.precision_recall(known, samples.read("features"), device)
    return {"precision": precision, "recall": recall}


def compression_warning(samples: Source | None, reference: Source) -> str | None:
    """A warning where one side alone has lossily compressed images; samples None: they come from a model."""
    drawn = samples.lossy if samples is not None else 0
    if bool(drawn) == bool(reference.lossy):
        return None
    lossy = samples if samples is not None and drawn else reference
    return (
        f"warning: '{lossy.path}': {lossy.lossy} images are lossily compressed, like JPEG, and the other side has "
        "none; this alone changes distances; compare images that are stored alike"
    )


def rank_warning(name: str, count: int | None, width: int) -> str | None:
    """A warning where `count` images cannot give `width` features a covariance of full rank."""
    if count is None or count > width:
        return None
    return (
        f"warning: {name}: {count} images give {width} features a covariance of rank {count - 1} at most; "
        f"distances are comparable only between sets of this size; give {width + 1} or more"
    )
