"""Quality against cost: every budget of every checkpoint is sampled, compared with a reference, and drawn.

    python -m figures.pareto --ckpt A.pt --ckpt B.pt --budgets 0,0.2,0.4,0.6 --cfg-scale 1,1.5 --reference R.npz

writes pareto.csv, a row per point, and pareto.png, a panel per guidance scale, into --output. The same command resumes where it
was, and with more checkpoints, budgets or scales it adds points. A static DiT is one point per scale. Under torchrun the
processes share the work.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import cli
from config import UserError
from diffusion.samplers import SAMPLERS
from evaluation.pareto import measure
from figures.canvas import SMALL, save_figure
from processes import group

METRICS = {"fid": "FID", "frechet_distance": "Fréchet distance"}


class Mark(NamedTuple):
    """One row of the table, as far as the figure needs it."""

    cost: float  # TFLOP per image
    metric: float
    budget: float


class Curve(NamedTuple):
    """The budgets of one checkpoint at one scale, cheapest first."""

    label: str
    static: bool
    lite: str
    marks: list[Mark]

    def metric_at(self, cost: float) -> float | None:
        """The metric where the curve crosses a cost, or None beyond its ends."""
        for a, b in zip(self.marks, self.marks[1:]):
            if a.cost <= cost <= b.cost and a.cost < b.cost:
                return a.metric + (b.metric - a.metric) * (cost - a.cost) / (b.cost - a.cost)
        return None

    def cost_at(self, metric: float) -> float | None:
        """The lowest cost at which the curve crosses a metric, or None where it never does."""
        for a, b in zip(self.marks, self.marks[1:]):
            if min(a.metric, b.metric) <= metric <= max(a.metric, b.metric) and a.metric != b.metric:
                return a.cost + (b.cost - a.cost) * (metric - a.metric) / (b.metric - a.metric)
        return None


class Comparison(NamedTuple):
    """A curve against a baseline: share of the cost saved at equal metric, and metric gained at equal cost, where known.

    Negative numbers are losses.
    """

    baseline: str
    curve: str
    saving: float | None
    gain: float | None

    def __str__(self) -> str:
        parts = []
        if self.saving is not None:
            parts.append(
                f"{abs(self.saving):.1%} {'less' if self.saving > 0 else 'more'} TFLOP at equal quality"
            )
        if self.gain is not None:
            parts.append(f"{abs(self.gain):.4g} {'lower' if self.gain > 0 else 'higher'} at equal cost")
        return f"{self.curve} against {self.baseline}: {', '.join(parts) or 'no overlap to interpolate in'}"


def metric_of(rows: list[dict[str, str]]) -> str:
    return next(name for name in METRICS if rows[0].get(name))


def read_curves(rows: list[dict[str, str]], scale: str) -> list[Curve]:
    """The curves of one panel."""
    metric, groups = metric_of(rows), {}
    for row in rows:
        if row["cfg_scale"] == scale:
            mark = Mark(float(row["tflop_per_image"]), float(row[metric]), float(row["budget"]))
            groups.setdefault(
                (row["name"], row["step"], row["static"] == "True", row["lite_cfg"], row["model"]), []
            ).append(mark)
    curves = []
    for (name, step, static, lite, _), marks in groups.items():
        label = f"{name}, {int(step):,} steps" + (f", Lite-CFG {float(lite):.0%}" if lite else "")
        curves.append(Curve(label, static, lite, sorted(marks)))
    return curves


def compare_curves(curves: list[Curve]) -> list[tuple[Comparison, Curve, Mark]]:
    """Every curve against the point of every static DiT; without one, the dearest point of every other curve against the first.

    Returns:
        the comparison, the curve that was interpolated, and the point of the other side.
    """
    found = []
    for static in (curve for curve in curves if curve.static):
        mark = static.marks[-1]
        for curve in (curve for curve in curves if not curve.static):
            cost, metric = curve.cost_at(mark.metric), curve.metric_at(mark.cost)
            saving = None if cost is None else 1 - cost / mark.cost
            gain = None if metric is None else mark.metric - metric
            found.append((Comparison(static.label, curve.label, saving, gain), curve, mark))
    if found or not curves:
        return found
    first, *others = curves
    for other in others:
        mark = other.marks[-1]
        cost, metric = first.cost_at(mark.metric), first.metric_at(mark.cost)
        saving = None if cost is None else 1 - mark.cost / cost
        gain = None if metric is None else metric - mark.metric
        found.append((Comparison(first.label, other.label, saving, gain), first, mark))
    return found


@rc_context(SMALL)
def draw(rows: list[dict[str, str]], path: Path) -> list[Comparison]:
    """Write the figure; returns what its annotations say."""
    scales = sorted({row["cfg_scale"] for row in rows}, key=float)
    figure = Figure(figsize=(5.2 * len(scales), 4), dpi=120, layout="constrained")
    comparisons = []
    for axis, scale in zip(figure.subplots(1, len(scales), squeeze=False)[0], scales):
        curves = read_curves(rows, scale)
        draw_curves(axis, curves)
        for comparison, curve, mark in compare_curves(curves):
            annotate(axis, comparison, curve, mark)
            comparisons.append(comparison)
        axis.set_title("without guidance" if float(scale) == 1 else f"guidance scale {float(scale):g}")
        axis.set_xlabel("TFLOP per image, all steps and branches")
        axis.set_ylabel(f"{METRICS[metric_of(rows)]} ({rows[0]['images']} images)")
        axis.ticklabel_format(axis="x", scilimits=(-2, 4))
        axis.margins(0.12)
        axis.legend(fontsize=7)
    save_figure(figure, path)
    return comparisons


def draw_curves(axis: Axes, curves: list[Curve]) -> None:
    """A colour per curve, stars for static models, and each budget at its point."""
    for k, curve in enumerate(curves):
        style = (
            {"marker": "*", "markersize": 12, "linestyle": "none"}
            if curve.static
            else {"marker": "o", "markersize": 4}
        )
        if curve.lite:
            style["linestyle"] = "--"
        axis.plot(
            [m.cost for m in curve.marks],
            [m.metric for m in curve.marks],
            color=f"C{k}",
            label=curve.label,
            **style,
        )
        for mark in curve.marks if not curve.static else []:
            label = f"−{mark.budget:.0%}" if mark.budget else "all"
            axis.annotate(
                label, mark[:2], xytext=(4, 4), textcoords="offset points", color=f"C{k}", fontsize=7
            )


def annotate(axis: Axes, comparison: Comparison, curve: Curve, mark: Mark) -> None:
    """Arrows from the point to the interpolated curve: along the cost at equal metric, along the metric at equal cost."""
    targets = []
    if comparison.saving is not None:
        targets.append(((curve.cost_at(mark.metric), mark.metric), f"{comparison.saving:+.0%} TFLOP saved"))
    if comparison.gain is not None:
        targets.append(((mark.cost, curve.metric_at(mark.cost)), f"{comparison.gain:+.3g} gained"))
    for target, text in targets:
        axis.annotate(
            "", target, xytext=mark[:2], arrowprops={"arrowstyle": "->", "color": "grey", "linestyle": ":"}
        )
        middle = [(a + b) / 2 for a, b in zip(target, mark[:2])]
        axis.annotate(text, middle, xytext=(2, 2), textcoords="offset points", fontsize=7, color="grey")


def numbers(text: str) -> list[float]:
    """ "0,0.2" -> [0.0, 0.2], each once and in order."""
    try:
        return sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of numbers such as 0,0.2,0.4") from None


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--ckpt", action="append", required=True, help="checkpoint of train.py; repeatable")
    parser.add_argument(
        "--reference",
        required=True,
        help="ADM .npz, folder of images or file of evaluate.py --make-reference",
    )
    parser.add_argument(
        "--budgets", type=numbers, default=[0.0], help="tail-dropping fractions, e.g. 0,0.2,0.4 (default: 0)"
    )
    parser.add_argument(
        "--cfg-scale", type=numbers, default=[1.0], help="guidance scales, e.g. 1,1.5 (default: 1)"
    )
    parser.add_argument(
        "--lite-cfg", type=numbers, default=[], help="also drop these fractions in the unconditional branch"
    )
    parser.add_argument(
        "--num-samples", type=int, default=50000, help="images per point (default: %(default)s)"
    )
    parser.add_argument("--num-sampling-steps", type=int, default=250, help="(default: %(default)s)")
    parser.add_argument("--sampler", default="ddpm", choices=SAMPLERS, help="(default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=64, help="images per batch and process (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="run the network in bfloat16")
    parser.add_argument(
        "--vae", help="ema, mse or a local diffusers folder (default: the one that the checkpoint names)"
    )
    parser.add_argument(
        "--features",
        default="inception",
        help="or a TorchScript file, or a timm folder (default: %(default)s)",
    )
    parser.add_argument(
        "--inception-weights", metavar="FILE", help="torch-fidelity's weights (default: download them)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("results/pareto"), help="folder (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    for name, least in (("num_samples", 4), ("batch_size", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if args.lite_cfg and max(args.cfg_scale) <= 1:
        raise UserError(
            "--lite-cfg: has no unconditional branch to make cheaper at --cfg-scale 1; add a larger scale"
        )
    cli.check_output("--output", args.output)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows = measure(args)
    picture = args.output / "pareto.png"

    def report() -> None:
        for comparison in draw(rows, picture):
            print(comparison)
        print(f"{len(rows)} points: {args.output / 'pareto.csv'} and {picture}")

    group.on_first(report)


if __name__ == "__main__":
    cli.run(main)
