"""The tables of the evidence in Markdown. Each function gives one, or None where there is nothing to show."""

import math
from collections.abc import Iterable, Sequence

from data.names import MARKUP, short_name
from evaluation.comparison import METRIC_NAMES
from evaluation.evidence import Evidence, Model, Number, Point, Row, losses

# Costs within this factor count as equal
EQUAL_COST = 1.1
# Points of the loss curve from scratch, as shares of its steps, that an upcycled model has to reach
LOSSES_TO_REACH = (0.25, 0.5, 1.0)
# Characters of a model's name
LONGEST = 80
# Formats of columns of a point
STYLES = {
    "kept_share": ".1%",
    "ms_per_image": ".1f",
    "precision": ".2f",
    "recall": ".2f",
    "class_accuracy": ".1%",
    "kid": ".3g",
}
OTHER_STYLE = ".1f"

QUALITY_COSTS = ("kept_share", "tflop_per_image", "ms_per_image")
QUALITY_SHARES = ("precision", "recall", "class_accuracy")
QUALITY_START = ["model", "guidance", "dropped", "kept", "TFLOP per image", "ms per image"]

Line = list[str]


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str | None:
    """Markdown; None without lines."""
    body = [row_of(line) for line in lines]
    if not body:
        return None
    rule = ["---"] * len(header)
    return "".join([row_of(header), row_of(rule), *body])


def row_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


# ---------------------------------------------------------------------------------------------------------- cells


def name_of(model: Model) -> str:
    return escaped(model.label)


def escaped(name: str) -> str:
    """A name in Markdown."""
    return MARKUP.sub(r"\\\g<0>", short_name(name, LONGEST))


def seeds(model: Model, point: Point | None = None) -> str:
    """Number of runs, or of those at which a point was measured."""
    cost = model.at(point, "tflop_per_image") if point else None
    return str(len(cost.values) if cost else len(model.runs))


def value(model: Model, point: Point, column: str) -> str:
    """A column of a point with its spread over seeds; empty where it was not measured."""
    number = model.at(point, column)
    if number is None:
        return ""
    # The spread of the cost is the router's, whose kept share stands beside it
    if column == "tflop_per_image":
        return f"{number.mean:.3g}"
    return number.text(STYLES.get(column, OTHER_STYLE))


def values(model: Model, point: Point, columns: Iterable[str]) -> Line:
    return [value(model, point, column) for column in columns]


def share(number: Number | None) -> str:
    return number.text(".1%") if number else ""


def floor_value(row: Row, column: str) -> str:
    return f"{row[column]:{STYLES.get(column, OTHER_STYLE)}}" if column in row else ""


def change(own: Number | None, other: Number | None) -> str:
    """The relative difference of two means."""
    return f"{own.mean / other.mean - 1:+.1%}" if own and other else ""


def guidance(scale: float) -> str:
    names = {0.0: "without classes", 1.0: "none"}
    return names.get(scale, f"{scale:g}")


# ------------------------------------------------------------------------------------------- quality against cost


def headline(evidence: Evidence) -> str | None:
    """Every DC-DiT against every static DiT and control router of about its cost, nothing dropped."""
    learned = [model for model in evidence.main_models() if model.has_learned_router]
    others = [model for model in evidence.main_models() if not model.has_learned_router]
    lines = []
    for scale in evidence.scales:
        for baseline in others:
            for model in learned:
                if model.prediction == baseline.prediction and has_equal_cost(model, baseline, scale):
                    lines += headline_lines(evidence, model, baseline, scale)
    start = ["model", "against", "guidance", "TFLOP per image", "metric"]
    return table([*start, "model's", "the other's", "difference", "do the seeds overlap?"], lines)


def has_equal_cost(model: Model, baseline: Model, scale: float) -> bool:
    own = model.at(Point(scale), "tflop_per_image")
    other = baseline.at(Point(scale), "tflop_per_image")
    if own is None or other is None:
        return False
    return 1 / EQUAL_COST <= own.mean / other.mean <= EQUAL_COST


def headline_lines(evidence: Evidence, model: Model, baseline: Model, scale: float) -> list[Line]:
    """A line per metric: both values, their relative difference, and whether the seeds decide it."""
    whole = Point(scale)
    cost = change(model.at(whole, "tflop_per_image"), baseline.at(whole, "tflop_per_image"))
    lines = []
    for metric, name in zip(evidence.metrics, evidence.metric_names):
        own = model.at(whole, metric)
        other = baseline.at(whole, metric)
        line = [name_of(model), name_of(baseline), guidance(scale), cost, name]
        line += [value(model, whole, metric), value(baseline, whole, metric)]
        lines.append([*line, change(own, other), overlap(own, other)])
    return lines


def overlap(one: Number | None, other: Number | None) -> str:
    """Whether the ranges of two numbers over seeds overlap."""
    if one is None or other is None or min(len(one.values), len(other.values)) < 2:
        return "one seed"
    is_below = max(one.values) < min(other.values)
    is_above = min(one.values) > max(other.values)
    return "no" if is_below or is_above else "yes"


def quality_and_cost(evidence: Evidence) -> str | None:
    """Every point of every model, below the floors."""
    lines = []
    for name, row in evidence.floors.items():
        line = [f"floor: {name}", *[""] * (len(QUALITY_START) - 1)]
        for column in (*evidence.metrics, *QUALITY_SHARES):
            line.append(floor_value(row, column))
        lines.append([*line, ""])
    for model in evidence.models:
        for point in model.points():
            lines.append(quality_line(evidence, model, point))
    return table(quality_header(evidence), lines)


def quality_header(evidence: Evidence) -> Line:
    shares = [METRIC_NAMES[column] for column in QUALITY_SHARES]
    return [*QUALITY_START, *evidence.metric_names, *shares, "seeds"]


def quality_line(evidence: Evidence, model: Model, point: Point) -> Line:
    guided = guidance(point.scale)
    if point.lite is not None:
        guided += f", Lite-CFG {point.lite:.0%}"
    costs = values(model, point, QUALITY_COSTS)
    dropped = f"{point.drop:.0%}"
    # A static DiT keeps everything
    if model.is_static:
        costs[0] = ""
        dropped = ""
    quality = values(model, point, (*evidence.metrics, *QUALITY_SHARES))
    return [name_of(model), guided, dropped, *costs, *quality, seeds(model, point)]


def class_accuracy(evidence: Evidence) -> str | None:
    """The share of samples that the classifier assigns to their class, nothing dropped."""
    lines = []
    for name, row in evidence.floors.items():
        accuracy = floor_value(row, "class_accuracy")
        if accuracy:
            lines.append([f"floor: {name}", *[accuracy] * len(evidence.scales), ""])
    for model in evidence.models:
        shares = [value(model, Point(scale), "class_accuracy") for scale in evidence.scales]
        if any(shares):
            lines.append([name_of(model), *shares, seeds(model)])
    columns = [f"guidance {guidance(scale)}" for scale in evidence.scales]
    return table(["model", *columns, "seeds"], lines)


# --------------------------------------------------------------------------------------------------------- routing


def kept_by_place(evidence: Evidence) -> str | None:
    """Kept share on objects, on the background, and at clean and noisy timesteps."""
    lines = []
    for model in evidence.models:
        on_object = model.routing("object")
        background = model.routing("background")
        if on_object is None or background is None:
            continue
        ratios = [one / other for one, other in zip(on_object.values, background.values)]
        line = [name_of(model), share(on_object), share(background), Number(tuple(ratios)).text(".2f")]
        line.append(share(model.routing("all", high=0.3)))
        line.append(share(model.routing("all", low=0.7)))
        lines.append([*line, str(len(ratios))])
    header = ["model", "on objects", "on background", "ratio", "t < 0.3 (clean)", "t > 0.7 (noisy)", "seeds"]
    return table(header, lines)


def kept_by_t(evidence: Evidence) -> str | None:
    """Kept share at each timestep."""
    routed = [model for model in evidence.models if model.timesteps]
    if not routed:
        return None
    timesteps = routed[0].timesteps
    lines = []
    for model in routed:
        shares = [share(model.routing("all", t, t)) for t in timesteps]
        lines.append([name_of(model), *shares])
    header = [f"t = {t:g}" for t in timesteps]
    return table(["model", *header], lines)


# --------------------------------------------------------------------------------------------------------- budgets


def tail_dropping(evidence: Evidence) -> str | None:
    """Models with and without multi-budget training at every dropped share."""
    lines = []
    for trained, other in evidence.multi_budget_pairs():
        lines += drop_lines(evidence, other, "no")
        lines += drop_lines(evidence, trained, "yes")
    start = ["model", "multi-budget training", "guidance", "dropped", "TFLOP per image"]
    return table([*start, *evidence.metric_names, "to 0%", "seeds"], lines)


def drop_lines(evidence: Evidence, model: Model, training: str) -> list[Line]:
    """A line per dropped share; the change is that of the distance against nothing dropped, with the same seeds."""
    lines = []
    for point in model.points():
        if point.lite is not None:
            continue
        line = [name_of(model), training, guidance(point.scale), f"{point.drop:.0%}"]
        line += values(model, point, ("tflop_per_image", *evidence.metrics))
        ratio = model.relative(point, Point(point.scale), evidence.distance)
        lines.append([*line, f"{ratio.mean - 1:+.1%}" if ratio else "", seeds(model, point)])
    return lines


def one_for_many(evidence: Evidence) -> str | None:
    """Models that were trained for one budget, each beside the checkpoint for many at the same cost."""
    lines = []
    for scale in evidence.scales:
        for many, single, _ in evidence.budget_pairs():
            lines += budget_lines(evidence, many, single, Point(scale))
    distance = evidence.metric_names[0]
    start = ["guidance", "model for one budget", "kept", "TFLOP per image", distance]
    many_header = f"{distance} of the checkpoint for many, at this cost"
    return table([*start, many_header, "difference", "seeds"], lines)


def budget_lines(evidence: Evidence, many: Model, single: Model, point: Point) -> list[Line]:
    """A model for one budget, and the other between two of its budgets; nothing if they do not reach this cost."""
    cost = single.at(point, "tflop_per_image")
    own = single.at(point, evidence.distance)
    other = many.at_cost(point.scale, cost.mean, evidence.distance) if cost else None
    if own is None or other is None:
        return []
    line = [guidance(point.scale), name_of(single)]
    line += values(single, point, ("kept_share", "tflop_per_image", evidence.distance))
    line += [other.text(OTHER_STYLE), change(other, own)]
    return [[*line, f"{seeds(single, point)} and {len(other.values)}"]]


def lite_cfg(evidence: Evidence) -> str | None:
    """What Lite-CFG saves against full guidance, and what it changes."""
    lines = []
    for model in evidence.models:
        for point in model.points():
            if point.lite is not None and not point.drop:
                lines.append(lite_line(evidence, model, point))
    start = ["model", "scale", "dropped without label", "TFLOP", "ms"]
    accuracies = ["class accuracy, full", "with Lite-CFG"]
    return table([*start, *evidence.metric_names, *accuracies, "seeds"], lines)


def lite_line(evidence: Evidence, model: Model, point: Point) -> Line:
    full = Point(point.scale)
    line = [name_of(model), f"{point.scale:g}", f"{point.lite:.0%}"]
    # Of the seeds that have both
    for column in ("tflop_per_image", "ms_per_image", *evidence.metrics):
        ratio = model.relative(point, full, column)
        line.append(f"{ratio.mean - 1:+.1%}" if ratio else "")
    for own, other in ((full, point), (point, full)):
        line.append(share(model.at(own, "class_accuracy", also=[other])))
    return [*line, seeds(model, point)]


# ------------------------------------------------------------------------------------------------ upcycling, runs


def upcycling(evidence: Evidence) -> str | None:
    """The steps that an upcycled model needs for losses of the model from scratch."""
    lines = []
    for upcycled, scratch in evidence.upcycled_pairs():
        known = losses(scratch)
        steps = sorted(known)
        # Runs of a few log lines have no running mean
        if not (steps and losses(upcycled)):
            continue
        for part in LOSSES_TO_REACH:
            # The last logged step of this part of the curve
            step = steps[math.ceil(part * len(steps)) - 1]
            lines.append(upcycling_line(upcycled, step, known[step]))
    header = ["model", "diffusion loss", "steps from scratch", "steps upcycled", "times fewer", "seeds"]
    return table(header, lines)


def upcycling_line(upcycled: Model, step: int, loss: float) -> Line:
    """Where the upcycled model reaches the loss that the other has at a step."""
    own = losses(upcycled)
    enough = [at for at in sorted(own) if own[at] <= loss]
    needed = f"{enough[0]:,}" if enough else f"> {max(own):,}"
    factor = f"{step / enough[0]:.1f}" if enough else ""
    return [name_of(upcycled), f"{loss:.4f}", f"{step:,}", needed, factor, seeds(upcycled)]


def runs(evidence: Evidence) -> str | None:
    """How every run was made, how long it took, and what measured it."""
    lines = []
    for model in evidence.models:
        for run in model.runs:
            seconds = run["training seconds"]
            minutes = f"{seconds / 60:.0f} min" if seconds else ""
            size = f"{run['parameters'] / 1e6:.2f} M"
            line = [escaped(run["run"]), name_of(model), size, f"{run['step']:,}", minutes]
            lines.append([*line, run["hardware"], f"`{run['command']}`"])
    return table(["run", "model", "parameters", "steps", "training", "measured on", "command"], lines)


def measuring_commands(evidence: Evidence) -> str | None:
    """A list of the commands that measured the points."""
    commands = set()
    for row in evidence.floors.values():
        commands.update(row["measured by"])
    for model in evidence.models:
        for run in model.runs:
            commands.update(run["measured by"])
    return "".join(f"- `{command}`\n" for command in sorted(commands))
