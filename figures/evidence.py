"""Tables and figures of the evidence from stored summaries alone.

    python -m figures.evidence results/evidence --output assets/evidence

reads every summary.json of scripts.evidence below the folder, and writes tables.md and the figures. Runs that
differ in their seed only are one model: its numbers are means with the standard deviation over seeds. What has no
data is left out. A new run is one more folder.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

import cli
from data.files import write_text
from data.names import MARKUP, short_name
from evaluation.comparison import METRIC_NAMES
from evaluation.evidence import Evidence, Model, Number, Row, losses, read
from figures.canvas import SMALL, figure_name, save_figure

# Costs within this factor count as equal
EQUAL_COST = 1.2
# Characters of a model's name
LONGEST = 80
# Points of the loss curve from scratch, as shares of its steps, that an upcycled model has to reach
LOSSES_TO_REACH = (0.25, 0.5, 1.0)


# ---------------------------------------------------------------------------------------------------------- tables


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def shown(name: str) -> str:
    """A name for a table."""
    return MARKUP.sub(r"\\\g<0>", short_name(name, LONGEST))


def cell(number: Number | None, style: str) -> str:
    return number.text(style) if number else ""


def tflop(number: Number | None) -> str:
    """A cost. Its spread over seeds is the router's, whose kept share stands beside it."""
    return f"{number.mean:.3g}" if number else ""


def style_of(metric: str) -> str:
    return ".4g" if metric == "kid" else ".1f"


def guidance(scale: float) -> str:
    return {0.0: "without classes", 1.0: "none"}.get(scale, f"{scale:g}")


def kept_by_place(evidence: Evidence) -> str | None:
    """Kept share on objects, on the background, and at noisy and clean timesteps."""
    lines = []
    for model in evidence.models:
        on_object = model.routing("object")
        background = model.routing("background")
        if on_object is None or background is None:
            continue
        ratio = [one / other for one, other in zip(on_object.values, background.values)]
        noisy = model.routing("all", low=0.7)
        clean = model.routing("all", high=0.3)
        shares = [on_object, background, clean, noisy]
        line = [shown(model.label), *(cell(share, ".1%") for share in shares)]
        line.insert(3, Number(tuple(ratio)).text(".2f"))
        lines.append([*line, seeds(model)])
    header = ["model", "on objects", "on background", "ratio", "t < 0.3 (clean)", "t > 0.7 (noisy)", "seeds"]
    return table(header, lines) if lines else None


def kept_by_t(evidence: Evidence) -> str | None:
    """Kept share at each timestep."""
    routed = [model for model in evidence.models if model.routing("all")]
    if not routed:
        return None
    timesteps = [row["t"] for row in routed[0].runs[0]["routing"]]
    lines = []
    for model in routed:
        lines.append([shown(model.label), *(cell(model.routing("all", t, t), ".1%") for t in timesteps)])
    return table(["model", *(f"t = {t:g}" for t in timesteps)], lines)


def seeds(model: Model) -> str:
    return str(len(model.runs))


def quality_and_cost(evidence: Evidence) -> str | None:
    """Every point of every model, and the floors."""
    lines = []
    for name, row in evidence.floors.items():
        values = [f"{row[metric]:{style_of(metric)}}" for metric in evidence.metrics if metric in row]
        lines.append([f"floor: {name}", "", "", "", "", "", *values, accuracy_of(row), ""])
    for model in evidence.models:
        for scale, drop, lite in model.points():
            lines.append(quality_line(evidence, model, scale, drop, lite))
    names = [METRIC_NAMES[metric] for metric in evidence.metrics]
    costs = ["kept", "TFLOP per image", "ms per image"]
    header = ["model", "guidance", "dropped", *costs, *names, "class accuracy", "seeds"]
    return table(header, lines)


def accuracy_of(row: Row) -> str:
    return f"{row['class_accuracy']:.1%}" if "class_accuracy" in row else ""


def quality_line(
    evidence: Evidence, model: Model, scale: float, drop: float, lite: float | None
) -> list[str]:
    """One point."""

    def value(name: str, style: str) -> str:
        return cell(model.number(name, scale, drop, lite), style)

    kept = "" if model.is_static else value("kept_share", ".1%")
    with_lite = guidance(scale) + (f", Lite-CFG {lite:.0%}" if lite is not None else "")
    dropped = "" if model.is_static else f"{drop:.0%}"
    line = [shown(model.label), with_lite, dropped, kept]
    line += [tflop(model.number("tflop_per_image", scale, drop, lite)), value("ms_per_image", ".1f")]
    line += [value(metric, style_of(metric)) for metric in evidence.metrics]
    return [*line, value("class_accuracy", ".1%"), seeds(model)]


def headline(evidence: Evidence) -> str | None:
    """Every DC-DiT against every static DiT of about its cost, both whole."""
    lines = []
    for scale in evidence.scales:
        for static in (model for model in evidence.models if model.is_static):
            for model in evidence.models:
                line = None if model.is_static else comparison_line(evidence, model, static, scale)
                if line:
                    lines.append(line)
    names = [METRIC_NAMES[metric] for metric in evidence.metrics]
    header = ["model", "against", "guidance", "TFLOP", *names, f"{names[0]}: do the seeds overlap?"]
    return table(header, lines) if lines else None


def comparison_line(evidence: Evidence, model: Model, static: Model, scale: float) -> list[str] | None:
    """Relative differences of two models; None where a number is missing or the costs are not about equal."""
    ratios = []
    for name in ("tflop_per_image", *evidence.metrics):
        own = model.number(name, scale)
        other = static.number(name, scale)
        if own is None or other is None:
            return None
        ratios.append(own.mean / other.mean)
    if not 1 / EQUAL_COST <= ratios[0] <= EQUAL_COST:
        return None
    changes = [f"{ratio - 1:+.0%}" for ratio in ratios]
    overlap = overlap_of(model.number(evidence.distance, scale), static.number(evidence.distance, scale))
    return [shown(model.label), shown(static.label), guidance(scale), *changes, overlap]


def overlap_of(one: Number | None, other: Number | None) -> str:
    """Whether the ranges of two numbers over seeds overlap."""
    if one is None or other is None or min(len(one.values), len(other.values)) < 2:
        return "one seed"
    apart = max(one.values) < min(other.values) or max(other.values) < min(one.values)
    return "no" if apart else "yes"


def tail_dropping(evidence: Evidence) -> str | None:
    """Models with and without multi-budget training at every dropped share."""
    lines = []
    for trained, other in evidence.multi_budget_pairs():
        lines += drop_lines(evidence, other, "no")
        lines += drop_lines(evidence, trained, "yes")
    names = [METRIC_NAMES[metric] for metric in evidence.metrics]
    header = ["model", "multi-budget training", "guidance", "dropped", "TFLOP per image", *names, "to 0%"]
    return table(header, lines) if lines else None


def drop_lines(evidence: Evidence, model: Model, name: str) -> list[list[str]]:
    """One line per dropped share, with the change of the distance against nothing dropped."""
    lines = []
    for scale, drop, lite in model.points():
        whole = model.number(evidence.distance, scale)
        own = model.number(evidence.distance, scale, drop)
        if lite is not None or whole is None or own is None:
            continue
        line = [shown(model.label), name, guidance(scale), f"{drop:.0%}"]
        line.append(tflop(model.number("tflop_per_image", scale, drop)))
        line += [cell(model.number(metric, scale, drop), style_of(metric)) for metric in evidence.metrics]
        lines.append([*line, f"{own.mean / whole.mean - 1:+.1%}"])
    return lines


def lite_cfg(evidence: Evidence) -> str | None:
    """What Lite-CFG saves against full guidance, and what it changes."""
    lines = []
    for model in evidence.models:
        for scale, drop, lite in model.points():
            if lite is None or drop:
                continue
            line = [shown(model.label), f"{scale:g}", f"{lite:.0%}"]
            for name in ("tflop_per_image", "ms_per_image", *evidence.metrics):
                line.append(change(model.number(name, scale, 0.0, lite), model.number(name, scale)))
            for number in (
                model.number("class_accuracy", scale),
                model.number("class_accuracy", scale, 0, lite),
            ):
                line.append(cell(number, ".1%"))
            lines.append([*line, seeds(model)])
    names = [METRIC_NAMES[metric] for metric in evidence.metrics]
    accuracies = ["class accuracy, full", "with Lite-CFG"]
    header = ["model", "scale", "dropped without label", "TFLOP", "ms", *names, *accuracies, "seeds"]
    return table(header, lines) if lines else None


def change(own: Number | None, other: Number | None) -> str:
    """The relative difference of two means."""
    return f"{own.mean / other.mean - 1:+.1%}" if own and other else ""


def upcycling(evidence: Evidence) -> str | None:
    """The steps that an upcycled model needs for losses of the model from scratch."""
    lines = []
    for upcycled, scratch in evidence.upcycled_pairs():
        known = losses(scratch)
        own = losses(upcycled)
        steps = sorted(known)
        for share in LOSSES_TO_REACH:
            step = steps[math.ceil(share * len(steps)) - 1]
            reached = next((at for at in sorted(own) if own[at] <= known[step]), None)
            needed = f"{reached:,}" if reached else f"> {max(own):,}"
            factor = f"{step / reached:.1f}" if reached else ""
            name = shown(upcycled.label)
            lines.append([name, f"{known[step]:.4f}", f"{step:,}", needed, factor, seeds(upcycled)])
    header = ["model", "diffusion loss", "steps from scratch", "steps upcycled", "times fewer", "seeds"]
    return table(header, lines) if lines else None


def one_for_many(evidence: Evidence) -> str | None:
    """One checkpoint at many budgets beside a model for each budget."""
    lines = []
    for trained, single in evidence.budget_groups():
        for scale in evidence.scales:
            drops = [drop for own, drop, lite in trained.points() if own == scale and lite is None]
            for model, points in ((trained, drops), *((other, [0.0]) for other in single)):
                for drop in points:
                    if model.number(evidence.distance, scale, drop):
                        lines.append(quality_line(evidence, model, scale, drop, None))
    names = [METRIC_NAMES[metric] for metric in evidence.metrics]
    costs = ["kept", "TFLOP per image", "ms per image"]
    header = ["model", "guidance", "dropped", *costs, *names, "class accuracy", "seeds"]
    return table(header, lines) if lines else None


def class_accuracy(evidence: Evidence) -> str | None:
    """The share of samples that the classifier assigns to their class, nothing dropped."""
    lines = []
    width = len(evidence.scales)
    for name, row in evidence.floors.items():
        if "class_accuracy" in row:
            lines.append([f"floor: {name}", *[accuracy_of(row)] * width, ""])
    for model in evidence.models:
        numbers = [model.number("class_accuracy", scale) for scale in evidence.scales]
        if any(numbers):
            shares = [cell(number, ".1%") for number in numbers]
            lines.append([shown(model.label), *shares, seeds(model)])
    header = ["model", *(f"guidance {guidance(scale)}" for scale in evidence.scales), "seeds"]
    return table(header, lines) if lines else None


def runs_table(evidence: Evidence) -> str | None:
    """How every run was made, on what, and how long it took."""
    lines = []
    for model in evidence.models:
        for run in model.runs:
            seconds = run.get("training seconds")
            minutes = f"{seconds / 60:.0f} min" if seconds else ""
            size = f"{run['parameters'] / 1e6:.2f} M"
            line = [shown(run["run"]), shown(model.label), size, f"{run['step']:,}", minutes]
            lines.append([*line, run["hardware"], f"`{run['command']}`"])
    return table(["run", "model", "parameters", "steps", "training", "hardware", "command"], lines)


def measuring_commands(evidence: Evidence) -> str | None:
    commands = {run["measured by"] for model in evidence.models for run in model.runs}
    commands |= {row["measured by"] for row in evidence.floors.values() if "measured by" in row}
    return "".join(f"- `{command}`\n" for command in sorted(commands))


# --------------------------------------------------------------------------------------------------------- figures


def draw_routing(evidence: Evidence, path: Path) -> bool:
    """Kept share on objects and background as bars, and against t as curves."""
    models = [model for model in evidence.models if model.routing("object")]
    if not models:
        return False
    figure = Figure(figsize=(9, 3.2), dpi=120, layout="constrained")
    bars, curves = figure.subplots(1, 2)
    for place, (name, colour) in enumerate((("object", "tab:orange"), ("background", "tab:blue"))):
        numbers = [number for model in models if (number := model.routing(name))]
        positions = [index + 0.35 * place for index in range(len(models))]
        means = [number.mean for number in numbers]
        spreads = [number.std for number in numbers]
        bars.barh(positions, means, 0.33, xerr=spreads, label=f"on {name}", color=colour)
    bars.set_yticks([index + 0.175 for index in range(len(models))], [short(model) for model in models])
    bars.invert_yaxis()
    bars.set_xlabel("share of tokens kept, all t")
    bars.legend(fontsize=7)
    for model in models:
        steps = [row["t"] for row in model.runs[0]["routing"]]
        numbers = [number for t in steps if (number := model.routing("all", t, t))]
        means = [number.mean for number in numbers]
        curves.errorbar(
            steps, means, [number.std for number in numbers], marker="o", ms=3, label=short(model)
        )
    curves.set_xlim(1, 0)
    curves.set_ylim(0, None)
    curves.set_xlabel("t / number of timesteps (noise at the left)")
    curves.set_ylabel("share of tokens kept")
    curves.legend(fontsize=7)
    save_figure(figure, path)
    return True


def short(model: Model) -> str:
    return figure_name(model.label, 48)


def colour_of(number: int) -> Any:
    """Twenty colours before one repeats."""
    return matplotlib.colormaps["tab20"](number % 20)


def draw_pareto(evidence: Evidence, path: Path) -> bool:
    """Every model: a panel per metric (rows) and guidance scale (columns)."""
    size = (4.6 * len(evidence.scales), 3.4 * len(evidence.metrics))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    panels = figure.subplots(len(evidence.metrics), len(evidence.scales), squeeze=False)
    for metric, row in zip(evidence.metrics, panels):
        for scale, axis in zip(evidence.scales, row):
            for number, model in enumerate(evidence.models):
                draw_curves(axis, model, metric, scale, colour_of(number))
            draw_floors(axis, evidence, metric)
            axis.set_title(f"guidance: {guidance(scale)}")
            style_axes(axis, metric)
    figure.suptitle("points of a curve: shares of the tokens dropped; stars: Lite-CFG", fontsize=8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
    save_figure(figure, path)
    return True


def style_axes(axis: Axes, metric: str) -> None:
    """A logarithmic axis for distances; KID may be negative."""
    axis.set_xlabel("TFLOP per image")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.set_ylabel(METRIC_NAMES[metric])
    if metric != "kid":
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))


def draw_curves(axis: Axes, model: Model, metric: str, scale: float, colour: str) -> None:
    """The dropped shares of a model as a curve with the spread over seeds; Lite-CFG as a star beside it."""
    points = [point for point in model.points() if point[0] == scale]
    plain = [(drop, lite) for _, drop, lite in points if lite is None]
    with_lite = [(drop, lite) for _, drop, lite in points if lite is not None]
    marker = "s" if model.is_static else "o"
    draw_points(axis, model, metric, scale, plain, {"marker": marker, "color": colour, "label": short(model)})
    draw_points(
        axis, model, metric, scale, with_lite, {"marker": "*", "ms": 9, "color": colour, "linestyle": "none"}
    )


def draw_points(
    axis: Axes,
    model: Model,
    metric: str,
    scale: float,
    points: Sequence[tuple[float, float | None]],
    style: dict[str, Any],
) -> None:
    costs = []
    means = []
    spreads = []
    for drop, lite in points:
        cost = model.number("tflop_per_image", scale, drop, lite)
        number = model.number(metric, scale, drop, lite)
        if cost and number:
            costs.append(cost.mean)
            means.append(number.mean)
            spreads.append(number.std)
    if costs:
        axis.errorbar(costs, means, spreads, capsize=2, **{"ms": 4, **style})


def draw_floors(axis: Axes, evidence: Evidence, metric: str) -> None:
    """A line for each floor that is not far below the models, whose differences would become invisible."""
    lowest, _ = axis.get_ylim()
    for style, (name, row) in zip((":", "--"), evidence.floors.items()):
        if row.get(metric, 0) > lowest / 20:
            axis.axhline(row[metric], color="grey", linestyle=style, linewidth=1, label=f"floor: {name}")


def draw_budgets(evidence: Evidence, path: Path) -> bool:
    """One checkpoint at many budgets, the same without multi-budget training, and one model per budget."""
    models: dict[int, Model] = {}
    for pair in evidence.multi_budget_pairs():
        models |= {id(model): model for model in pair}
    for trained, single in evidence.budget_groups():
        models |= {id(model): model for model in (trained, *single)}
    if not models:
        return False
    figure = Figure(figsize=(4.6 * len(evidence.scales), 3.4), dpi=120, layout="constrained")
    for scale, axis in zip(evidence.scales, figure.subplots(1, len(evidence.scales), squeeze=False)[0]):
        for number, model in enumerate(models.values()):
            draw_curves(axis, model, evidence.distance, scale, colour_of(number))
        axis.set_title(f"guidance: {guidance(scale)}")
        style_axes(axis, evidence.distance)
        axis.legend(fontsize=6)
    save_figure(figure, path)
    return True


def draw_upcycling(evidence: Evidence, path: Path) -> bool:
    """Diffusion loss of the models from scratch and upcycled."""
    models = {id(model): model for pair in evidence.upcycled_pairs() for model in pair}
    if not models:
        return False
    figure = Figure(figsize=(6, 3.4), dpi=120, layout="constrained")
    axis = figure.subplots()
    for model in models.values():
        curve = losses(model)
        axis.plot(list(curve), list(curve.values()), label=short(model))
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel("diffusion loss")
    axis.set_yscale("log")
    axis.legend(fontsize=7)
    save_figure(figure, path)
    return True


# --------------------------------------------------------------------------------------------------------- command


class Section(NamedTuple):
    """One table, and the figure above it."""

    title: str
    table: Callable[[Evidence], str | None]
    picture: str | None = None
    draw: Callable[[Evidence, Path], bool] | None = None


SECTIONS = (
    Section("DC-DiT against static DiTs of about equal FLOPs", headline),
    Section("Quality against cost", quality_and_cost, "pareto.png", draw_pareto),
    Section("Kept tokens on objects and on background", kept_by_place, "routing.png", draw_routing),
    Section("Kept tokens against t", kept_by_t),
    Section("Tail dropping with and without multi-budget training", tail_dropping),
    Section("One checkpoint at many budgets", one_for_many, "budgets.png", draw_budgets),
    Section("Lite-CFG against full guidance", lite_cfg),
    Section("Upcycling", upcycling, "upcycling.png", draw_upcycling),
    Section("Class accuracy", class_accuracy),
    Section("Runs", runs_table),
    Section("Commands that measured them", measuring_commands),
)


@rc_context(SMALL)
def write(evidence: Evidence, output: Path) -> list[str]:
    """Write tables.md and the figures; returns the names of the files."""
    output.mkdir(parents=True, exist_ok=True)
    parts = []
    files = ["tables.md"]
    for section in SECTIONS:
        text = section.table(evidence)
        drawn = section.draw is not None and section.draw(evidence, output / str(section.picture))
        if drawn:
            files.append(str(section.picture))
        if text or drawn:
            picture = f"![{section.title}]({section.picture})\n\n" if drawn else ""
            parts.append(f"## {section.title}\n\n{picture}{text or ''}")
    write_text(output / "tables.md", "\n".join(parts))
    return files


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("results", type=Path, help="folder with the summaries of scripts.evidence")
    parser.add_argument(
        "--output", type=Path, default=Path("assets/evidence"), help="folder (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    cli.check_output("--output", args.output)
    evidence = read(args.results)
    files = write(evidence, args.output)
    runs = sum(len(model.runs) for model in evidence.models)
    print(f"{runs} runs of {len(evidence.models)} models: {', '.join(files)} in {args.output}")


if __name__ == "__main__":
    cli.run(main)
