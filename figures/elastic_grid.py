"""The same samples at several budgets side by side, each column with its cost.

    python -m figures.elastic_grid --ckpt quickstart/run/checkpoints/0000800.pt --fractions 0 0.3 0.6 0.9

writes elastic_grid.png: a row per sample, a column per dropped fraction, TFLOP and milliseconds per image above it.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from tqdm import tqdm

import cli
from config import UserError
from diffusion.samplers import Step
from figures.canvas import SMALL, check_format, figure_name, save_figure
from models import describe
from models.types import Routing
from processes import group
from sampling.accounting import image_tflop
from sampling.arguments import (
    add_class_arguments,
    add_sampling_arguments,
    chosen_labels,
    describe_labels,
    fit_to_model,
    load_trained_from,
    print_classes,
    sampling_options,
)
from sampling.budgets import ALL, Budget
from sampling.denoising import network_timesteps
from sampling.generate import SampledBatch, generate, warm_up
from sampling.pictures import check_picture, save_grid

# Characters of a name beside a row
LONGEST_NAME = 20


@rc_context(SMALL)
def draw_grid(batches: list[SampledBatch], titles: list[str], names: list[str], path: Path) -> None:
    """One column per batch with its title above, one row per sample with its name at the left."""
    rows = len(names)
    columns = len(batches)
    height, width = batches[0].images.shape[2:]
    size = (1.2 * columns + 0.5, 1.2 * rows * height / width + 0.5)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for column, batch in enumerate(batches):
        axes[0][column].set_title(titles[column])
        for row in range(rows):
            axis = axes[row][column]
            axis.imshow(batch.images[row].permute(1, 2, 0).numpy())
            axis.set_xticks([])
            axis.set_yticks([])
    for row, name in enumerate(names):
        axes[row][0].set_ylabel(name)
    save_figure(figure, path)


def row_name(label: int, names: list[str] | None) -> str:
    """Name of a class, short enough for the side of a row."""
    if not names or label >= len(names) or names[label] == str(label):
        return f"class {label}"
    return figure_name(names[label], LONGEST_NAME)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_config_arguments(parser)
    add_sampling_arguments(parser, cfg_scale=4.0, seed=1)
    parser.add_argument(
        "--fractions",
        type=float,
        nargs="+",
        default=[0, 0.2, 0.4, 0.6],
        help="columns (default: 0 0.2 0.4 0.6)",
    )
    add_class_arguments(parser, "one row for each (default: the first four)")
    parser.add_argument(
        "--output", type=Path, default=Path("elastic_grid.png"), help="picture (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    cli.check_output_file("--output", args.output)
    check_format("--output", args.output)
    check_picture("--output", args.output)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.list_classes:
        print_classes(args)
        return
    device = group.default_device()
    options = sampling_options(args, device)
    if options.budget != ALL:
        raise UserError("--fractions: are the budgets of the columns; leave the other budget out")
    trained = load_trained_from(args, device)
    config = trained.config
    options = fit_to_model(options, args, config)
    labels = chosen_labels(args, trained, options, list(range(min(4, config.data.num_classes))))
    if options.cfg_scale:
        names = [row_name(label, trained.class_names) for label in labels]
    else:
        names = [f"sample {i}" for i in range(len(labels))]
    columns = []
    for fraction in args.fractions:
        column = dataclasses.replace(options, budget=Budget.fraction(fraction))
        column.check(config)
        columns.append(column)
    if args.dry_run:
        samples = describe_labels(labels, options)
        print(f"{describe(config)}\nsamples       {samples} at {args.fractions} dropped")
        return

    # Sample every column on the same noise
    warm_up(trained, labels, options)
    indices = list(range(len(labels)))
    batches: list[SampledBatch] = []
    steps = len(network_timesteps(config, options))
    with tqdm(total=len(columns) * steps, unit="step") as bar:

        def on_step(step: Step, routing: Routing) -> None:
            bar.update()

        for column in columns:
            batches += generate(trained, indices, labels, column, len(labels), on_step)

    # Keep the images as a plain grid, which the figure then replaces
    pictures = torch.stack([batch.images for batch in batches], dim=1)  # (rows, columns, 3, H, W)
    save_grid(pictures.flatten(0, 1), args.output, columns=len(columns))

    # Name the columns, and draw
    titles = []
    for fraction, batch in zip(args.fractions, batches):
        tflop = image_tflop(config, batch.kept).mean()
        ms = batch.ms_per_image
        peak = batch.peak_memory / 1e6
        titles.append(f"{fraction:.0%} dropped\n{tflop:.3g} TFLOP\n{ms:.3g} ms")
        print(f"{fraction:.0%} dropped: {tflop:.4g} TFLOP, {ms:.4g} ms per image, peak memory {peak:.0f} MB")
    draw_grid(batches, titles, names, args.output)
    print(f"written to {args.output.resolve()}")


if __name__ == "__main__":
    cli.run(main)
