"""The points of quality against cost: every budget of every checkpoint is sampled and compared with a reference.

`figures/pareto.py` is the command and draws them.
"""

import argparse
import csv
import hashlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from config import Config, UserError
from data.files import write_file
from data.store_files import sha256_of
from evaluation.comparison import (
    FeatureSet,
    check_sizes,
    check_source,
    compare,
    measure_source,
    rank_warning,
)
from evaluation.extractors import load_extractor
from evaluation.image_sets import Source, open_source
from evaluation.sample_features import SamplePlan, measure_samples
from processes import group
from processes.lock import FolderLock
from sampling.budgets import ALL, Budget
from sampling.generate import SamplingOptions, TrainedModel, draw_labels, load_trained

# Columns that must be equal in all rows of a file, or its points could not be compared.
SETTINGS = (
    "seed",
    "images",
    "steps",
    "sampler",
    "bf16",
    "image_size",
    "features",
    "reference",
    "reference_images",
)


@dataclass(frozen=True)
class Point:
    """One way to sample one checkpoint; `lite` is the unconditional branch's dropped fraction, "" without Lite-CFG."""

    ckpt: str
    cfg_scale: float
    budget: float
    lite: float | str

    def options(self, args: argparse.Namespace) -> SamplingOptions:
        return SamplingOptions(
            cfg_scale=self.cfg_scale,
            num_sampling_steps=args.num_sampling_steps,
            sampler=args.sampler,
            seed=args.seed,
            bf16=args.bf16,
            budget=Budget.fraction(self.budget) if self.budget else ALL,
            uncond=Budget.fraction(float(self.lite)) if self.lite != "" else None,
        )


def measure(args: argparse.Namespace) -> list[dict[str, str]]:
    """Measure the points that the table lacks; returns all its rows. Collective."""
    source = open_source(args.reference)
    processes = group.start_processes()
    models = {ckpt: load_trained(ckpt, processes.device, args.vae) for ckpt in args.ckpt}
    points = [point for ckpt, trained in models.items() for point in points_of(ckpt, trained.config, args)]
    for point in points:
        point.options(args).check(models[point.ckpt].config)
    check_runs(models, source)
    extractor = load_extractor(args.features, args.inception_weights, processes.device)
    check_source(source, extractor)
    settings = settings_of(args, source, models[args.ckpt[0]].config, extractor.name)
    with FolderLock(args.output, "--output") as lock:
        group.on_first(lock.acquire)
        return measure_points(args, points, models, source, extractor, settings, processes)


def measure_points(
    args, points: list[Point], runs: dict[str, TrainedModel], source: Source, extractor, settings, processes
) -> list[dict[str, str]]:
    """The rows of the table, with those of the points that it lacked."""
    table = args.output / "pareto.csv"
    rows = read_rows(table, settings)
    reference = measure_source(source, extractor, args.output / "reference", processes)
    for name, count in (("the samples", args.num_samples), (args.reference, reference.count)):
        if warning := rank_warning(name, count, reference.width):
            group.print_once(warning)
    for point in points:
        trained = runs[point.ckpt]
        key = point_key(point, trained, settings)
        if key not in {row["point"] for row in rows}:
            folder = (
                args.output / f"{key}-{args.batch_size}"
            )  # an interrupted point goes on with batches of the same size
            found = measure_point(point, trained, args, extractor, reference, folder, processes)
            rows.append({"point": key, **describe_point(point, trained), **settings, **found})
            if processes.rank == 0:
                write_rows(table, rows)
                shutil.rmtree(folder)
    return rows


def is_static(config: Config) -> bool:
    """Whether the checkpoint is a static DiT, which keeps every token."""
    return config.is_static


def points_of(ckpt: str, config: Config, args: argparse.Namespace) -> list[Point]:
    """All points of one checkpoint, cheapest guidance first."""
    points = []
    for scale in args.cfg_scale:
        budgets = [0.0] if is_static(config) else args.budgets
        lites = [""] if scale == 1 or is_static(config) else ["", *args.lite_cfg]
        points += [Point(ckpt, scale, budget, lite) for lite in lites for budget in budgets]
    return points


def check_runs(runs: dict[str, TrainedModel], source: Source) -> None:
    """Checkpoints and reference must be of one image size, and the checkpoints of one set of classes."""
    first, *others = runs.items()
    for ckpt, trained in others:
        for key in ("image_size", "num_classes"):
            ours, theirs = getattr(trained.config.data, key), getattr(first[1].config.data, key)
            if ours != theirs:
                raise UserError(
                    f"--ckpt '{ckpt}': has data.{key} {ours}, but '{first[0]}' has {theirs}; compare them apart"
                )
    check_sizes((first[1].config.data.image_size,) * 2, source.size)


def settings_of(args: argparse.Namespace, source: Source, config: Config, extractor: str) -> dict[str, str]:
    """The columns that all points share."""
    path = Path(args.reference)
    values = {
        "seed": args.seed,
        "images": args.num_samples,
        "steps": args.num_sampling_steps,
        "sampler": args.sampler,
        "bf16": args.bf16,
        "image_size": config.data.image_size,
        "features": extractor.split(":")[0] + ":" + extractor.split(":")[1][:12],
        "reference": source.images.digest()[:12] if path.is_dir() else sha256_of(path)[:12],
        "reference_images": source.count(extractor) or "",
    }
    return {key: str(value) for key, value in values.items()}


def point_key(point: Point, trained: TrainedModel, settings: dict[str, str]) -> str:
    """Names a point in the table and its folder: equal keys mean equal samples and an equal comparison."""
    identity = [
        trained.fingerprint,
        trained.autoencoder.sha256,
        trained.config.diffusion.cfg_channels,
        settings,
    ]
    identity += [point.cfg_scale, point.budget, point.lite]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]


def describe_point(point: Point, trained: TrainedModel) -> dict[str, str]:
    values = {
        "model": trained.fingerprint[:12],
        "name": trained.config.model.name,
        "step": trained.step,
        "static": is_static(trained.config),
        "cfg_scale": point.cfg_scale,
        "budget": point.budget,
        "lite_cfg": point.lite,
    }
    return {key: str(value) for key, value in values.items()}


def measure_point(
    point, trained: TrainedModel, args, extractor, reference: FeatureSet, folder: Path, processes
) -> dict[str, str]:
    """Sample, compare, and forget the features. The metrics are the first process's."""
    labels = draw_labels(args.seed, list(range(args.num_samples)), trained.config.data.num_classes)
    title = (
        f"{trained.config.model.name}, scale {point.cfg_scale}, budget {point.budget}"
        + f", lite {point.lite}" * (point.lite != "")
    )
    options = point.options(args)
    plan = SamplePlan(options, labels, args.batch_size, title)
    chunks = measure_samples(trained, plan, extractor, folder, processes)
    if processes.world > 1:
        dist.barrier()
    if processes.rank > 0:
        return {}
    samples = FeatureSet(title, chunks, {}, np.array(labels))
    found = {"tflop_per_image": chunks.mean("tflop"), "kept_share": chunks.mean("kept")}
    found |= compare(samples, reference, extractor)
    return {key: f"{value:.8g}" for key, value in found.items()}


def read_rows(table: Path, settings: dict[str, str]) -> list[dict[str, str]]:
    """Rows of an earlier call; UserError where their points could not be compared with these."""
    if not table.is_file():
        return []
    with open(table, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        if changed := [key for key in SETTINGS if row.get(key) != settings[key]]:
            was = ", ".join(f"{key} {row.get(key)} instead of {settings[key]}" for key in changed)
            raise UserError(f"--output '{table.parent}' holds points with {was}; give another folder")
    return rows


def write_rows(table: Path, rows: list[dict[str, str]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_file(table, lambda stream: stream.write(text.getvalue().encode()))
