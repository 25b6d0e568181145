"""Charts of what a sampling run cost, from the summary.json that sample.py or sample_ddp.py wrote.

    python -m figures.cost quickstart/summary.json

writes kept_tokens.png, cost_by_component.png and, for samples with classes, kept_by_class.png beside it, or beside
the folder of sample_ddp.py's samples.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import cli
from config import UserError
from figures.canvas import SMALL, figure_name, save_figure
from sampling.pictures import check_is_no_sample_folder
from sampling.sample_folder import SETTINGS

COLOURS = {"conditional": "tab:blue", "unconditional": "tab:orange"}
MOST_CLASSES = 30  # of more, only those with the lowest and the highest shares are drawn

Summary = dict[str, Any]  # as sampling.accounting.summarise makes it


@rc_context(SMALL)
def draw_kept(summary: Summary, path: Path) -> None:
    """Kept share against the timestep: mean over images, with one standard deviation and the extremes."""
    figure = Figure(figsize=(5, 3), dpi=120, layout="constrained")
    axes = figure.subplots()
    for branch in summary["tflop_by_branch"]:
        draw_branch(axes, summary, branch)
    first_t = max(row["t"] for row in summary["kept_by_step"])
    axes.set_xlim(first_t, 0)
    axes.set_ylim(0, None)
    axes.set_xlabel("timestep t (noise at the left, image at the right)")
    axes.set_ylabel("share of tokens kept")
    axes.legend(title="mean, std, min and max over images", fontsize=7, title_fontsize=7)
    save_figure(figure, path)


def draw_branch(axes: Axes, summary: Summary, branch: str) -> None:
    """The line of one branch, at the steps where it was computed."""
    rows = [row for row in summary["kept_by_step"] if row[branch]]
    t = [row["t"] for row in rows]

    def share(statistic: str) -> np.ndarray:
        tokens = [row[branch][statistic] for row in rows]
        return np.array(tokens) / summary["tokens"]

    mean = share("mean")
    std = share("std")
    colour = COLOURS[branch]
    axes.plot(t, mean, color=colour, label=branch)
    axes.fill_between(t, mean - std, mean + std, color=colour, alpha=0.25, linewidth=0)
    for extreme in ("min", "max"):
        axes.plot(t, share(extreme), color=colour, linewidth=0.5, linestyle=":")


@rc_context(SMALL)
def draw_cost(summary: Summary, path: Path) -> None:
    """TFLOP per image by component, and beside it the autoencoder's decoding."""
    tflop = {**summary["tflop_by_component"], "autoencoder": summary["tflop_decoding"]}
    total = summary["tflop_per_image"]["mean"]

    # A bar per component, the first one at the top; the autoencoder, which the total leaves out, is grey
    names = list(tflop)[::-1]
    widths = [tflop[name] for name in names]
    colours = ["tab:grey"] + ["tab:blue"] * (len(names) - 1)
    figure = Figure(figsize=(5, 0.28 * len(names) + 0.7), dpi=120, layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, widths, color=colours)

    shares = [f" {width / total:.1%}" for width in widths]
    axes.bar_label(bars, shares, fontsize=7)
    # The summaries of earlier versions lack both
    if "ms_per_image" in summary:
        ms = summary["ms_per_image"]
        axes.set_title(f"{ms:.4g} ms per image, peak memory {summary['peak_memory_mb']:.0f} MB")
    axes.margins(x=0.12)
    axes.set_xlabel(
        f"TFLOP per image over {summary['steps']} steps; % of the {total:.4g} without the autoencoder"
    )
    save_figure(figure, path)


@rc_context(SMALL)
def draw_classes(summary: Summary, path: Path) -> None:
    """Kept share of the conditional branch for each class, with the standard deviation over its images."""
    # Only both ends of a long list
    rows = sorted(summary["kept_by_class"], key=lambda row: row["share"]["mean"])
    if len(rows) > MOST_CLASSES:
        rows = rows[: MOST_CLASSES // 2] + rows[-MOST_CLASSES // 2 :]
    names = [f"{figure_name(row['name'])} ({row['images']})" for row in rows]
    mean = [row["share"]["mean"] for row in rows]
    std = [row["share"]["std"] for row in rows]

    figure = Figure(figsize=(5, 0.2 * len(rows) + 0.7), dpi=120, layout="constrained")
    axes = figure.subplots()
    # By position: two long names may be equal where they are cut off
    positions = range(len(rows))
    axes.barh(positions, mean, xerr=std, color="tab:blue", ecolor="black")
    axes.set_yticks(positions, names)
    axes.set_xlabel("share of tokens kept over all steps (number of images)")
    save_figure(figure, path)


PICTURES = {
    "kept_tokens.png": draw_kept,
    "cost_by_component.png": draw_cost,
    "kept_by_class.png": draw_classes,
}


def read_summary(path: Path) -> Summary:
    """The file's content. Raises UserError unless it has what the pictures show."""
    if not path.is_file():
        raise UserError(f"'{path}': does not exist; sample.py writes one")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        check_summary(summary)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"'{path}' is not a summary.json of a sampling run; sample.py writes one") from None
    return summary


def check_summary(summary: Summary) -> None:
    """Read everything that the pictures show; raises some error where an entry is missing or no number.

    What happens while drawing, on the other hand, is not the fault of the file.
    """
    # Shares at each step
    check_numbers(summary["tokens"], summary["steps"])
    if not summary["kept_by_step"] or not set(summary["tflop_by_branch"]) <= set(COLOURS):
        raise ValueError("there are no steps, or branches of another kind")
    for branch in summary["tflop_by_branch"]:
        for row in summary["kept_by_step"]:
            check_numbers(row["t"])
            if row[branch]:
                check_numbers(*(row[branch][key] for key in ("mean", "std", "min", "max")))

    # Cost by component
    check_numbers(summary["tflop_decoding"], summary["tflop_per_image"]["mean"])
    check_numbers(*summary["tflop_by_component"].values())
    if "ms_per_image" in summary:
        check_numbers(summary["ms_per_image"], summary["peak_memory_mb"])

    # Shares of each class
    for row in summary["kept_by_class"]:
        check_numbers(row["images"], row["share"]["mean"], row["share"]["std"])
        figure_name(row["name"])


def check_numbers(*values: object) -> None:
    """TypeError unless all are finite numbers."""
    for value in values:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise TypeError(f"{value!r} is not a number")


def default_folder(summary: Path) -> Path:
    """The summary's folder, or a folder beside it where that holds the samples of sample_ddp.py.

    Charts among those samples would be evaluated as images.
    """
    folder = summary.resolve().parent
    holds_samples = (folder / SETTINGS).is_file()
    return folder.with_name(f"{folder.name}.charts") if holds_samples else folder


def drawable(summary: Summary) -> list[str]:
    """Names of the pictures: samples without a class have no chart of the classes."""
    return [name for name in PICTURES if summary["kept_by_class"] or name != "kept_by_class.png"]


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("summary", type=Path, help="summary.json of a sampling run")
    parser.add_argument(
        "--output", type=Path, help="folder (default: the summary's, or beside that of sample_ddp.py)"
    )
    args = parser.parse_args(argv)
    folder = args.output or default_folder(args.summary)
    cli.check_output("--output", folder)
    check_is_no_sample_folder("--output", folder)
    summary = read_summary(args.summary)
    names = drawable(summary)
    for name in names:
        PICTURES[name](summary, folder / name)
    print(f"{', '.join(names)} written to {folder.resolve()}")


if __name__ == "__main__":
    cli.run(main)
