"""Samples of one or several models, each above the tokens that the network kept for it at pure noise and halfway.

    python -m figures.kept_tokens assets/shapes --output results/kept_tokens.png

writes one picture: three rows per model, a column per class. `--classes` is given once for each model.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

import cli
from config import Config, UserError
from diffusion import OBJECTIVES
from figures.canvas import SMALL, check_format, figure_name, save_figure
from figures.chunking import Trace, draw_maps
from grid import Grid
from processes import group
from sampling.budgets import Budget
from sampling.classes import choose_labels, shown_name
from sampling.denoising import network_timesteps
from sampling.generate import generate
from sampling.load import TrainedModel, load_trained
from sampling.options import SamplingOptions, possible_scale
from sampling.pictures import check_picture

# Columns where no classes are named
COLUMNS = 8
# Characters of a name above a column, and of the line above a model
LONGEST_NAME = 16
LONGEST_TITLE = 140
# Parts of a path in that line
LAST_PARTS = 4


class ModelSamples(NamedTuple):
    """What the picture shows of a model."""

    title: str
    images: np.ndarray  # (B, H, W, 3) uint8
    names: list[str]  # of the classes
    trace: Trace  # of the first, the middle and the last step
    token_grid: Grid


def draw_samples(
    ckpt: str, trained: TrainedModel, labels: list[int], args: argparse.Namespace
) -> ModelSamples:
    """One sample per label, from the first noise of a seed."""
    config = trained.config
    options = SamplingOptions(
        cfg_scale=possible_scale(args.cfg_scale, config),
        num_sampling_steps=args.num_sampling_steps,
        sampler=args.sampler or OBJECTIVES[config.diffusion.objective].fast,
        seed=args.seed,
    )
    if options.has_guidance:
        options = replace(options, uncond=Budget.fraction(args.uncond_tail_dropping_fraction))
    trace = Trace(len(network_timesteps(config, options)), columns=3, samples=len(labels))
    indices = list(range(len(labels)))
    (batch,) = generate(trained, indices, labels, options, len(labels), trace.record)
    images = batch.images.permute(0, 2, 3, 1).numpy()
    names = [figure_name(shown_name(label, trained.class_names), LONGEST_NAME) for label in labels]
    place = "/".join(Path(ckpt).parts[-LAST_PARTS:])
    title = f"{place}: {config.model.name}, {trained.step:,} training steps"
    return ModelSamples(figure_name(title, LONGEST_TITLE), images, names, trace, config.token_grid)


def default_labels(config: Config) -> list[int]:
    """All classes, or some that are evenly spread over them."""
    count = min(COLUMNS, config.data.num_classes)
    return np.linspace(0, config.data.num_classes - 1, count).round().astype(int).tolist()


@rc_context(SMALL)
def draw(models: list[ModelSamples], path: Path) -> None:
    """The samples of each model above their kept tokens."""
    columns = max(len(model.images) for model in models)
    heights = []
    for model in models:
        panel = 0.15 + 1.2 * model.token_grid.rows / model.token_grid.columns
        heights.append(3 * panel + 0.4)
    figure = Figure(figsize=(1.2 * columns + 0.4, sum(heights)), dpi=120, layout="constrained")
    parts = figure.subfigures(len(models), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, model in zip(parts, models):
        panels = part.subplots(3, columns, squeeze=False)
        part.suptitle(model.title)
        used = len(model.images)
        draw_maps(panels[:, :used], model.trace.steps[:2], model.images, model.token_grid)
        for panel, name in zip(panels[0], model.names):
            panel.set_title(name)
        for panel in panels[:, used:].flat:
            panel.set_axis_off()
    save_figure(figure, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("models", nargs="+", metavar="CKPT", help="checkpoints, or folders of sampling.hub")
    add(
        "--classes",
        action="append",
        default=[],
        metavar="LIST",
        help="of each model in turn (default: eight)",
    )
    add("--cfg-scale", type=float, default=2.0, help="guidance scale (default: %(default)s)")
    add(
        "--uncond-tail-dropping-fraction",
        type=float,
        default=0.8,
        metavar="F",
        help="share that the unconditional branch drops, which is Lite-CFG (default: %(default)s)",
    )
    add("--num-sampling-steps", type=int, default=50, help="(default: %(default)s)")
    add("--sampler", help="(default: the fast one of the diffusion process)")
    add("--seed", type=int, default=1, help="(default: %(default)s)")
    add("--output", type=Path, default=Path("kept_tokens.png"), help="picture (default: %(default)s)")
    cli.add_import_argument(parser)
    args = parser.parse_args(argv)
    cli.check_at_least(args, 3, "num_sampling_steps")
    fraction = args.uncond_tail_dropping_fraction
    if not 0 <= fraction < 1:
        raise UserError(f"--uncond-tail-dropping-fraction {fraction:g}: must be at least 0 and below 1")
    cli.check_output_file("--output", args.output)
    check_format("--output", args.output)
    check_picture("--output", args.output)
    if args.classes and len(args.classes) != len(args.models):
        raise UserError(
            f"--classes: {len(args.classes)} lists for {len(args.models)} models; give one for each"
        )
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    models = []
    for number, ckpt in enumerate(args.models):
        trained = load_trained(ckpt, group.default_device())
        if trained.config.is_static:
            raise UserError(f"'{ckpt}': is a static DiT, which keeps every token; name a DC-DiT")
        labels = default_labels(trained.config)
        if args.classes:
            labels = choose_labels([args.classes[number]], trained.class_names)
        models.append(draw_samples(ckpt, trained, labels, args))
    draw(models, args.output)
    print(f"written to {args.output.resolve()}")


if __name__ == "__main__":
    cli.run(main)
