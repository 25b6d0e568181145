"""Loss and kept share against the timestep, from the metrics.jsonl of one run or more.

    python -m figures.by_timestep results/000-DC-DiT results/001-DiT --output by_timestep.png

draws the mean of each run over its last log lines. train.py draws it for a run that has finished.
"""

import json
import math
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import cli
from config import UserError
from figures.canvas import SMALL, check_format, figure_name, save_figure
from training.tracking import TIMESTEP_BINS

LAST = 0.1  # share of the log lines that the picture averages

TITLES = {"loss": "diffusion loss", "kept": "share of tokens kept by the router"}


@rc_context(SMALL)
def draw(runs: dict[str, list[dict]], path: Path) -> None:
    """Two charts beside each other. runs: label -> rows of its metrics.jsonl."""
    figure = Figure(figsize=(8, 3), dpi=120, layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 2), TITLES.items()):
        for rows in runs.values():
            centres = (np.arange(TIMESTEP_BINS) + 0.5) / TIMESTEP_BINS
            axes.plot(centres, last_means(rows, name), marker="o", markersize=3)
        style(axes, title)
        # With all labels: by itself, a legend leaves out those that begin with "_"
        axes.legend(axes.lines, [figure_name(label) for label in runs], fontsize=7)
    save_figure(figure, path)


def style(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlim(1, 0)
    axes.set_ylim(0, None)
    axes.set_xlabel("timestep / number of timesteps (noise at the left)")


def last_means(rows: list[dict], name: str) -> np.ndarray:
    """Mean of NAME_t0 ... NAME_t9 over the last log lines: (bins,), NaN where no sample fell."""
    last = rows[-math.ceil(len(rows) * LAST) :]
    means = []
    for number in range(TIMESTEP_BINS):
        values = [row[key] for row in last if (key := f"{name}_t{number}") in row]
        means.append(float(np.mean(values)) if values else math.nan)
    return np.array(means)


def read_rows(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl. Raises UserError if there are none by timestep."""
    try:
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError):
        raise UserError(
            f"'{folder}' has no readable metrics.jsonl; give the folder of a run of train.py"
        ) from None
    rows = [row for row in rows if isinstance(row, dict) and any(key.startswith("loss_t") for key in row)]
    if not rows:
        raise UserError(f"'{folder}' has no losses by timestep yet; train it to its first log line")
    return rows


def distinct_ending(path: Path, paths: list[Path]) -> str:
    """The last parts of a path, as many as tell it from the others."""
    own = path.resolve()
    others = {other.resolve() for other in paths} - {own}
    for count in range(1, len(own.parts)):
        ending = own.parts[-count:]
        if all(other.parts[-count:] != ending for other in others):
            return "/".join(ending)
    return str(own)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--output", type=Path, default=Path("by_timestep.png"), help="picture (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    cli.check_output_file("--output", args.output)
    check_format("--output", args.output)
    runs = {}
    for folder in args.runs:
        runs[distinct_ending(folder, args.runs)] = read_rows(folder)
    draw(runs, args.output)
    # The numbers, for who wants them exactly
    for label, rows in runs.items():
        print(label)
        for name, title in TITLES.items():
            numbers = " ".join(f"{value:.4f}" for value in last_means(rows, name))
            print(f"  {title}, t rising: {numbers}")
    print(f"written to {args.output}")


if __name__ == "__main__":
    cli.run(main)
