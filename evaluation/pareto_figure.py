"""The figure of evaluation/pareto.py: quality against cost, a panel per guidance scale."""

from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.charts import SMALL, save_figure

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
