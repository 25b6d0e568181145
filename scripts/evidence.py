"""Measure trained runs: quality, cost and routing of each go to a summary.json, which figures.evidence reads.

    python -m scripts.evidence evidence/runs/dc-0 evidence/runs/dit2-0 --reference evidence/reference.npz \\
        --features evidence/classifier.pt --images evidence/real --masks shapes --floors evidence/autoencoder

Every run is sampled without guidance and with it; a DC-DiT also with budgets and Lite-CFG. All samples have the
same noise and classes. Run it again to resume: measured points stay. Under torchrun the processes share the
work.
"""

import argparse
import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cli
from config import ROLES, Config, UserError, load_config
from data.autoencoder import Autoencoder
from data.files import write_json
from data.images import UnreadableImage, read_rgb
from data.names import renamed_label
from diffusion import OBJECTIVES
from evaluation.comparison import FeatureSet, check_sizes, check_source, compare, measure_source
from evaluation.evidence import read_summary, shaping_keys, value_of
from evaluation.extractors import Extractor, load_extractor
from evaluation.feature_cache import CHUNK, FeatureChunks, as_arrays, run_extractor
from evaluation.image_sets import FolderImages, Source, open_source
from evaluation.pareto import ParetoPlan, ParetoPoint, measure, yardstick_columns
from figures.by_timestep import last_means, read_rows
from figures.pareto import fractions, numbers
from processes import group
from processes.hardware import machine
from sampling.arguments import add_weights_argument
from sampling.generate import draw_labels, generate
from sampling.load import TrainedModel, load_trained
from toy import shapes
from toy.routing_stats import TIMESTEPS, cells_on_object, kept_tokens
from weights.checkpoint import newest_checkpoint

ROOT = Path(__file__).parent.parent
# Where the command of a run is looked for
CONFIGS = ("configs/evidence/*.yaml", "configs/openmoji.yaml", "configs/shapes.yaml")
# Images on which the routing is measured
ROUTING_IMAGES = 128
# Images of a timed batch, and rounds over all points
TIMED_IMAGES = 16
TIMED_ROUNDS = 3
# Columns of a point that hold text; the others are numbers
TEXTS = (
    "point",
    "model",
    "name",
    "weights",
    "static",
    "sampler",
    "bf16",
    "features",
    "reference",
    "measured",
)

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    words = sys.argv[1:] if argv is None else argv
    args.command = f"python -m scripts.evidence {shlex.join(words)}"
    if args.floors:
        measure_floors(args)
    for run in args.runs:
        measure_run(run, args)


# ---------------------------------------------------------------------------------------------------- one run


def measure_run(run: Path, args: argparse.Namespace) -> None:
    """Measure the points of one run that are missing, and write its summary after each group of them."""
    checkpoint = str(newest_checkpoint(run))
    path = args.output / run.resolve().name / "summary.json"
    device = group.start_processes().device
    trained = load_trained(checkpoint, device, weights=args.weights)
    summary = describe_run(run, trained)
    earlier = read_summary(path) if path.is_file() else None
    if earlier:
        check_summary(path, earlier, summary, trained.weights)
    summary["measured by"] = commands(earlier, args.command)
    if args.masks:
        summary["routing"] = group.on_first(lambda: routing_by_timestep(trained, args))
    else:
        # That of an earlier checkpoint is not the model's
        summary["routing"] = earlier["routing"] if earlier and earlier["step"] == trained.step else []
    for plan in plans(checkpoint, trained.config, path.parent, args):
        points = measure(plan)
        # The table also has the points of earlier checkpoints
        own = trained.fingerprint[:12]
        rows = [typed(point) for point in points if point["model"] == own]
        summary["rows"] = rows
        group.on_first(lambda: write_json(path, summary))

    def time_and_write() -> None:
        times = earlier.get("times", {}) if earlier else {}
        if any(row["point"] not in times for row in rows):
            # Times of another call cannot be compared with those of this one
            times = time_points(trained, plan, rows)
        for row in rows:
            row["ms_per_image"] = times[row["point"]]
        write_json(path, {**summary, "times": times})

    group.on_first(time_and_write)
    group.print_once(f"{len(rows)} points of {run}: {path}")


def check_summary(path: Path, earlier: Row, summary: Row, weights: str) -> None:
    """Raise a UserError if the earlier summary is of another run, or of other weights of this one."""
    for name in ("model", "seed"):
        if earlier.get(name) != summary[name]:
            problem = f"is of a run with {name} {earlier.get(name)}, and this one has {summary[name]}"
            raise UserError(f"'{path}': {problem}; give another --output")
    others = {row.get("weights", "ema") for row in earlier["rows"]} - {weights}
    if others:
        raise UserError(f"'{path}': has points of the weights {', '.join(others)}; give another --output")


def commands(earlier: Row | None, command: str) -> list[str]:
    """The commands that measured the points of a summary, this one included."""
    others = earlier["measured by"] if earlier else []
    return [*(other for other in others if other != command), command]


def time_points(trained: TrainedModel, plan: ParetoPlan, rows: list[Row]) -> dict[str, float]:
    """Milliseconds of denoising per image for each row: the fastest of several rounds in which all take turns.

    What else the machine does during the hours of sampling would decide about the means.
    """
    options = {}
    for row in rows:
        point = ParetoPoint(trained, row["cfg_scale"], row["budget"], row.get("lite_cfg"))
        options[row["point"]] = point.options(plan)
    indices = list(range(TIMED_IMAGES))
    labels = draw_labels(plan.seed, indices, trained.config.data.num_classes)
    times: dict[str, list[float]] = {key: [] for key in options}
    for _ in range(TIMED_ROUNDS):
        for key, own in options.items():
            (batch,) = generate(trained, indices, labels, own, TIMED_IMAGES)
            times[key].append(batch.ms_per_image)
    return {key: min(found) for key, found in times.items()}


def plans(checkpoint: str, config: Config, folder: Path, args: argparse.Namespace) -> list[ParetoPlan]:
    """What is measured, the most important points first; all write to one table."""
    whole = ParetoPlan(
        checkpoints=[checkpoint],
        vae=None,
        weights=args.weights,
        cfg_scales=args.cfg_scale,
        budgets=[0.0],
        lite_budgets=[],
        num_samples=args.num_samples,
        num_sampling_steps=args.num_sampling_steps,
        sampler=args.sampler or OBJECTIVES[config.diffusion.objective].fast,
        seed=args.seed,
        bf16=args.bf16,
        tf32=False,
        batch_size=args.batch_size,
        reference=args.reference,
        features=args.features,
        inception_weights=None,
        output=folder,
    )
    if config.is_static:
        return [whole]
    lite = dataclasses.replace(whole, lite_budgets=args.lite_cfg)
    budgets = dataclasses.replace(
        whole, budgets=args.budgets, cfg_scales=args.budgets_at_scale or args.cfg_scale
    )
    return [whole, lite, budgets]


def typed(point: dict[str, str]) -> Row:
    """A row of the table with numbers in place of their text, and without empty cells."""
    row: Row = {}
    for name, value in point.items():
        if value:
            row[name] = value if name in TEXTS else float(value)
    return row


# ------------------------------------------------------------------------------------------------ its training


def describe_run(run: Path, trained: TrainedModel) -> Row:
    """Model, configuration and training of a run."""
    rows = read_rows(run)
    rows = [row for row in rows if row["step"] <= trained.step]
    config = trained.config
    return {
        "run": run.resolve().name,
        "model": config.model.name,
        "step": trained.step,
        "seed": config.training.seed,
        "parameters": sum(tensor.numel() for tensor in trained.model.parameters()),
        "config": shaping_keys(config),
        "command": training_command(config, run),
        "hardware": machine(trained.device),
        "training seconds": training_seconds(run, trained.step),
        "training TFLOP per image": float(np.mean([row["tflop_per_image"] for row in rows])),
        "loss": [[row["step"], row["diffusion_loss"]] for row in rows],
        "loss by t": finite(last_means(rows, "loss")),
        "kept by t": finite(last_means(rows, "kept")),
    }


def finite(values: np.ndarray) -> list[float | None]:
    """NaN, where no sample fell, becomes null."""
    return [None if np.isnan(value) else float(value) for value in values]


def training_command(config: Config, run: Path) -> str:
    """The command that trains such a run: of the shipped configurations the one with the fewest changes."""
    best: list[str] | None = None
    for pattern in CONFIGS:
        for file in sorted(ROOT.glob(pattern)):
            changes = overrides(load_config(file), config)
            words = ["python", "train.py", "--config", str(file.relative_to(ROOT)), *changes]
            if best is None or len(words) < len(best):
                best = words
    assert best is not None
    return shlex.join([*best, "--output", str(run)])


def overrides(shipped: Config, config: Config) -> list[str]:
    """Options that make a shipped configuration this one, paths and logging aside."""
    words = []
    for key in ROLES:
        section, _, _ = key.partition(".")
        if section in ("data", "logging", "evaluation") and ROLES[key] == "free":
            continue
        value = value_of(config, key)
        if value == value_of(shipped, key):
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        words += ["--set", f"{key}={text}"]
    return words


def training_seconds(run: Path, last_step: int) -> float | None:
    """Seconds of optimizer steps by the log lines, the time between an end and a resume aside; None without any."""
    path = run / "log.txt"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    # A resumed run may log a step again
    rates = {}
    for step, rate in re.findall(r"step +(\d+): .*\bsteps_per_sec=([\d.e+-]+)", text):
        rates[int(step)] = float(rate)
    seconds = 0.0
    previous = 0
    for step in sorted(step for step in rates if step <= last_step):
        seconds += (step - previous) / rates[step]
        previous = step
    return seconds or None


# ----------------------------------------------------------------------------------------------------- routing


def routing_by_timestep(trained: TrainedModel, args: argparse.Namespace) -> list[Row]:
    """Kept shares of the cells on objects and of the others at ten timesteps, on noised images with known masks."""
    if trained.config.is_static:
        return []
    images, masks, labels = read_masked_images(trained, args.images, args.masks)
    on_object = cells_on_object(masks, trained.config)
    if on_object.all() or not on_object.any():
        raise UserError(
            f"--masks '{args.masks}': no cell is on an object, or none is on background; give masks that have both"
        )
    steps = trained.config.diffusion.diffusion_steps
    timesteps = [round((k + 0.5) / TIMESTEPS * steps) for k in range(TIMESTEPS)]
    kept = kept_tokens(trained, images, labels, timesteps, args.seed)
    rows = []
    for t, own in zip(timesteps, kept):
        shares = {"object": own[on_object], "background": own[~on_object], "all": own}
        means = {name: cells.mean().item() for name, cells in shares.items()}
        rows.append({"t": t / steps, **means})
    return rows


def read_masked_images(trained: TrainedModel, folder: Path, masks: str) -> tuple[Tensor, Tensor, list[int]]:
    """Images (B, 3, H, W) uint8, masks (B, H, W) bool and labels, evenly spread over the files of a folder.

    Args:
        masks: a folder of masks with the names of the images, or "shapes": they are drawn.
    """
    source = FolderImages(folder, trained.config.data.image_size, "--images")
    if source.labels is None:
        raise UserError(f"--images '{folder}': holds samples, which have no classes; give real images")
    other = renamed_label(source.class_names, trained.class_names)
    if other is not None:
        raise UserError(
            f"--images '{folder}': class {other} is not that of the run; give images of its classes"
        )
    count = min(ROUTING_IMAGES, len(source))
    chosen = np.linspace(0, len(source) - 1, count).round().astype(int)
    images = source.read(chosen)
    found = []
    for index, pixels in zip(chosen, images):
        name = source.paths[index].relative_to(folder).as_posix()
        found.append(read_mask(name, pixels, masks))
    stacked = torch.from_numpy(images).permute(0, 3, 1, 2)
    return stacked, torch.from_numpy(np.stack(found)), source.labels[chosen].tolist()


def read_mask(name: str, pixels: np.ndarray, masks: str) -> np.ndarray:
    """(H, W) bool, true where an object covers at least half of the pixel."""
    if masks == "shapes":
        number = Path(name).stem
        drawn, mask, _ = shapes.render(int(number) if number.isdigit() else 0, len(pixels))
        if not np.array_equal(drawn, pixels):
            raise UserError(f"--masks shapes: '{name}' is no image of toy.shapes; give a folder of masks")
        return mask
    path = Path(masks) / name
    if not path.is_file():
        raise UserError(f"--masks '{masks}': has no {name}; give masks with the names of --images")
    try:
        mask = np.asarray(read_rgb(path, name).convert("L")) >= 128
    except UnreadableImage as error:
        raise UserError(f"--masks '{masks}': unreadable mask {error}; give another") from None
    size = pixels.shape[:2]
    if mask.shape != size:
        raise UserError(f"--masks '{path}': is {mask.shape}, and the image {size}; give one of its size")
    return mask


# ------------------------------------------------------------------------------------------------------ floors


def measure_floors(args: argparse.Namespace) -> None:
    """What real images score against the reference: as they are, and through the autoencoder."""
    source = open_source(args.images, "--images")
    reference_source = open_source(args.reference, "--reference")
    count = len(source.images) if source.images is not None else 0
    if count != args.num_samples:
        raise UserError(
            f"--images '{args.images}': {count} images cannot be compared with {args.num_samples} samples; "
            f"give {args.num_samples}"
        )
    check_sizes(source.size, reference_source.size)
    processes = group.start_processes()
    autoencoder = Autoencoder.load(args.floors, processes.device, "--floors")
    extractor = load_extractor(args.features, None, processes.device)
    for side in (source, reference_source):
        check_source(side, extractor)
    cache = args.output / "floors"
    reference = measure_source(reference_source, extractor, cache, processes)
    real = measure_source(source, extractor, cache, processes)
    floors = {"real images": real}
    if processes.rank == 0:
        floors["autoencoder"] = reconstruct(source, autoencoder, extractor, cache)
    for name, own in floors.items():
        if processes.rank == 0:
            settings = {"images": str(count), **yardstick_columns(reference_source, extractor)}
            row = {**typed(settings), **compare(own, reference, extractor)}
            path = args.output / f"floor-{name.replace(' ', '-')}" / "summary.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"floor": name, "measured by": [args.command], "rows": [row]})
            print(f"{name}: {path}")


def reconstruct(source: Source, autoencoder: Autoencoder, extractor: Extractor, cache: Path) -> FeatureSet:
    """Features of what the autoencoder makes of the images."""
    images = source.images
    assert images is not None
    chunks = FeatureChunks(cache / f"autoencoder-{images.digest()[:16]}", len(images), CHUNK)
    for chunk, batch in enumerate(reconstructions(images.read, chunks.ranges, autoencoder)):
        chunks.write(chunk, as_arrays([run_extractor(extractor, part) for part in batch.split(64)]))
    return FeatureSet("the autoencoder", chunks, {}, source.labels)


def reconstructions(read: Any, ranges: list[range], autoencoder: Autoencoder) -> Iterator[Tensor]:
    """(n, 3, H, W) uint8 for each range of images."""
    for index in ranges:
        pixels = torch.from_numpy(read(index).copy()).permute(0, 3, 1, 2)
        parts = []
        for part in pixels.split(32):
            latents, _ = autoencoder.encode(part)
            parts.append(autoencoder.decode(latents))
        yield torch.cat(parts)


# ----------------------------------------------------------------------------------------------------- options


def shares(text: str) -> list[float]:
    """ "0.5,0.8" -> [0.5, 0.8], and "none" -> []."""
    return [] if text == "none" else fractions(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs of train.py")
    add("--reference", required=True, help="file of evaluate.py --make-reference, ADM .npz or folder")
    add("--features", default="inception", help="or a TorchScript file or timm folder (default: %(default)s)")
    add("--images", type=Path, help="other real images, for the routing and --floors")
    add("--masks", help="folder with a mask of each of --images, or shapes: they are drawn")
    add("--floors", metavar="VAE", help="also compare --images and what this autoencoder makes of them")
    add("--num-samples", type=int, default=2048, help="images per point (default: %(default)s)")
    add("--num-sampling-steps", type=int, default=20, help="(default: %(default)s)")
    add("--sampler", help="(default: the fast one of the diffusion process)")
    add("--cfg-scale", type=numbers, default=[1.0, 2.0], help="guidance scales (default: 1,2)")
    add("--budgets", type=fractions, default=[0.2, 0.4, 0.6], help="dropped shares (default: 0.2,0.4,0.6)")
    add("--budgets-at-scale", type=numbers, help="scales at which they are measured (default: all)")
    add("--lite-cfg", type=shares, default=[0.8], help="dropped shares of Lite-CFG, or none (default: 0.8)")
    add("--batch-size", type=int, default=64, help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of noise and classes (default: %(default)s)")
    add("--bf16", action="store_true", help="run the network in bfloat16")
    add_weights_argument(parser)
    cli.add_import_argument(parser)
    add("--output", type=Path, default=Path("results/evidence"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    cli.check_at_least(args, 4, "num_samples")
    cli.check_at_least(args, 1, "batch_size")
    cli.check_seed(args)
    cli.check_output("--output", args.output)
    names = [run.resolve().name for run in args.runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"RUN: two folders are called {name}, as their summaries would be; rename one")
    if not (args.runs or args.floors):
        raise UserError("RUN: is missing; give the folder of a run of train.py, or --floors")
    if args.floors and not args.images:
        raise UserError("--floors: needs --images, other real images; add them")
    if args.masks and not args.images:
        raise UserError("--masks: needs --images, whose masks they are; add them")
    return args


if __name__ == "__main__":
    cli.run(main)
