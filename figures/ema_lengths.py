"""Distance against the length of the weights' average, for post-hoc EMAs of one run (EDM2, arXiv 2312.02696).

    python -m figures.ema_lengths RUN --stds 0,0.05,0.1,0.2 --reference R.npz

needs a run with `training.posthoc_ema_stds`. It makes an average of each length, samples them and the EMA of
training, and compares the samples with a reference. The averages, pareto.csv with a row for each, and
ema_lengths.png go into --output. The same command resumes, and with more lengths or guidance scales it adds points.
"""

import argparse
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

import cli
from config import UserError
from evaluation.comparison import METRIC_NAMES
from evaluation.pareto import measure
from figures.canvas import SMALL, save_figure
from figures.pareto import (
    TITLES,
    Row,
    add_measuring_arguments,
    check_measuring_arguments,
    metric_of,
    numbers,
    plan_of,
)
from processes import group
from weights.checkpoint import load_checkpoint, newest_checkpoint, save_weights
from weights.posthoc import LONGEST
from weights.reconstruct import average_of_length

# Begins the name of an average in the table; its standard deviation follows
NAME = "std "


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    group.start_processes()
    checkpoint = newest_checkpoint(args.run)
    averages = group.on_first(lambda: write_averages(args.run, args.stds, args.output))
    args.ckpt = [str(path) for path in (checkpoint, *averages)]
    rows = measure(plan_of(args))
    picture = args.output / "ema_lengths.png"

    def report() -> None:
        # The table may have points of an earlier step of the run
        step = str(int(checkpoint.stem))
        decay = load_checkpoint(checkpoint)["config"]["training"]["ema_decay"]
        draw([row for row in rows if row["step"] == step], picture, decay)
        print(f"{len(rows)} points: {args.output / 'pareto.csv'} and {picture}")

    group.on_first(report)


def write_averages(run: Path, stds: list[float], folder: Path) -> list[Path]:
    """Weights files of the averages of a run, with the length as the name in tables; 0: the trained weights."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for std in stds:
        file = folder / f"std-{std:g}.safetensors"
        if std:
            average = average_of_length(run, std)
            print(f"{file}: {average}")
            state = average.state
        else:
            state = load_checkpoint(newest_checkpoint(run))
            state["ema"] = state["model"]
            state["weights"] = "model"
        state["config"]["model"]["name"] = f"{NAME}{std:g}"
        save_weights(file, state)
        files.append(file)
    return files


@rc_context(SMALL)
def draw(rows: list[Row], path: Path, ema_decay: float) -> None:
    """Write the figure: a curve per guidance scale, and beside it the EMA of training as a dashed line.

    Args:
        rows: of the averages, and of the EMA, which has another name.
        ema_decay: of the EMA.
    """
    metric = metric_of(rows)
    figure = Figure(figsize=(5.2, 3.4), dpi=110, layout="constrained")
    axis = figure.subplots()
    scales = sorted({row["cfg_scale"] for row in rows}, key=float)
    for k, scale in enumerate(scales):
        points = []
        for row in rows:
            if row["cfg_scale"] != scale:
                continue
            value = float(row[metric])
            if row["name"].startswith(NAME):
                points.append((float(row["name"].removeprefix(NAME)), value))
            else:
                axis.axhline(value, color=f"C{k}", linestyle="--", linewidth=1)
        points.sort()
        title = TITLES.get(float(scale), f"guidance scale {float(scale):g}")
        axis.plot(*zip(*points), color=f"C{k}", marker="o", markersize=4, label=title)
    axis.plot(
        [], [], color="grey", linestyle="--", linewidth=1, label=f"EMA of training, decay {ema_decay:g}"
    )
    axis.set_xlabel("standard deviation of the average, relative to the length of training")
    axis.set_ylabel(f"{METRIC_NAMES[metric]} ({rows[0]['images']} images)")
    axis.legend(fontsize=7)
    save_figure(figure, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run of train.py")
    parser.add_argument(
        "--stds",
        type=numbers,
        default=[0, 0.03, 0.06, 0.1, 0.15, 0.2, 0.25],
        help="relative standard deviations; 0: the trained weights (default: 0,0.03,0.06,0.1,0.15,0.2,0.25)",
    )
    add_measuring_arguments(parser)
    parser.add_argument("--output", type=Path, help="folder (default: ema_lengths in the folder of the run)")
    # One point per average
    parser.set_defaults(weights="ema", budgets=[0.0], lite_cfg=[])
    args = parser.parse_args(argv)
    args.output = args.output or args.run / "ema_lengths"
    check_measuring_arguments(args)
    for std in args.stds:
        if not 0 <= std < LONGEST:
            raise UserError(f"--stds {std}: must be at least 0 and below {LONGEST}, which is nearly uniform")
    return args


if __name__ == "__main__":
    cli.run(main)
