"""Pictures of what a sampling run cost, from the summary.json that sample.py or sample_ddp.py wrote.

    python -m figures.cost quickstart/summary.json

writes kept_tokens.png, cost_by_component.png and kept_by_class.png beside it, or beside the folder of sample_ddp.py's samples.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import cli
from config import UserError
from data.files import write_file
from sampling.accounting import BRANCHES

SMALL = {"font.size": 8}
COLOURS = dict(zip(BRANCHES, ("tab:blue", "tab:orange")))
MOST_CLASSES = 30  # of more, only the lowest and the highest are drawn


@matplotlib.rc_context(SMALL)
def draw_kept(summary: dict, path: Path) -> None:
    """Kept share against the timestep: mean over images, with one standard deviation and the extremes."""
    figure = Figure(figsize=(5, 3), dpi=120, layout="constrained")
    axis, tokens = figure.subplots(), summary["tokens"]
    for branch in summary["tflop_by_branch"]:
        rows = [row for row in summary["kept_by_step"] if row[branch]]
        t = [row["t"] for row in rows]
        mean, std, least, most = (
            np.array([row[branch][key] for row in rows]) / tokens for key in ("mean", "std", "min", "max")
        )
        colour = COLOURS[branch]
        axis.plot(t, mean, color=colour, label=branch)
        axis.fill_between(t, mean - std, mean + std, color=colour, alpha=0.25, linewidth=0)
        axis.plot(t, least, color=colour, linewidth=0.5, linestyle=":")
        axis.plot(t, most, color=colour, linewidth=0.5, linestyle=":")
    axis.set_xlim(max(row["t"] for row in summary["kept_by_step"]), 0)
    axis.set_ylim(0, None)
    axis.set_xlabel("timestep t (noise at the left, image at the right)")
    axis.set_ylabel("share of tokens kept")
    axis.legend(title="mean, std, min and max over images", fontsize=7, title_fontsize=7)
    save_figure(figure, path)


@matplotlib.rc_context(SMALL)
def draw_cost(summary: dict, path: Path) -> None:
    """TFLOP per image by component, and beside it the autoencoder's decoding."""
    parts = {**summary["tflop_by_component"], "autoencoder": summary["tflop_decoding"]}
    total, names = summary["tflop_per_image"]["mean"], list(parts)[::-1]
    figure = Figure(figsize=(5, 0.28 * len(parts) + 0.7), dpi=120, layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(
        names, [parts[name] for name in names], color=["tab:grey", *["tab:blue"] * (len(names) - 1)]
    )
    axis.bar_label(bars, [f" {parts[name] / total:.1%}" for name in names], fontsize=7)
    axis.margins(x=0.12)
    axis.set_xlabel(
        f"TFLOP per image over {summary['steps']} steps; % of the {total:.4g} without the autoencoder"
    )
    save_figure(figure, path)


@matplotlib.rc_context(SMALL)
def draw_classes(summary: dict, path: Path) -> None:
    """Kept share of the conditional branch for each class, ordered, with the standard deviation over its images."""
    rows = sorted(summary["kept_by_class"], key=lambda row: row["share"]["mean"])
    if len(rows) > MOST_CLASSES:
        rows = rows[: MOST_CLASSES // 2] + rows[-MOST_CLASSES // 2 :]
    figure = Figure(figsize=(5, 0.2 * len(rows) + 0.7), dpi=120, layout="constrained")
    axis = figure.subplots()
    mean, std = ([row["share"][key] for row in rows] for key in ("mean", "std"))
    axis.barh(
        [f"{row['name']} ({row['images']})" for row in rows], mean, xerr=std, color="tab:blue", ecolor="black"
    )
    axis.set_xlabel("share of tokens kept over all steps (number of images)")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda stream: figure.savefig(stream, format="png"))


PICTURES = {
    "kept_tokens.png": draw_kept,
    "cost_by_component.png": draw_cost,
    "kept_by_class.png": draw_classes,
}


def read_summary(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise not_a_summary(path) from None


def not_a_summary(path: Path) -> UserError:
    return UserError(f"'{path}' is not a summary.json of a sampling run; sample.py writes one")


def beside(summary: Path) -> Path:
    """The summary's folder; beside it where that is sample_ddp.py's, whose pictures are the samples to evaluate."""
    folder = summary.resolve().parent
    return folder.with_name(f"{folder.name}.charts") if (folder / "settings.json").is_file() else folder


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("summary", type=Path, help="summary.json of a sampling run")
    parser.add_argument(
        "--output", type=Path, help="folder (default: the summary's, or beside that of sample_ddp.py)"
    )
    args = parser.parse_args(argv)
    folder = args.output or beside(args.summary)
    cli.check_output("--output", folder)
    summary = read_summary(args.summary)
    try:
        for name, draw in PICTURES.items():
            draw(summary, folder / name)
    except (ValueError, KeyError, TypeError):
        raise not_a_summary(args.summary) from None
    print(f"{', '.join(PICTURES)} written to {folder.resolve()}")


if __name__ == "__main__":
    cli.run(main)
