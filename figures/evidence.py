"""Tables and figures of the evidence from stored summaries alone.

    python -m figures.evidence results/evidence --output docs/evidence

reads every summary.json of scripts.evidence below the folder, and writes tables.md and the figures. Runs that
differ in their seed only are one model: its numbers are means with the standard deviation over seeds. What has no
data is left out. A new run is one more folder.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

import cli
from data.files import write_text
from evaluation.comparison import METRIC_NAMES
from evaluation.evidence import Evidence, Model, Point, losses, read
from figures import evidence_tables as tables
from figures.canvas import SMALL, figure_name, save_figure

# Characters of a model's name
LONGEST = 48
# Size of a panel in inches
WIDTH = 3.8
HEIGHT = 3.2

PLACES = {"object": "tab:orange", "background": "tab:blue"}

# A legend above its panel, where it hides nothing
ABOVE: dict[str, Any] = {
    "fontsize": 7,
    "loc": "lower center",
    "bbox_to_anchor": (0.5, 1),
    "ncols": 2,
    "frameon": False,
}

# Beginning of the names of floors
FLOOR = "floor: "
NOTE = (
    "lines: kept tokens dropped, from none at the right\n"
    "to the named share, with the same seeds\n"
    "stars: Lite-CFG; bars: standard deviation over seeds"
)

# Marker and colours of each kind of model
KINDS = {
    "learned": ("o", ("tab:blue", "tab:purple", "tab:cyan", "navy", "tab:pink", "slateblue", "deepskyblue")),
    "control": ("^", ("tab:green", "tab:olive", "darkgreen", "limegreen")),
    "static": ("s", ("tab:orange", "tab:red", "tab:brown", "black", "goldenrod")),
}


def short(model: Model) -> str:
    return figure_name(model.label, LONGEST)


def kind_of(model: Model) -> str:
    if model.is_static:
        return "static"
    return "learned" if model.has_learned_router else "control"


def styles_of(models: Sequence[Model]) -> list[dict[str, Any]]:
    """Marker and colour of each model; the colours of a kind repeat when there are too few."""
    styles: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for model in models:
        kind = kind_of(model)
        marker, colours = KINDS[kind]
        styles.append({"marker": marker, "color": colours[counts[kind] % len(colours)]})
        counts[kind] += 1
    return styles


# ------------------------------------------------------------------------------------------- quality against cost


def draw_pareto(evidence: Evidence) -> Figure | None:
    """DC-DiT with its budgets, control routers and static DiTs: a panel per guidance scale.

    Models whose prediction is not the usual one are in the tables only: they would squeeze the others together.
    """
    models = evidence.main_models()
    usual = statistics.multimode(model.prediction for model in models)
    models = [model for model in models if model.prediction in usual]
    return draw_against_cost(evidence, evidence.scales, models, trained_points)


def trained_points(model: Model) -> list[Point]:
    """The points of a model without budgets that it was not trained for."""
    return [point for point in model.points() if model.has_many_budgets or not point.drop]


def draw_budgets(evidence: Evidence) -> Figure | None:
    """One checkpoint at many budgets, the same without multi-budget training, and one model per budget."""
    models: list[Model] = []
    for pair in evidence.multi_budget_pairs():
        models += pair
    for many, single, _ in evidence.budget_pairs():
        models += [many, single]
    if not models:
        return None
    # Each model once, in the order of the other figures
    models = [model for model in evidence.models if model in models]
    # Scales at which a model has several budgets
    scales = sorted({point.scale for model in models for point in model.points() if point.drop})
    return draw_against_cost(evidence, scales, models, Model.points) if scales else None


def draw_against_cost(
    evidence: Evidence,
    scales: Sequence[float],
    models: Sequence[Model],
    points_of: Callable[[Model], list[Point]],
) -> Figure:
    """The Fréchet distance against TFLOP per image, a panel per guidance scale, with one legend."""
    points = [points_of(model) for model in models]
    columns = len(scales)
    legend_height = 0.07 * (len(models) + len(evidence.floors))
    figure = Figure(figsize=(WIDTH * columns, HEIGHT + legend_height), dpi=120, layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for scale, axis in zip(scales, panels):
        draw_panel(axis, models, points, evidence.distance, scale)
        draw_floors(axis, evidence)
    figure.suptitle(NOTE, fontsize=7)
    # A model may have no point in the first panel
    entries: dict[str, Any] = {}
    for axis in panels:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    labels = sorted(entries, key=lambda label: label.startswith(FLOOR))
    handles = [entries[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=7)
    return figure


def draw_panel(
    axis: Axes, models: Sequence[Model], points_by_model: Sequence[list[Point]], metric: str, scale: float
) -> None:
    """The dropped shares of each model as a curve; Lite-CFG as a star beside it."""
    costs = []
    for model, own, style in zip(models, points_by_model, styles_of(models)):
        points = [point for point in own if point.scale == scale]
        plain = [point for point in points if point.lite is None]
        lite = [point for point in points if point.lite is not None]
        costs += draw_points(axis, model, metric, plain, **style, ms=4, label=short(model))
        draw_line(axis, model, metric, plain, style["color"])
        costs += draw_points(axis, model, metric, lite, **{**style, "marker": "*"}, ms=9)
    axis.set_title(f"guidance: {tables.guidance(scale)}")
    axis.set_xlabel("TFLOP per image")
    axis.set_ylabel(METRIC_NAMES[metric])
    axis.xaxis.set_major_locator(MaxNLocator(5))
    # Small differences must not look large
    if costs:
        axis.set_xlim(min(costs) / 2, 1.05 * max(costs))
    _, top = axis.get_ylim()
    axis.set_ylim(0, 1.05 * top)


def draw_points(axis: Axes, model: Model, metric: str, points: Sequence[Point], **style: Any) -> list[float]:
    """Points with their spread over seeds. Returns the costs; points that were not measured are left out."""
    costs = []
    means = []
    spreads = []
    for point in points:
        cost = model.at(point, "tflop_per_image")
        number = model.at(point, metric)
        if cost and number:
            costs.append(cost.mean)
            means.append(number.mean)
            # One seed has no bar
            spreads.append(number.std if len(number.values) > 1 else math.nan)
    if costs:
        axis.errorbar(costs, means, spreads, capsize=3, elinewidth=1, linestyle="none", **style)
    return costs


def draw_line(axis: Axes, model: Model, metric: str, points: Sequence[Point], colour: str) -> None:
    """A line through the points, by the seeds that have them all: other seeds would look like a slope."""
    joined = [
        (model.at(point, "tflop_per_image", points), model.at(point, metric, points)) for point in points
    ]
    line = [(cost.mean, number.mean) for cost, number in joined if cost and number]
    if len(line) > 1:
        axis.plot(*zip(*line), linewidth=1, color=colour)
        end: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 7, "color": colour}
        axis.annotate(f"{points[-1].drop:.0%} ", line[-1], textcoords="offset points", xytext=(-4, 5), **end)


def draw_floors(axis: Axes, evidence: Evidence) -> None:
    """A line for each floor: what real images score."""
    for line, (name, row) in zip((":", "--"), evidence.floors.items()):
        value = row.get(evidence.distance)
        if value is not None:
            axis.axhline(value, color="grey", linestyle=line, linewidth=1, label=f"{FLOOR}{name}")


# -------------------------------------------------------------------------------------------- routing and upcycling


def draw_routing(evidence: Evidence) -> Figure | None:
    """Kept share on objects and background as bars, and against t as curves.

    The control routers keep one share at every t, and have no curve.
    """
    models = [model for model in evidence.models if model.timesteps]
    if not models:
        return None
    figure = Figure(figsize=(9, HEIGHT), dpi=120, layout="constrained")
    bars, curves = figure.subplots(1, 2)
    draw_places(bars, models)
    learned = [model for model in models if model.has_learned_router]
    for model in learned:
        means = []
        spreads = []
        for t in model.timesteps:
            number = model.routing("all", t, t)
            assert number is not None
            means.append(number.mean)
            spreads.append(number.std)
        curves.errorbar(model.timesteps, means, spreads, marker="o", ms=3, label=short(model))
    curves.set_xlim(1, 0)
    curves.set_ylim(0, None)
    curves.set_xlabel("t / number of timesteps (noise at the left)")
    curves.set_ylabel("share of tokens kept")
    if learned:
        curves.legend(**ABOVE)
    return figure


def draw_places(axis: Axes, models: Sequence[Model]) -> None:
    """Two bars for each model."""
    for name, colour in PLACES.items():
        shift = 0.35 if name == "background" else 0.0
        for index, model in enumerate(models):
            number = model.routing(name)
            assert number is not None
            label = f"on {name}" if index == 0 else None
            axis.barh(index + shift, number.mean, 0.33, xerr=number.std, color=colour, label=label)
    middles = [index + 0.175 for index in range(len(models))]
    axis.set_yticks(middles, [short(model) for model in models])
    axis.invert_yaxis()
    axis.set_xlabel("share of tokens kept, all t")
    axis.legend(**ABOVE)


def draw_upcycling(evidence: Evidence) -> Figure | None:
    """Diffusion loss of the models from scratch and upcycled."""
    models: list[Model] = []
    for pair in evidence.upcycled_pairs():
        models += pair
    if not models:
        return None
    figure = Figure(figsize=(6, HEIGHT), dpi=120, layout="constrained")
    axis = figure.subplots()
    for model in evidence.models:
        if model in models:
            curve = losses(model)
            axis.plot(list(curve), list(curve.values()), label=short(model))
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel("diffusion loss")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    axis.legend(fontsize=7)
    return figure


# --------------------------------------------------------------------------------------------------------- command


class Section(NamedTuple):
    """A table, and the figure above it."""

    title: str
    table: Callable[[Evidence], str | None]
    picture: str = ""
    draw: Callable[[Evidence], Figure | None] | None = None


SECTIONS = (
    Section("DC-DiT against models of about equal FLOPs", tables.headline),
    Section("Quality against cost", tables.quality_and_cost, "pareto.png", draw_pareto),
    Section("Kept tokens on objects and on background", tables.kept_by_place, "routing.png", draw_routing),
    Section("Kept tokens against t", tables.kept_by_t),
    Section("Tail dropping with and without multi-budget training", tables.tail_dropping),
    Section("One checkpoint at many budgets", tables.one_for_many, "budgets.png", draw_budgets),
    Section("Lite-CFG against full guidance", tables.lite_cfg),
    Section("Upcycling", tables.upcycling, "upcycling.png", draw_upcycling),
    Section("Class accuracy", tables.class_accuracy),
    Section("Runs", tables.runs),
    Section("Commands that measured them", tables.measuring_commands),
)


INTRODUCTION = """# What was measured

Written by `python -m figures.evidence` from the summaries of the runs. A ± is the standard deviation over
seeds. TFLOP and milliseconds are those of denoising one image. Milliseconds depend on the machine, and those
of two runs cannot be compared.
"""


@rc_context(SMALL)
def write(evidence: Evidence, output: Path) -> list[str]:
    """Write tables.md and the figures; returns the names of the files."""
    output.mkdir(parents=True, exist_ok=True)
    parts = [INTRODUCTION]
    files = ["tables.md"]
    for section in SECTIONS:
        text = section.table(evidence) or ""
        figure = section.draw(evidence) if section.draw else None
        if figure is not None:
            save_figure(figure, output / section.picture)
            files.append(section.picture)
            text = f"![{section.title}]({section.picture})\n\n{text}"
        if text:
            parts.append(f"## {section.title}\n\n{text}")
    write_text(output / "tables.md", "\n".join(parts))
    return files


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("results", type=Path, help="folder with the summaries of scripts.evidence")
    add("--output", type=Path, default=Path("docs/evidence"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    cli.check_output("--output", args.output)
    evidence = read(args.results)
    files = write(evidence, args.output)
    runs = sum(len(model.runs) for model in evidence.models)
    print(f"{runs} runs of {len(evidence.models)} models: {', '.join(files)} in {args.output}")


if __name__ == "__main__":
    cli.run(main)
