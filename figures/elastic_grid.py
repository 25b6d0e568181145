"""The same samples at several budgets side by side, each column with its cost.

    python -m figures.elastic_grid --ckpt quickstart/run/checkpoints/0001400.pt --cfg-scale 2 --fractions 0 0.3 0.6 0.9

writes elastic_grid.png: a row per sample, a column per dropped fraction, TFLOP per image above it.
"""

import dataclasses
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from tqdm import tqdm

import cli
from config import UserError
from figures.canvas import SMALL, save_figure
from models import describe
from processes import group
from sampling.accounting import image_tflop
from sampling.arguments import add_sampling_arguments, load_trained_from, sampling_options
from sampling.budgets import ALL, Budget
from sampling.generate import SampledBatch, check_labels, generate


@rc_context(SMALL)
def draw_grid(
    fractions: list[float], batches: list[SampledBatch], tflop: list[float], names: list[str], path: Path
) -> None:
    """One column per fraction: its batch, and its mean TFLOP per image above; one row per sample, named at the left."""
    rows = len(names)
    figure = Figure(figsize=(1.2 * len(batches) + 0.5, 1.2 * rows + 0.5), dpi=120, layout="constrained")
    axes = figure.subplots(rows, len(batches), squeeze=False)
    for column, (fraction, batch, cost) in enumerate(zip(fractions, batches, tflop)):
        axes[0][column].set_title(f"{fraction:.0%} dropped\n{cost:.3g} TFLOP")
        for row in range(rows):
            axes[row][column].imshow(batch.images[row].permute(1, 2, 0).numpy())
            axes[row][column].set_xticks([])
            axes[row][column].set_yticks([])
    for row, name in enumerate(names):
        axes[row][0].set_ylabel(name)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> None:
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
    parser.add_argument("--classes", type=int, nargs="+", help="one row per label (default: the first four)")
    parser.add_argument(
        "--output", type=Path, default=Path("elastic_grid.png"), help="picture (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    cli.check_output_file("--output", args.output)
    device = group.default_device()
    options = sampling_options(args, device)
    if options.budget != ALL:
        raise UserError("--fractions: are the budgets of the columns; leave the other budget out")
    run = load_trained_from(args, device)
    labels = args.classes or list(range(min(4, run.config.data.num_classes)))
    check_labels(labels, run.config)
    columns = [dataclasses.replace(options, budget=Budget.fraction(fraction)) for fraction in args.fractions]
    for column in columns:
        column.check(run.config)
    if args.dry_run:
        print(
            f"{describe(run.config)}\nsamples       {len(labels)} of classes {labels} at {args.fractions} dropped"
        )
        return
    index, batches = list(range(len(labels))), []
    with tqdm(total=len(columns) * options.num_sampling_steps, unit="step") as bar:
        for column in columns:
            batches += generate(
                run, index, labels, column, len(labels), observe=lambda step, routing: bar.update()
            )
    tflop = [float(image_tflop(run.config, batch.kept).mean()) for batch in batches]
    names = [run.class_names[label] if run.class_names else f"class {label}" for label in labels]
    draw_grid(args.fractions, batches, tflop, names, args.output)
    print(
        "\n".join(
            f"{fraction:.0%} dropped: {cost:.4g} TFLOP per image"
            for fraction, cost in zip(args.fractions, tflop)
        )
    )
    print(f"written to {args.output.resolve()}")


if __name__ == "__main__":
    cli.run(main)
