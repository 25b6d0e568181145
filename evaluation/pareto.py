"""The points of quality against cost: every budget of every checkpoint, sampled and compared with a reference.

`figures/pareto.py` is the command and draws them.
"""

import csv
import hashlib
import io
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import torch.distributed as dist

from config import UserError, one_line
from data.files import write_text
from data.names import short_name
from data.store_files import sha256_of
from evaluation.class_labels import sampled_classes
from evaluation.comparison import (
    METRIC_NAMES,
    FeatureSet,
    check_sizes,
    check_source,
    class_note,
    compare,
    compression_warning,
    measure_source,
    rank_warning,
)
from evaluation.extractors import Extractor, load_extractor
from evaluation.image_sets import Source, open_source
from evaluation.sample_features import SamplePlan, measure_samples
from processes import group
from processes.group import Processes
from processes.lock import FolderLock
from sampling.budgets import ALL, Budget
from sampling.generate import draw_labels
from sampling.load import TrainedModel, load_trained
from sampling.options import SamplingOptions, possible_scale


@dataclass(frozen=True)
class ParetoPlan:
    """Which points to measure, and how."""

    # The points: every checkpoint at every guidance scale and budget
    checkpoints: list[str]
    vae: str | None  # default: the autoencoder that each checkpoint names
    weights: str  # "ema", "model" or the name of an average
    cfg_scales: list[float] | None  # None: without guidance, at the scale that each model can do
    budgets: list[float]  # dropped fractions
    # Dropped fractions of the unconditional branch, measured besides guidance without Lite-CFG
    lite_budgets: list[float]

    # The samples of each point
    num_samples: int
    num_sampling_steps: int
    sampler: str
    seed: int
    bf16: bool
    tf32: bool  # of the network, the autoencoder and the features
    batch_size: int  # per process

    # What they are compared with, and where the results go
    reference: str
    features: str
    inception_weights: str | None
    output: Path


@dataclass(frozen=True)
class ParetoPoint:
    """One way to sample one model."""

    trained: TrainedModel
    cfg_scale: float
    budget: float  # dropped fraction
    lite: float | None  # dropped fraction of the unconditional branch; None: no Lite-CFG

    def __str__(self) -> str:
        name = f"{short_name(self.trained.config.model.name)}, scale {self.cfg_scale}, budget {self.budget}"
        return name if self.lite is None else f"{name}, lite {self.lite}"

    def options(self, plan: ParetoPlan) -> SamplingOptions:
        """How the point is sampled."""
        return SamplingOptions(
            cfg_scale=self.cfg_scale,
            num_sampling_steps=plan.num_sampling_steps,
            sampler=plan.sampler,
            seed=plan.seed,
            bf16=plan.bf16,
            budget=Budget.fraction(self.budget) if self.budget else ALL,
            uncond=None if self.lite is None else Budget.fraction(self.lite),
        )

    def key(self, settings: dict[str, str]) -> str:
        """Name of the point in the table and of its folder: equal keys mean equal samples and comparisons."""
        identity = (
            self.trained.fingerprint,
            self.trained.autoencoder.sha256,
            self.trained.config.diffusion.cfg_channels,
            settings,
            self.cfg_scale,
            self.budget,
            "" if self.lite is None else self.lite,
        )
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]

    def columns(self) -> dict[str, str]:
        """The point's own columns of the table."""
        config = self.trained.config
        return {
            "model": self.trained.fingerprint[:12],
            "name": config.model.name,
            "step": str(self.trained.step),
            "weights": self.trained.weights,
            "training_seed": str(config.training.seed),
            "static": str(config.is_static),
            "cfg_scale": str(self.cfg_scale),
            "budget": str(self.budget),
            "lite_cfg": "" if self.lite is None else str(self.lite),
        }


class PointTable:
    """pareto.csv: a row per point, which all have the same settings, or they could not be compared.

    Raises:
        UserError: the file holds points with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, str]):
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.is_file():
            self.rows = self._read()
        for row in self.rows:
            changes = []
            for key, value in settings.items():
                if row.get(key) != value:
                    changes.append(f"{key} {row.get(key)} instead of {value}")
            if changes:
                points = f"holds points with {', '.join(changes)}"
                raise UserError(f"--output '{path.parent}' {points}; give another folder")

    def _read(self) -> list[dict[str, str]]:
        try:
            with open(self.path, encoding="utf-8", newline="") as stream:
                rows = list(csv.DictReader(stream))
        except (ValueError, csv.Error) as error:
            raise UserError(
                f"'{self.path}' cannot be read ({one_line(error)}); give another --output"
            ) from None
        # A spreadsheet program may have written it with other separators, or rounded and emptied cells
        if not rows and self.path.stat().st_size or not all(is_point(row) for row in rows):
            raise UserError(f"'{self.path}' is not a table of points; give another --output")
        return rows

    def has(self, key: str) -> bool:
        """Whether the point of this key has a row."""
        return any(row["point"] == key for row in self.rows)

    def write(self) -> None:
        """Write all rows; metrics that only some points have leave empty cells in the others."""
        columns: dict[str, None] = {}
        for row in self.rows:
            columns |= dict.fromkeys(row)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(columns), restval="")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())


def is_point(row: dict[str, str]) -> bool:
    """Whether a row of the table has what the figure shows."""
    numbers = [row.get(key) for key in ("cfg_scale", "budget", "tflop_per_image", "step")]
    numbers += [row[key] for key in METRIC_NAMES if row.get(key)]
    try:
        finite = [math.isfinite(float(number or "")) for number in numbers]
    except ValueError:
        return False
    has_metric = row.get("fid") or row.get("frechet_distance")
    return all(finite) and bool(row.get("point") and row.get("name") and has_metric)


@dataclass(frozen=True)
class Yardstick:
    """What every point is compared with."""

    extractor: Extractor
    reference: FeatureSet
    notes: list[str] = field(default_factory=list)  # about the classes, printed already


def measure(plan: ParetoPlan) -> list[dict[str, str]]:
    """Measure the points that the table lacks; returns all its rows. Collective.

    Raises:
        UserError: models, reference or options do not fit together, or the table has points of other settings.
    """
    # Load and check everything before the first file is written
    source = open_source(plan.reference, "--reference")
    processes = group.start_processes()
    for note in source.notes:
        group.print_once(note)
    models = {}
    overrides = ["training.tf32=true"] if plan.tf32 else []
    for ckpt in plan.checkpoints:
        models[ckpt] = load_trained(
            ckpt, processes.device, plan.vae, overrides=overrides, weights=plan.weights
        )
    points = []
    for trained in models.values():
        points += points_of(trained, plan)
    for point in points:
        point.options(plan).check(point.trained.config)
    check_models(models, source)
    extractor = load_extractor(plan.features, plan.inception_weights, processes.device, plan.tf32)
    check_source(source, extractor)
    settings = settings_of(plan, source, points[0], extractor)

    with FolderLock(plan.output, "--output") as lock:
        group.on_first(lock.acquire)
        table = PointTable(plan.output / "pareto.csv", settings)
        reference = measure_source(source, extractor, plan.output / "reference", processes)
        warn_of_few_images(plan, reference)
        warning = compression_warning(None, source)
        if warning:
            group.print_once(warning)
        yardstick = Yardstick(extractor, reference)
        started = datetime.now().isoformat(timespec="seconds")
        for point in points:
            key = point.key(settings)
            if table.has(key):
                continue
            # An interrupted point resumes with batches of the same size
            folder = plan.output / f"{key}-{plan.batch_size}"
            found = measure_point(point, plan, yardstick, folder, processes)
            table.rows.append({"point": key, **point.columns(), **settings, **found, "measured": started})
            if processes.rank == 0:
                table.write()
                shutil.rmtree(folder)
        return table.rows


def points_of(trained: TrainedModel, plan: ParetoPlan) -> list[ParetoPoint]:
    """All points of one model; a static DiT has no budgets, and scale 1 has no unconditional branch."""
    static = trained.config.is_static
    budgets = [0.0] if static else plan.budgets
    points = []
    for scale in plan.cfg_scales or [possible_scale(1.0, trained.config)]:
        lites: list[float | None] = [None]
        if scale > 1 and not static:
            lites += plan.lite_budgets
        for lite in lites:
            for budget in budgets:
                points.append(ParetoPoint(trained, scale, budget, lite))
    return points


def check_models(models: Mapping[str, TrainedModel], source: Source) -> None:
    """Checkpoints and reference must be of one image size, and the checkpoints of one set of classes."""
    (first, first_model), *others = models.items()
    expected = first_model.config.data
    for ckpt, trained in others:
        data = trained.config.data
        for key, own, wanted in (
            ("image_size", data.image_size, expected.image_size),
            ("num_classes", data.num_classes, expected.num_classes),
        ):
            if own != wanted:
                raise UserError(
                    f"--ckpt '{ckpt}': has data.{key} {own}, but '{first}' has {wanted}; compare them apart"
                )
    check_sizes(expected.image_grid, source.size)


def settings_of(plan: ParetoPlan, source: Source, point: ParetoPoint, extractor: Extractor) -> dict[str, str]:
    """The columns that all points share, and in which all rows of a table must be equal."""
    return {
        "seed": str(plan.seed),
        "images": str(plan.num_samples),
        "steps": str(plan.num_sampling_steps),
        "sampler": plan.sampler,
        "bf16": str(plan.bf16),
        "image_size": str(point.trained.config.data.image_size),
        **yardstick_columns(source, extractor, plan.tf32),
    }


def yardstick_columns(source: Source, extractor: Extractor, tf32: bool = False) -> dict[str, str]:
    """The columns that say what images are compared with, and by which features."""
    kind, content = extractor.name.split(":")[:2]
    if source.path.is_dir() and source.images is not None:
        reference = source.images.digest()
    else:
        reference = sha256_of(source.path)
    return {
        "features": f"{kind}:{content[:12]}" + ("+tf32" if tf32 else ""),
        "reference": reference[:12],
        "reference_images": str(source.count(extractor.name) or ""),
    }


def warn_of_few_images(plan: ParetoPlan, reference: FeatureSet) -> None:
    """Warn where samples or reference are too few for the covariance of their features."""
    for name, count in (("the samples", plan.num_samples), (plan.reference, reference.count)):
        warning = rank_warning(name, count, reference.width)
        if warning:
            group.print_once(warning)


def measure_point(
    point: ParetoPoint, plan: ParetoPlan, yardstick: Yardstick, folder: Path, processes: Processes
) -> dict[str, str]:
    """Sample and compare. Returns the columns of cost and metrics on the first process, nothing on the others.

    Args:
        folder: for the features of the samples; an interrupted call finds there what is done.
    """
    indices = list(range(plan.num_samples))
    labels = draw_labels(plan.seed, indices, point.trained.config.data.num_classes)
    samples = SamplePlan(point.options(plan), labels, plan.batch_size, str(point))
    chunks = measure_samples(point.trained, samples, yardstick.extractor, folder, processes)
    if processes.world > 1:
        dist.barrier()
    if processes.rank > 0:
        return {}
    found = {
        "tflop_per_image": chunks.mean("tflop"),
        "ms_per_image": chunks.mean("ms"),
        "peak_memory_mb": chunks.read("peak_memory").max() / 1e6,
        "kept_share": chunks.mean("kept"),
    }
    classes = sampled_classes(labels, point.trained.class_names, point.cfg_scale)
    own = FeatureSet(str(point), chunks, {}, classes)
    note = class_note(own, yardstick.extractor)
    if note and note not in yardstick.notes:
        yardstick.notes.append(note)
        print(note)
    found |= compare(own, yardstick.reference, yardstick.extractor)
    return {key: f"{value:.8g}" for key, value in found.items()}
