"""Tables and figures of the evidence from stored summaries alone.

    python -m figures.evidence results/evidence --output assets/evidence

reads every summary.json of scripts.evidence below the folder, and writes tables.md and the figures. Runs that
differ in their seed only are one model: its numbers are means with the standard deviation over seeds. What has no
data is left out. A new run is one more folder.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
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
WIDTH = 4.6
HEIGHT = 3.4

PLACES = {"object": "tab:orange", "background": "tab:blue"}


def short(model: Model) -> str:
    return figure_name(model.label, LONGEST)


def colour_of(number: int) -> Any:
    """Twenty colours before one repeats."""
    return matplotlib.colormaps["tab20"](number % 20)


# ------------------------------------------------------------------------------------------- quality against cost


def draw_pareto(evidence: Evidence) -> Figure | None:
    """Every model: a panel per metric (rows) and guidance scale (columns)."""
    rows = len(evidence.metrics)
    columns = len(evidence.scales)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), dpi=120, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for metric, row in zip(evidence.metrics, panels):
        for scale, axis in zip(evidence.scales, row):
            draw_panel(axis, evidence.models, metric, scale)
            draw_floors(axis, evidence, metric)
    figure.suptitle("points of a curve: shares of the tokens dropped; stars: Lite-CFG", fontsize=8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
    return figure


def draw_budgets(evidence: Evidence) -> Figure | None:
    """One checkpoint at many budgets, the same without multi-budget training, and one model per budget."""
    models: list[Model] = []
    for pair in evidence.multi_budget_pairs():
        models += pair
    for trained, single in evidence.budget_groups():
        models += [trained, *single]
    if not models:
        return None
    # Each model once, in the order of the other figures
    chosen = [model for model in evidence.models if model in models]
    columns = len(evidence.scales)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT), dpi=120, layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for scale, axis in zip(evidence.scales, panels):
        draw_panel(axis, chosen, evidence.distance, scale)
        axis.legend(fontsize=6)
    return figure


def draw_panel(axis: Axes, models: Sequence[Model], metric: str, scale: float) -> None:
    """The dropped shares of each model as a curve; Lite-CFG as a star beside it."""
    for number, model in enumerate(models):
        points = [point for point in model.points() if point.scale == scale]
        plain = [point for point in points if point.lite is None]
        lite = [point for point in points if point.lite is not None]
        colour = colour_of(number)
        marker = "s" if model.is_static else "o"
        draw_points(axis, model, metric, plain, marker=marker, ms=4, color=colour, label=short(model))
        draw_points(axis, model, metric, lite, marker="*", ms=9, color=colour, linestyle="none")
    axis.set_title(f"guidance: {tables.guidance(scale)}")
    axis.set_xlabel("TFLOP per image")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.set_ylabel(METRIC_NAMES[metric])
    # KID may be negative
    if metric != "kid":
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))


def draw_points(axis: Axes, model: Model, metric: str, points: Sequence[Point], **style: Any) -> None:
    """Points with their spread over seeds; those that were not measured are left out."""
    costs = []
    means = []
    spreads = []
    for point in points:
        cost = model.at(point, "tflop_per_image")
        number = model.at(point, metric)
        if cost and number:
            costs.append(cost.mean)
            means.append(number.mean)
            spreads.append(number.std)
    if costs:
        axis.errorbar(costs, means, spreads, capsize=2, **style)


def draw_floors(axis: Axes, evidence: Evidence, metric: str) -> None:
    """A line for each floor that is not far below the models, whose differences would become invisible."""
    lowest, _ = axis.get_ylim()
    for style, (name, row) in zip((":", "--"), evidence.floors.items()):
        if row.get(metric, 0) > lowest / 20:
            label = f"floor: {name}"
            axis.axhline(row[metric], color="grey", linestyle=style, linewidth=1, label=label)


# -------------------------------------------------------------------------------------------- routing and upcycling


def draw_routing(evidence: Evidence) -> Figure | None:
    """Kept share on objects and background as bars, and against t as curves."""
    models = [model for model in evidence.models if model.timesteps]
    if not models:
        return None
    figure = Figure(figsize=(9, HEIGHT), dpi=120, layout="constrained")
    bars, curves = figure.subplots(1, 2)
    draw_places(bars, models)
    for model in models:
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
    curves.legend(fontsize=7)
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
    axis.legend(fontsize=7)


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
    Section("DC-DiT against static DiTs of about equal FLOPs", tables.headline),
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


@rc_context(SMALL)
def write(evidence: Evidence, output: Path) -> list[str]:
    """Write tables.md and the figures; returns the names of the files."""
    output.mkdir(parents=True, exist_ok=True)
    parts = []
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
    add("--output", type=Path, default=Path("assets/evidence"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    cli.check_output("--output", args.output)
    evidence = read(args.results)
    files = write(evidence, args.output)
    runs = sum(len(model.runs) for model in evidence.models)
    print(f"{runs} runs of {len(evidence.models)} models: {', '.join(files)} in {args.output}")


if __name__ == "__main__":
    cli.run(main)
