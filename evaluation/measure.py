"""Features of images in files, and the comparison of two sides.

Features are computed in chunks, and each chunk is a file: processes share the work by writing different ones, an interrupted
run finds what is done, and no result depends on the number of processes.
"""

import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from config import UserError
from data.files import write_file
from data.streams import rng
from evaluation import metrics
from evaluation.extractors import Inception, Outputs, Scripted, Timm
from evaluation.image_sets import FolderImages, NpzImages, Source
from evaluation.metrics import Gaussian, Moments
from sampling.accounting import image_tflop
from sampling.generate import SampledBatch, SamplingOptions, TrainedModel, generate

Extractor = Inception | Scripted | Timm
FORMAT = 1  # of cached features; a change of what they are must raise it
CHUNK = 256  # images per file
BATCH = 64  # images per call of the extractor, as in the ADM suite
PR_REFERENCE_IMAGES = 10_000  # precision and recall compare with this many at most, as in the ADM suite


class Chunks:
    """`folder/NNNNN.npz`, each with the same arrays for `size` consecutive rows of `count`."""

    def __init__(self, folder: Path, count: int, size: int):
        self.folder, self.count, self.size = folder, count, size
        self.ranges = [range(start, min(start + size, count)) for start in range(0, count, size)]

    def path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:05d}.npz"

    def missing(self, rank: int, world: int) -> list[int]:
        """Chunks that this process has to make: those without a file, or with one that is empty or ends early."""
        return [
            chunk
            for chunk in range(len(self.ranges))[rank::world]
            if not zipfile.is_zipfile(self.path(chunk))
        ]

    def write(self, chunk: int, arrays: dict[str, np.ndarray]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(self.path(chunk), lambda stream: np.savez(stream, **arrays), shared=True)

    def has(self, name: str) -> bool:
        with np.load(self.path(0), allow_pickle=False) as arrays:
            return name in arrays.files

    def parts(self, name: str):
        for chunk in range(len(self.ranges)):
            with np.load(self.path(chunk), allow_pickle=False) as arrays:
                yield arrays[name]

    def read(self, name: str) -> np.ndarray:
        return np.concatenate(list(self.parts(name)))

    def gaussian(self, name: str) -> Gaussian:
        """Mean and covariance of all rows, one chunk in memory at a time."""
        moments = None
        for rows in self.parts(name):
            moments = moments or Moments(rows.shape[1])
            moments.add(rows)
        return moments.gaussian()


def run_extractor(extractor: Extractor, images: torch.Tensor) -> Outputs:
    """Outputs for images (B, 3, H, W) uint8, in full float32: TF32 convolutions would cost digits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return extractor(images.to(extractor.device))


def as_arrays(batches: list[Outputs]) -> dict[str, np.ndarray]:
    """Outputs of consecutive batches as arrays (n, ...), without what the extractor does not give."""
    columns = {name: [getattr(batch, name) for batch in batches] for name in Outputs._fields}
    return {
        name: torch.cat(values).cpu().numpy() for name, values in columns.items() if values[0] is not None
    }


def extract(
    images: FolderImages | NpzImages, extractor: Extractor, cache: Path, rank: int = 0, world: int = 1
) -> Chunks:
    """Features of all images, in a folder of `cache` named by the content of images and extractor. Collective."""
    folder = cache / f"{FORMAT}-{images.digest()[:32]}-{extractor.name.replace(':', '-')[:48]}"
    chunks = Chunks(folder, len(images), CHUNK)
    todo = chunks.missing(rank, world)
    with tqdm(
        total=sum(len(chunks.ranges[c]) for c in todo), unit="img", disable=rank > 0, desc="features"
    ) as bar:
        for chunk in todo:
            try:
                pixels = (
                    torch.from_numpy(images.read(chunks.ranges[chunk]).copy())
                    .permute(0, 3, 1, 2)
                    .contiguous()
                )
            except UserError as error:
                if rank > 0:
                    tqdm.write(
                        f"error: {error}", file=sys.stderr
                    )  # cli.run reports what the first process finds only
                raise
            batches = []
            for batch in pixels.split(BATCH):
                batches.append(run_extractor(extractor, batch))
                bar.update(len(batch))
            chunks.write(chunk, as_arrays(batches))
    if world > 1:
        dist.barrier()
    return chunks


class Measured:
    """One side of a comparison: features image by image, or stored statistics, or both (which then come first, as in ADM).

    Args:
        name: for messages.
        chunks: features of the images, or None.
        stored: statistics by kind, "features" or "spatial".
        labels: class of each image (N,), or None.
    """

    def __init__(
        self, name: str, chunks: Chunks | None, stored: dict[str, Gaussian], labels: np.ndarray | None
    ):
        self.name, self.chunks, self.labels = name, chunks, labels
        self.gaussians = dict(stored)

    def gaussian(self, kind: str) -> Gaussian | None:
        """Computed once; None where the side does not have this kind."""
        if kind not in self.gaussians and self.chunks is not None and self.chunks.has(kind):
            self.gaussians[kind] = self.chunks.gaussian(kind)
        return self.gaussians.get(kind)

    @property
    def count(self) -> int | None:
        """Images behind the statistics, where it is known."""
        return self.gaussian("features").count

    @property
    def width(self) -> int:
        """Features per image."""
        return len(self.gaussian("features").mean)


def check_source(source: Source, extractor: Extractor) -> None:
    """Refuse statistics that another extractor made, before any work."""
    stored = source.stored(extractor.name)
    made_with = source.meta.get("extractor")
    if made_with and made_with != extractor.name:
        raise UserError(
            f"'{source.path}': was made with the features {made_with[:24]}, not {extractor.name[:24]}; make it again with the "
            "same --features"
        )
    if source.images is None and "features" not in stored:
        raise UserError(f"'{source.path}': holds statistics of other features only; give its images")
    for kind, width in (("features", 2048), ("spatial", 2023)):
        if extractor.is_inception and kind in stored and len(stored[kind].mean) != width:
            raise UserError(
                f"'{source.path}': {kind} have {len(stored[kind].mean)} values, but Inception gives {width}"
            )
    if source.images is not None and len(source.images) <= metrics.NEIGHBOURS:
        raise UserError(
            f"'{source.path}': {len(source.images)} images are too few; give at least {metrics.NEIGHBOURS + 1}"
        )


def measure_source(
    source: Source, extractor: Extractor, cache: Path, rank: int = 0, world: int = 1
) -> Measured:
    """Features and statistics of one side. Collective."""
    stored = source.stored(extractor.name)
    chunks = extract(source.images, extractor, cache, rank, world) if source.images is not None else None
    return Measured(
        str(source.path), chunks, stored, source.images.labels if source.images is not None else None
    )


def check_sizes(samples: tuple[int, int] | None, reference: tuple[int, int] | None) -> None:
    if samples and reference and samples != reference:
        raise UserError(
            f"the samples are {samples[0]} x {samples[1]} pixels and the reference's images {reference[0]} x {reference[1]}; "
            "compare images of one size"
        )


def compare(samples: Measured, reference: Measured, extractor: Extractor) -> dict[str, float]:
    """Every metric that the two sides and the extractor allow.

    Keys: `fid`, `sfid`, `inception_score` of Inception, `frechet_distance` of any other extractor; `precision`, `recall`;
    `class_accuracy` where the samples have labels and the extractor is a classifier.
    """
    found = {}
    for kind, name in (
        ("features", "fid" if extractor.is_inception else "frechet_distance"),
        ("spatial", "sfid"),
    ):
        ours, theirs = samples.gaussian(kind), reference.gaussian(kind)
        if ours is not None and theirs is not None:
            found[name] = metrics.frechet_distance(ours, theirs)
    if samples.chunks is None:
        return found
    if samples.chunks.has("logits"):
        logits = samples.chunks.read("logits")
        if extractor.is_inception:
            found["inception_score"] = metrics.inception_score(logits)
        elif samples.labels is not None and samples.labels.max() < logits.shape[1]:
            found["class_accuracy"] = metrics.class_accuracy(logits, samples.labels)
    if reference.chunks is not None:
        known = reference.chunks.read("features")
        if len(known) > PR_REFERENCE_IMAGES:
            known = known[
                np.sort(rng(0, "precision and recall").permutation(len(known))[:PR_REFERENCE_IMAGES])
            ]
        device = extractor.device if extractor.device.type == "cuda" else "cpu"  # MPS has no float64
        pair = metrics.precision_recall(known, samples.chunks.read("features"), device)
        found["precision"], found["recall"] = pair
    return found


def rank_warning(name: str, count: int | None, width: int) -> str | None:
    """A line where `count` images cannot give `width` features a covariance of full rank."""
    if count is None or count > width:
        return None
    return (
        f"warning: {name}: {count} images give {width} features a covariance of rank {count - 1} at most; distances are "
        f"comparable only between sets of this size; give {width + 1} or more"
    )


# ---------------------------------------------------------- a trained model, measured while it samples


def measure_batch(trained: TrainedModel, batch: SampledBatch, extractor: Extractor) -> dict[str, np.ndarray]:
    """What is kept of a batch, a row per image: features, cost in TFLOP and kept share of the conditional branch."""
    share = (
        torch.stack([step.conditional for step in batch.kept]).double().mean(0).cpu().numpy()
        / trained.config.tokens
    )
    return as_arrays([run_extractor(extractor, batch.images)]) | {
        "tflop": image_tflop(trained.config, batch.kept),
        "kept": share,
    }


def measure_samples(
    trained: TrainedModel,
    options: SamplingOptions,
    labels: list[int],
    extractor: Extractor,
    folder: Path,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    title: str = "samples",
) -> Chunks:
    """Sample image i with labels[i] for all i and keep its features in `folder`, a file per batch.

    Batches that have a file are not sampled again, and process `rank` of `world` makes its share. When all processes have
    returned, the result is complete; it does not depend on their number.
    """
    chunks = Chunks(folder, len(labels), batch_size)
    todo = chunks.missing(rank, world)
    with tqdm(
        total=sum(len(chunks.ranges[c]) for c in todo), unit="img", disable=rank > 0, desc=title
    ) as bar:
        for chunk in todo:
            index = list(chunks.ranges[chunk])
            (batch,) = generate(trained, index, [labels[i] for i in index], options, batch_size)
            chunks.write(chunk, measure_batch(trained, batch, extractor))
            bar.update(len(index))
    return chunks


def mean_of(chunks: Chunks, name: str) -> float:
    return float(chunks.read(name).mean())
