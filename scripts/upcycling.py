"""How many steps a pretrained DiT saves: DC-DiT from scratch and several ways to upcycle.

    python -m scripts.upcycling --quickstart quickstart --output results/upcycling

trains on the features of the quickstart: a static DiT, a DC-DiT from scratch, and one DC-DiT per entry of
WAYS from the DiT. At the same step, every DC-DiT sees the same images, timesteps and noise (the DiT sees
others), and N is constant. The script prints a table and writes upcycling.png. Run it again to resume where
it stopped.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import cli
import train
from data.files import write_text
from weights.checkpoint import list_checkpoints

CONFIG = "configs/shapes.yaml"
FRESH_SCAFFOLD = "model.upcycle.scaffold=fresh"
FRESH_ROUTER = "model.upcycle.router=fresh"
COPIED = "[blocks, t_embedder, y_embedder]"

# Name of a way to upcycle -> changes of the configuration. No changes: the usual way.
WAYS: dict[str, list[str]] = {
    "copied blocks": [FRESH_SCAFFOLD, FRESH_ROUTER],
    "+ balanced router": [FRESH_SCAFFOLD],
    "+ DiT's scaffold": [],
    "+ frozen for 50 steps": [f"training.frozen={COPIED}", "training.frozen_steps=50"],
    "+ blocks at 0.3 x rate": ["training.lr_scales={blocks: 0.3, t_embedder: 0.3, y_embedder: 0.3}"],
}
DIT = ["model.name=DiT", "model.patch_size=2", "training.seed=1"]
CONSTANT_N = ["training.downsample_factor_start=null", "training.downsample_factor_warmup_steps=0"]

# Steps per point of a curve.
WINDOW = 25
# Steps over which a loss is averaged before it is compared.
SMOOTH = 100

# The rows of a metrics.jsonl.
Rows = list[dict[str, Any]]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    common = [
        f"data.feature_path={args.quickstart / 'features'}",
        f"data.vae={args.quickstart / 'autoencoder'}",
        f"logging.log_every={WINDOW}",
        "logging.ckpt_every=1000000",
        *CONSTANT_N,
    ]

    # The two references
    curves = {
        "DiT": train_run(args.output / "dit", args.steps, [*common, *DIT]),
        "from scratch": train_run(args.output / "scratch", args.steps, common),
    }

    # Every way to upcycle; the usual one is trained to the end
    dit = list_checkpoints(args.output / "dit" / "checkpoints")[-1]
    for number, (name, changes) in enumerate(WAYS.items()):
        steps = args.upcycled_steps if changes else args.steps
        overrides = [*common, f"training.init_from={dit}", *changes]
        curves[name] = train_run(args.output / f"way{number}", steps, overrides)

    table = format_table(curves, args.steps)
    write_text(args.output / "table.md", table)
    draw(curves, args.output / "upcycling.png")
    print(f"\n{table}\n{args.output}/upcycling.png shows the curves.")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add(
        "--quickstart",
        type=Path,
        default=Path("quickstart"),
        help="folder of a quickstart (default: quickstart)",
    )
    output_help = "folder for the runs (default: %(default)s)"
    add("--output", type=Path, default=Path("results/upcycling"), help=output_help)
    steps_help = "steps of the DiT, from scratch, and of the usual way to upcycle (default: %(default)s)"
    add("--steps", type=int, default=1400, help=steps_help)
    upcycled_help = "steps of every other way to upcycle (default: %(default)s)"
    add("--upcycled-steps", type=int, default=500, help=upcycled_help)
    args = parser.parse_args(argv)
    cli.check_at_least(args, SMOOTH, "steps", "upcycled_steps")
    cli.check_output("--output", args.output)
    return args


def train_run(folder: Path, steps: int, overrides: list[str]) -> Rows:
    """Train, or resume, or find the run complete. Returns the rows of its metrics.jsonl."""
    options = ["--config", CONFIG, "--output", str(folder)]
    for override in [*overrides, f"training.max_steps={steps}"]:
        options += ["--set", override]
    train.main(options)
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def smoothed(rows: Rows) -> dict[int, float]:
    """Diffusion loss by step, averaged over the SMOOTH steps before it."""
    count = SMOOTH // WINDOW
    losses = [row["diffusion_loss"] for row in rows]
    means = {}
    for last in range(count - 1, len(rows)):
        window = losses[last - count + 1 : last + 1]
        means[rows[last]["step"]] = sum(window) / count
    return means


def format_table(curves: dict[str, Rows], steps: int) -> str:
    """Losses at some steps, and the steps that each run needs for the losses of the run from scratch."""
    scratch = smoothed(curves["from scratch"])
    loss_steps = [step for step in (100, 200, 500, steps) if step <= steps]
    scratch_steps = [step for step in (steps // 4, steps // 2, steps) if step in scratch]

    header = ["run"]
    header += [f"loss at {step}" for step in loss_steps]
    header += ["kept at the end"]
    header += [f"steps to scratch's {step}" for step in scratch_steps]
    lines = [header, ["---"] * len(header)]
    for name, rows in curves.items():
        losses = smoothed(rows)
        line = [name]
        for step in loss_steps:
            line.append(f"{losses[step]:.4f}" if step in losses else "")
        line.append(f"{rows[-1]['kept_natural_mean']:.1%}")
        for step in scratch_steps:
            # The DiT sees other batches: its losses cannot be compared
            line.append("" if name == "DiT" else steps_to_reach(scratch[step], losses))
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def steps_to_reach(target: float, losses: dict[int, float]) -> str:
    """The first step with at most this loss, or "> 500" if the run ends before."""
    for step, loss in losses.items():
        if loss <= target:
            return str(step)
    return f"> {max(losses)}"


def draw(curves: dict[str, Rows], path: Path) -> None:
    from matplotlib.figure import Figure

    from figures.canvas import save_figure

    colours = {"DiT": "gray", "from scratch": "black"}
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axis = figure.subplots()
    for name, rows in curves.items():
        losses = smoothed(rows)
        linestyle = ":" if name == "DiT" else "-"
        steps = list(losses)
        values = list(losses.values())
        axis.plot(steps, values, label=name, linewidth=1.2, linestyle=linestyle, color=colours.get(name))
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel(f"diffusion loss, mean of {SMOOTH} steps")
    axis.set_yscale("log")
    axis.legend(fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    cli.run(main)
