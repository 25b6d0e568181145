"""How many steps a pretrained DiT saves: DC-DiT from scratch against several ways to upcycle, on the embedded data set.

    python -m scripts.upcycling --quickstart quickstart --output results/upcycling

trains a static DiT, a DC-DiT from scratch, and one from the DiT per way in WAYS, on the features that the quickstart left.
Every run sees the same images, timesteps and noise at the same step (the DiT sees others), and all have the same constant N.
It prints a table and writes upcycling.png; running it again goes on where it was.
"""

import argparse
import json
from pathlib import Path

import cli
import train
from config import UserError
from data.files import write_file
from weights.checkpoint import list_checkpoints

CONFIG = "configs/shapes.yaml"
COPIED = "[blocks, t_embedder, y_embedder]"
FRESH = ["model.upcycle.scaffold=fresh", "model.upcycle.router=fresh"]
WAYS = {
    "copied blocks": FRESH,
    "+ balanced router": ["model.upcycle.scaffold=fresh"],
    "+ DiT's scaffold": [],
    "+ frozen for 50 steps": [f"training.frozen={COPIED}", "training.frozen_steps=50"],
    "+ blocks at 0.3 x rate": ["training.lr_scales={blocks: 0.3, t_embedder: 0.3, y_embedder: 0.3}"],
}
WINDOW = 25  # steps per point of a curve
SMOOTH = 100  # steps over which a loss is averaged before it is compared


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    common = [
        f"data.feature_path={args.quickstart / 'features'}",
        f"data.vae={args.quickstart / 'autoencoder'}",
    ]
    common += [f"logging.log_every={WINDOW}", "logging.ckpt_every=1000000"]
    common += [
        "training.downsample_factor_start=null",
        "training.downsample_factor_warmup_steps=0",
    ]  # one N for every step
    dit = run(
        args.output / "dit", args.steps, [*common, "model.patch_size=2", "model.name=DiT", "training.seed=1"]
    )
    curves = {"DiT": dit, "from scratch": run(args.output / "scratch", args.steps, common)}
    source = list_checkpoints(args.output / "dit" / "checkpoints")[-1]
    for number, (name, changes) in enumerate(WAYS.items()):
        steps = (
            args.upcycled_steps if changes else args.steps
        )  # the way that training takes by itself is followed to the end
        changes = [*common, f"training.init_from={source}", *changes]
        curves[name] = run(args.output / f"way{number}", steps, changes)
    table = format_table(curves, args.steps)
    write_file(args.output / "table.md", lambda stream: stream.write(table.encode()))
    draw(curves, args.output / "upcycling.png")
    print(f"\n{table}\n{args.output}/upcycling.png shows the curves.")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--quickstart",
        type=Path,
        default=Path("quickstart"),
        help="folder of a quickstart (default: quickstart)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results/upcycling"),
        help="folder for the runs (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=1400,
        help="of the DiT, from scratch and upcycled as is usual (default: 1400)",
    )
    parser.add_argument(
        "--upcycled-steps", type=int, default=500, help="of every other way to upcycle (default: 500)"
    )
    args = parser.parse_args(argv)
    for option in ("steps", "upcycled_steps"):
        if getattr(args, option) < SMOOTH:
            raise UserError(
                f"--{option.replace('_', '-')} {getattr(args, option)}: must be at least {SMOOTH}"
            )
    cli.check_output("--output", args.output)
    return args


def run(folder: Path, steps: int, changes: list[str]) -> list[dict]:
    """Train, or go on, or find it done; the rows of metrics.jsonl."""
    words = [word for change in [*changes, f"training.max_steps={steps}"] for word in ("--set", change)]
    train.main(["--config", CONFIG, "--output", str(folder), *words])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def smoothed(rows: list[dict]) -> dict[int, float]:
    """Diffusion loss by step, averaged over the SMOOTH steps before it."""
    losses, count = [row["diffusion_loss"] for row in rows], SMOOTH // WINDOW
    return {
        row["step"]: sum(losses[k - count + 1 : k + 1]) / count
        for k, row in enumerate(rows)
        if k >= count - 1
    }


def format_table(curves: dict[str, list[dict]], steps: int) -> str:
    """Losses at some steps, and after how many steps a run is where the one from scratch is at some steps."""
    at = [s for s in (100, 200, 500, steps) if s <= steps]
    marks = [s for s in (steps // 4, steps // 2, steps) if s in smoothed(curves["from scratch"])]
    scratch = smoothed(curves["from scratch"])
    header = [
        "run",
        *(f"loss at {s}" for s in at),
        "kept at the end",
        *(f"steps to scratch's {s}" for s in marks),
    ]
    lines = [header, ["---"] * len(header)]
    for name, rows in curves.items():
        own = smoothed(rows)
        losses = [f"{own[s]:.4f}" if s in own else "" for s in at]
        reached = [
            next((str(s) for s, loss in own.items() if loss <= scratch[mark]), f"> {rows[-1]['step']}")
            for mark in marks
        ]
        lines.append(
            [
                name,
                *losses,
                f"{rows[-1]['kept_natural_mean']:.1%}",
                *([""] * len(marks) if name == "DiT" else reached),
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(curves: dict[str, list[dict]], path: Path) -> None:
    from matplotlib.figure import Figure

    from figures.canvas import save_figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axis = figure.subplots()
    for name, rows in curves.items():
        style = {"DiT": {"color": "gray", "linestyle": ":"}, "from scratch": {"color": "black"}}.get(name, {})
        curve = smoothed(rows)
        axis.plot(curve.keys(), curve.values(), label=name, linewidth=1.2, **style)
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel(f"diffusion loss, mean of {SMOOTH} steps")
    axis.set_yscale("log")
    axis.legend(fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    cli.run(main)
