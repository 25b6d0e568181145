"""Quality against cost: every budget of every checkpoint is sampled, compared with a reference, and drawn.

    python -m evaluation.pareto --ckpt A.pt --ckpt B.pt --budgets 0,0.2,0.4,0.6 --cfg-scale 1,1.5 --reference R.npz

writes pareto.csv, a row per point, and pareto.png into --output. The same command again goes on where it was, and with more
checkpoints, budgets or scales it adds points. A static DiT is one point per scale. Under torchrun the processes share the work.
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

import cli
from config import Config, UserError
from data.files import write_file
from data.lock import FolderLock
from diffusion.samplers import SAMPLERS
from evaluation.extractors import load_extractor
from evaluation.generate import Run, SamplingOptions, draw_labels, load_run
from evaluation.generated import mean_of, measure_samples
from evaluation.image_sets import Source, hash_file, open_source
from evaluation.measure import Measured, check_sizes, check_source, compare, measure_source, rank_warning
from evaluation.pareto_figure import draw

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
            tail_dropping_fraction=self.budget or None,
            lite_cfg=self.lite != "",
            uncond_tail_dropping_fraction=self.lite if self.lite != "" else None,
            bf16=args.bf16,
        )


def numbers(text: str) -> list[float]:
    """ "0,0.2" -> [0.0, 0.2], each once and in order."""
    try:
        return sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of numbers such as 0,0.2,0.4") from None


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--ckpt", action="append", required=True, help="checkpoint of train.py; repeatable")
    parser.add_argument(
        "--reference",
        required=True,
        help="ADM .npz, folder of images or file of evaluate.py --make-reference",
    )
    parser.add_argument(
        "--budgets", type=numbers, default=[0.0], help="tail-dropping fractions, e.g. 0,0.2,0.4 (default: 0)"
    )
    parser.add_argument(
        "--cfg-scale", type=numbers, default=[1.0], help="guidance scales, e.g. 1,1.5 (default: 1)"
    )
    parser.add_argument(
        "--lite-cfg", type=numbers, default=[], help="also drop these fractions in the unconditional branch"
    )
    parser.add_argument(
        "--num-samples", type=int, default=50000, help="images per point (default: %(default)s)"
    )
    parser.add_argument("--num-sampling-steps", type=int, default=250, help="(default: %(default)s)")
    parser.add_argument("--sampler", default="ddpm", choices=SAMPLERS, help="(default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=64, help="images per batch and process (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="run the network in bfloat16")
    parser.add_argument(
        "--vae", help="ema, mse or a local diffusers folder (default: the one that the checkpoint names)"
    )
    parser.add_argument(
        "--features",
        default="inception",
        help="or a TorchScript file, or a timm folder (default: %(default)s)",
    )
    parser.add_argument(
        "--inception-weights", metavar="FILE", help="torch-fidelity's weights (default: download them)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("results/pareto"), help="folder (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    for name, least in (("num_samples", 4), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if args.lite_cfg and max(args.cfg_scale) <= 1:
        raise UserError(
            "--lite-cfg: has no unconditional branch to make cheaper at --cfg-scale 1; add a larger scale"
        )
    cli.check_output("--output", args.output)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    source = open_source(args.reference)
    processes = cli.start_processes()
    runs = {ckpt: load_run(ckpt, processes.device, args.vae) for ckpt in args.ckpt}
    points = [point for ckpt, run in runs.items() for point in points_of(ckpt, run.config, args)]
    for point in points:
        point.options(args).check(runs[point.ckpt].config)
    check_runs(runs, source)
    extractor = load_extractor(args.features, args.inception_weights, processes.device)
    check_source(source, extractor)
    settings = settings_of(args, source, runs[args.ckpt[0]].config, extractor.name)
    with FolderLock(args.output, "--output") as lock:
        cli.on_first(lock.acquire)
        measure_points(args, points, runs, source, extractor, settings, processes)


def measure_points(
    args, points: list[Point], runs: dict[str, Run], source: Source, extractor, settings, processes
) -> None:
    """Measure the points that the table lacks, and draw them all."""
    table = args.output / "pareto.csv"
    rows = read_rows(table, settings)
    reference = measure_source(source, extractor, args.output / "reference", processes.rank, processes.world)
    for name, count in (("the samples", args.num_samples), (args.reference, reference.count)):
        if warning := rank_warning(name, count, reference.width):
            cli.print_once(warning)
    for point in points:
        run = runs[point.ckpt]
        key = point_key(point, run, settings)
        if key not in {row["point"] for row in rows}:
            folder = (
                args.output / f"{key}-{args.batch_size}"
            )  # an interrupted point goes on with batches of the same size
            found = measure_point(point, run, args, extractor, reference, folder, processes)
            rows.append({"point": key, **describe_point(point, run), **settings, **found})
            if processes.rank == 0:
                write_rows(table, rows)
                shutil.rmtree(folder)
    if processes.rank == 0:
        for comparison in draw(rows, args.output / "pareto.png"):
            print(comparison)
        print(f"{len(points)} points: {table} and {args.output / 'pareto.png'}")


def is_static(config: Config) -> bool:
    """Whether the checkpoint is a static DiT, which keeps every token."""
    return config.model.patch_size is not None


def points_of(ckpt: str, config: Config, args: argparse.Namespace) -> list[Point]:
    """All points of one checkpoint, cheapest guidance first."""
    points = []
    for scale in args.cfg_scale:
        budgets = [0.0] if is_static(config) else args.budgets
        lites = [""] if scale == 1 or is_static(config) else ["", *args.lite_cfg]
        points += [Point(ckpt, scale, budget, lite) for lite in lites for budget in budgets]
    return points


def check_runs(runs: dict[str, Run], source: Source) -> None:
    """Checkpoints and reference must be of one image size, and the checkpoints of one set of classes."""
    first, *others = runs.items()
    for ckpt, run in others:
        for key in ("image_size", "num_classes"):
            ours, theirs = getattr(run.config.data, key), getattr(first[1].config.data, key)
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
        "reference": source.images.digest()[:12] if path.is_dir() else hash_file(path).hex()[:12],
        "reference_images": source.count(extractor) or "",
    }
    return {key: str(value) for key, value in values.items()}


def point_key(point: Point, run: Run, settings: dict[str, str]) -> str:
    """Names a point in the table and its folder: equal keys mean equal samples and an equal comparison."""
    identity = [run.fingerprint, run.autoencoder.sha256, run.config.diffusion.cfg_channels, settings]
    identity += [point.cfg_scale, point.budget, point.lite]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]


def describe_point(point: Point, run: Run) -> dict[str, str]:
    values = {
        "model": run.fingerprint[:12],
        "name": run.config.model.name,
        "step": run.step,
        "static": is_static(run.config),
        "cfg_scale": point.cfg_scale,
        "budget": point.budget,
        "lite_cfg": point.lite,
    }
    return {key: str(value) for key, value in values.items()}


def measure_point(
    point, run: Run, args, extractor, reference: Measured, folder: Path, processes
) -> dict[str, str]:
    """Sample, compare, and forget the features. The metrics are the first process's."""
    labels = draw_labels(args.seed, list(range(args.num_samples)), run.config.data.num_classes)
    title = (
        f"{run.config.model.name}, scale {point.cfg_scale}, budget {point.budget}"
        + f", lite {point.lite}" * (point.lite != "")
    )
    options = point.options(args)
    chunks = measure_samples(
        run, options, labels, extractor, folder, args.batch_size, processes.rank, processes.world, title
    )
    if processes.world > 1:
        dist.barrier()
    if processes.rank > 0:
        return {}
    samples = Measured(title, chunks, {}, np.array(labels))
    found = {"tflop_per_image": mean_of(chunks, "tflop"), "kept_share": mean_of(chunks, "kept")}
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


if __name__ == "__main__":
    cli.run(main)
