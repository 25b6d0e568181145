"""Quality against cost: every budget of every checkpoint is sampled, compared with a reference, and drawn.

    python -m figures.pareto --ckpt A.pt --ckpt B.pt --budgets 0,0.2,0.4 --cfg-scale 1,1.5 --reference R.npz

writes pareto.csv, a row per point, and pareto.png, a panel per guidance scale, into --output. The same command
resumes, and with more checkpoints, budgets or scales it adds points. A static DiT is one point per scale. Under
torchrun the processes share the work.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import cli
from config import UserError
from evaluation.comparison import METRIC_NAMES
from evaluation.pareto import ParetoPlan, measure
from figures.canvas import SMALL, figure_name, save_figure
from processes import group
from sampling.arguments import add_weights_argument

# The metrics that are drawn: the first one that the table has
DRAWN = ("fid", "frechet_distance")
# Titles of the panels of the scales that are no guidance
TITLES = {0.0: "without classes", 1.0: "without guidance"}

# Columns that tell models of one name apart, in this order, and their names in a legend
DISTINCTIONS = {"training_seed": "seed", "weights": "weights", "model": "model"}

Row = dict[str, str]


class Mark(NamedTuple):
    """One row of the table: what the figure needs."""

    cost: float  # TFLOP per image
    metric: float
    budget: float  # dropped fraction


class Curve(NamedTuple):
    """The budgets of one checkpoint at one scale, cheapest first."""

    label: str
    static: bool
    lite: str  # dropped fraction of the unconditional branch, empty without Lite-CFG
    marks: list[Mark]

    def metric_at(self, cost: float) -> float | None:
        """The metric where the curve crosses a cost, or None beyond its ends."""
        for a, b in zip(self.marks, self.marks[1:]):
            if a.cost <= cost <= b.cost and a.cost < b.cost:
                slope = (b.metric - a.metric) / (b.cost - a.cost)
                return a.metric + slope * (cost - a.cost)
        return None

    def cost_at(self, metric: float) -> float | None:
        """The lowest cost at which the curve crosses a metric, or None where it never does."""
        for a, b in zip(self.marks, self.marks[1:]):
            lower, higher = sorted((a.metric, b.metric))
            if lower <= metric <= higher and lower < higher:
                slope = (b.cost - a.cost) / (b.metric - a.metric)
                return a.cost + slope * (metric - a.metric)
        return None


class Comparison(NamedTuple):
    """A curve against a baseline: share of the cost saved at equal metric, and metric gained at equal cost.

    None where the curves do not overlap. Negative numbers are losses.
    """

    baseline: str
    curve: str
    saving: float | None
    gain: float | None
    cost: str = "TFLOP"  # or "time"

    def __str__(self) -> str:
        parts = []
        if self.saving is not None:
            direction = "less" if self.saving > 0 else "more"
            parts.append(f"{abs(self.saving):.1%} {direction} {self.cost} at equal quality")
        if self.gain is not None:
            direction = "lower" if self.gain > 0 else "higher"
            parts.append(f"{abs(self.gain):.4g} {direction} at equal {self.cost}")
        found = ", ".join(parts) or "no overlap to interpolate in"
        return f"{self.curve} against {self.baseline}: {found}"


# ----------------------------------------------------------------------------------------------------- curves


def metric_of(rows: list[Row]) -> str:
    """Which metric the table has."""
    return next(name for name in DRAWN if rows[0].get(name))


def read_curves(rows: list[Row], scale: str, cost: str = "tflop_per_image") -> list[Curve]:
    """The curves of one panel; `cost` is a column of the table."""
    metric = metric_of(rows)
    curves: dict[tuple[str, ...], Curve] = {}
    for row in rows:
        if row["cfg_scale"] != scale:
            continue
        lite = row["lite_cfg"]
        key = (row["name"], row["step"], row["static"], lite, row["model"])
        if key not in curves:
            label = curve_label(row) + distinction(row, rows)
            if lite:
                label += f", Lite-CFG {float(lite):.0%}"
            curves[key] = Curve(label, row["static"] == "True", lite, [])
        mark = Mark(float(row[cost]), float(row[metric]), float(row["budget"]))
        curves[key].marks.append(mark)
    for curve in curves.values():
        curve.marks.sort()
    # With Lite-CFG last a model has its colour in every panel, also where it has no guidance
    return sorted(curves.values(), key=lambda curve: bool(curve.lite))


def curve_label(row: Row) -> str:
    return f"{figure_name(row['name'])}, {int(row['step']):,} steps"


def distinction(row: Row, rows: list[Row]) -> str:
    """What tells a model from others with the same label: seed, weights, or else its fingerprint in the table."""
    others = [
        other for other in rows if other["model"] != row["model"] and curve_label(other) == curve_label(row)
    ]
    text = ""
    for column, title in DISTINCTIONS.items():
        own = row.get(column)
        if own and any(other.get(column) != own for other in others):
            text += f", {title} {own}"
            others = [other for other in others if other.get(column) == own]
    return text


def compare_curves(curves: list[Curve]) -> list[tuple[Comparison, Curve, Mark]]:
    """Compare every curve with every static DiT; without one, compare every other curve with the first.

    Returns:
        the comparison, the curve that was interpolated, and the point of the other side.
    """
    static = [curve for curve in curves if curve.static]
    dynamic = [curve for curve in curves if not curve.static]
    found = []
    if static and dynamic:
        # A static DiT is one point: the other curve is interpolated
        for baseline in static:
            mark = baseline.marks[-1]
            for curve in dynamic:
                cost = curve.cost_at(mark.metric)
                metric = curve.metric_at(mark.cost)
                saving = None if cost is None else 1 - cost / mark.cost
                gain = None if metric is None else mark.metric - metric
                found.append((Comparison(baseline.label, curve.label, saving, gain), curve, mark))
        return found
    for curve in curves[1:]:
        # The first curve is interpolated at the most expensive point of the other
        baseline = curves[0]
        mark = curve.marks[-1]
        cost = baseline.cost_at(mark.metric)
        metric = baseline.metric_at(mark.cost)
        saving = None if cost is None else 1 - mark.cost / cost
        gain = None if metric is None else metric - mark.metric
        found.append((Comparison(baseline.label, curve.label, saving, gain), baseline, mark))
    return found


def compare_times(rows: list[Row], scale: str) -> list[Comparison]:
    """The comparisons of a panel in milliseconds per image.

    None unless one call has measured all rows: those of another may have had another machine or batch size.
    """
    calls = {row.get("measured") for row in rows}
    if len(calls) > 1 or calls == {None}:
        return []
    found = compare_curves(read_curves(rows, scale, "ms_per_image"))
    return [comparison._replace(cost="time") for comparison, _, _ in found]


# ---------------------------------------------------------------------------------------------------- picture


@rc_context(SMALL)
def draw(rows: list[Row], path: Path) -> list[Comparison]:
    """Write the figure, a panel per guidance scale; returns its comparisons, and those of the times."""
    scales = sorted({row["cfg_scale"] for row in rows}, key=float)
    figure = Figure(figsize=(5.2 * len(scales), 4), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(scales), squeeze=False)[0]
    comparisons = []
    for axis, scale in zip(panels, scales):
        curves = read_curves(rows, scale)
        draw_curves(axis, curves)
        for comparison, curve, mark in compare_curves(curves):
            annotate(axis, comparison, curve, mark)
            comparisons.append(comparison)
        comparisons += compare_times(rows, scale)
        axis.set_title(TITLES.get(float(scale), f"guidance scale {float(scale):g}"))
        axis.set_xlabel("TFLOP per image, all steps and branches")
        axis.set_ylabel(f"{METRIC_NAMES[metric_of(rows)]} ({rows[0]['images']} images)")
        axis.ticklabel_format(axis="x", scilimits=(-2, 4))
        axis.margins(0.12)
        # With all labels: by itself, a legend leaves out those that begin with "_"
        axis.legend(axis.lines, [curve.label for curve in curves], fontsize=7)
    save_figure(figure, path)
    return comparisons


def draw_curves(axis: Axes, curves: list[Curve]) -> None:
    """A colour per curve, stars for static models, dashes for Lite-CFG, and each budget at its point."""
    for k, curve in enumerate(curves):
        colour = f"C{k}"
        style: dict[str, Any] = {"marker": "o", "markersize": 4}
        if curve.static:
            style = {"marker": "*", "markersize": 12, "linestyle": "none"}
        if curve.lite:
            style["linestyle"] = "--"
        costs = [mark.cost for mark in curve.marks]
        metrics = [mark.metric for mark in curve.marks]
        axis.plot(costs, metrics, color=colour, label=curve.label, **style)
        if curve.static:
            continue
        for mark in curve.marks:
            text = f"−{mark.budget:.0%}" if mark.budget else "all"
            point = (mark.cost, mark.metric)
            axis.annotate(text, point, (4, 4), textcoords="offset points", color=colour, fontsize=7)


def annotate(axis: Axes, comparison: Comparison, curve: Curve, mark: Mark) -> None:
    """Arrows from the point to the interpolated curve, at equal metric and at equal cost."""
    cost = curve.cost_at(mark.metric)
    if cost is not None and comparison.saving is not None:
        draw_arrow(axis, mark, (cost, mark.metric), f"{comparison.saving:+.0%} TFLOP saved")
    metric = curve.metric_at(mark.cost)
    if metric is not None and comparison.gain is not None:
        draw_arrow(axis, mark, (mark.cost, metric), f"{comparison.gain:+.3g} gained")


def draw_arrow(axis: Axes, mark: Mark, target: tuple[float, float], text: str) -> None:
    """A dotted arrow from the mark to the target, and the text beside its middle."""
    arrow = {"arrowstyle": "->", "color": "grey", "linestyle": ":"}
    axis.annotate("", target, (mark.cost, mark.metric), arrowprops=arrow)
    middle = ((target[0] + mark.cost) / 2, (target[1] + mark.metric) / 2)
    axis.annotate(text, middle, (2, 2), textcoords="offset points", fontsize=7, color="grey")


# ---------------------------------------------------------------------------------------------------- command


def numbers(text: str) -> list[float]:
    """ "0,0.2" -> [0.0, 0.2], each once and in order."""
    try:
        values = {float(part) for part in text.split(",")}
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of numbers such as 0,0.2,0.4") from None
    return sorted(values)


def fractions(text: str) -> list[float]:
    """As `numbers`, for dropped shares."""
    values = numbers(text)
    if not all(0 <= value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"'{text}' has a number that is not in [0, 1)")
    return values


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--ckpt", action="append", required=True, help="checkpoint of train.py; repeatable")
    parser.add_argument(
        "--budgets",
        type=fractions,
        default=[0.0],
        help="tail-dropping fractions, e.g. 0,0.2,0.4 (default: 0)",
    )
    parser.add_argument(
        "--lite-cfg", type=fractions, default=[], help="also drop these fractions in the unconditional branch"
    )
    add_weights_argument(parser)
    add_measuring_arguments(parser)
    parser.add_argument(
        "--output", type=Path, default=Path("results/pareto"), help="folder (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    check_measuring_arguments(args)
    if args.lite_cfg and max(args.cfg_scale or [1.0]) <= 1:
        raise UserError(
            "--lite-cfg: has no unconditional branch to make cheaper at --cfg-scale 1; add a larger scale"
        )
    return args


def add_measuring_arguments(parser: cli.Parser) -> None:
    """How points are sampled, and what they are compared with."""
    cli.add_import_argument(parser)
    parser.add_argument(
        "--reference",
        required=True,
        help="ADM .npz, folder of images or file of evaluate.py --make-reference",
    )
    parser.add_argument(
        "--cfg-scale", type=numbers, help="guidance scales, e.g. 1,1.5 (default: 1, which is none)"
    )
    parser.add_argument(
        "--num-samples", type=int, default=50000, help="images per point (default: %(default)s)"
    )
    parser.add_argument("--num-sampling-steps", type=int, default=250, help="(default: %(default)s)")
    parser.add_argument("--sampler", default="ddpm", help="(default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=64, help="images per batch and process (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="run the network in bfloat16")
    cli.add_measuring_tf32_argument(parser)
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


def check_measuring_arguments(args: argparse.Namespace) -> None:
    """UserError for too few images, or a folder for the points that cannot be written."""
    cli.check_at_least(args, 4, "num_samples")
    cli.check_at_least(args, 1, "batch_size")
    cli.check_output("--output", args.output)


def plan_of(args: argparse.Namespace) -> ParetoPlan:
    """The command line as one value."""
    return ParetoPlan(
        checkpoints=args.ckpt,
        vae=args.vae,
        weights=args.weights,
        cfg_scales=args.cfg_scale,
        budgets=args.budgets,
        lite_budgets=args.lite_cfg,
        num_samples=args.num_samples,
        num_sampling_steps=args.num_sampling_steps,
        sampler=args.sampler,
        seed=args.seed,
        bf16=args.bf16,
        tf32=args.tf32,
        batch_size=args.batch_size,
        reference=args.reference,
        features=args.features,
        inception_weights=args.inception_weights,
        output=args.output,
    )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows = measure(plan_of(args))
    picture = args.output / "pareto.png"

    def report() -> None:
        for comparison in draw(rows, picture):
            print(comparison)
        print(f"{len(rows)} points: {args.output / 'pareto.csv'} and {picture}")

    group.on_first(report)


if __name__ == "__main__":
    cli.run(main)
