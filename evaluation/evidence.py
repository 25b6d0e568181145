"""What was measured on trained runs, read from their summaries: models, points, seeds, and which belong together.

scripts/evidence.py writes the summaries, figures/evidence.py shows them.
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from config import ROLES, Config, UserError, load_config, to_dict
from config_keys import CONTROL_ROUTERS
from evaluation.comparison import METRIC_NAMES

Row = dict[str, Any]

# Columns in which all points must agree to be compared
SETTINGS = ("images", "steps", "seed", "features", "reference", "image_size", "bf16", "weights")
# Those of a floor
FLOOR_SETTINGS = ("images", "features", "reference")
# The Fréchet distance by the name that it has for the features
DISTANCES = ("fid", "frechet_distance")
# Beginnings of keys that models of one comparison may differ in
NAMES = ("model.name", "training.seed")
MULTI_BUDGET = ("training.multi_budget_",)
DOWNSAMPLE = ("training.downsample_factor",)
START = ("training.init_from", "model.upcycle.")
SCHEDULE = ("training.downsample_factor_start", "training.downsample_factor_warmup_steps")
# Keys that the name of a model leaves out: its seed, and what follows from its router
UNNAMED = ("training.seed", "training.ratio_loss_weight")
# Log lines over which a loss is averaged
SMOOTH = 3


class Number(NamedTuple):
    """Mean over seeds, and its standard deviation where there are several."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def text(self, style: str) -> str:
        """The number in a format such as ".1f" or ".1%"."""
        if len(self.values) == 1:
            return f"{self.mean:{style}}"
        return f"{self.mean:{style}} ± {self.std:{style}}"


class Point(NamedTuple):
    """A way to sample a model."""

    scale: float  # of guidance
    drop: float = 0.0  # share of the kept tokens
    lite: float | None = None  # share of those of the unconditional branch; None: no Lite-CFG


@dataclass(frozen=True, eq=False)
class Model:
    """Runs that differ in their seed only."""

    label: str
    runs: list[Row]

    @property
    def config(self) -> Row:
        return self.runs[0]["config"]

    @property
    def step(self) -> int:
        return self.runs[0]["step"]

    @property
    def is_static(self) -> bool:
        return self.config["model.patch_size"] is not None

    @property
    def has_learned_router(self) -> bool:
        return not self.is_static and self.config["model.router"] not in CONTROL_ROUTERS

    @property
    def prediction(self) -> str:
        """What the network predicts."""
        return self.config["diffusion.prediction"]

    @property
    def is_upcycled(self) -> bool:
        return self.config["training.init_from"]

    @property
    def has_many_budgets(self) -> bool:
        return self.config["training.multi_budget_training"]

    @property
    def timesteps(self) -> list[float]:
        """Timesteps, from 0 to 1, at which the routing was measured."""
        return [row["t"] for row in self.runs[0]["routing"]]

    def points(self) -> list[Point]:
        """Every point that a run has, Lite-CFG last, in order of the dropped share."""
        found = set()
        for run in self.runs:
            found |= {point_of(row) for row in run["rows"]}
        return sorted(found, key=lambda point: (point.scale, point.lite or 0, point.drop))

    def at(self, point: Point, column: str, also: Iterable[Point] = ()) -> Number | None:
        """A column at a point over all seeds, or those that have other points, too; None if no run has it."""
        values = []
        for run in self.runs:
            if not {point_of(row) for row in run["rows"]}.issuperset(also):
                continue
            for row in run["rows"]:
                if point_of(row) == point and column in row:
                    values.append(row[column])
        return Number(tuple(values)) if values else None

    def at_cost(self, scale: float, tflop: float, column: str) -> Number | None:
        """A column where the budgets of each seed cost this much; None if they all cost more, or all less."""
        values = []
        for run in self.runs:
            rows = [row for row in run["rows"] if row["cfg_scale"] == scale and row.get("lite_cfg") is None]
            found = interpolate([(row["tflop_per_image"], row[column]) for row in rows], tflop)
            if found is not None:
                values.append(found)
        return Number(tuple(values)) if values else None

    def relative(self, point: Point, base: Point, column: str) -> Number | None:
        """A column at a point relative to another one, of each seed that has both."""
        values = []
        for run in self.runs:
            found = {point_of(row): row[column] for row in run["rows"] if column in row}
            if point in found and base in found:
                values.append(found[point] / found[base])
        return Number(tuple(values)) if values else None

    def routing(self, name: str, low: float = 0.0, high: float = 1.0) -> Number | None:
        """Mean kept share of "object", "background" or "all" between two t of 0 to 1, over all seeds."""
        values = []
        for run in self.runs:
            shares = [row[name] for row in run["routing"] if low <= row["t"] <= high]
            if shares:
                values.append(statistics.fmean(shares))
        return Number(tuple(values)) if values else None

    def differs_in(self, other: "Model", allowed: Sequence[str]) -> bool:
        """Whether the models differ in a key that begins with none of `allowed`."""
        may_differ = (*NAMES, *allowed)
        for key in self.config.keys() | other.config.keys():
            if not key.startswith(may_differ) and self.config.get(key) != other.config.get(key):
                return True
        return False


def interpolate(marks: Sequence[tuple[float, float]], x: float) -> float | None:
    """The value between two marks (x, value); None beyond them."""
    ordered = sorted(marks)
    for (left, start), (right, end) in zip(ordered, ordered[1:]):
        if left <= x <= right and left < right:
            return start + (x - left) / (right - left) * (end - start)
    return None


def point_of(row: Row) -> Point:
    return Point(row["cfg_scale"], row["budget"], row.get("lite_cfg"))


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that was measured."""

    models: list[Model]
    floors: dict[str, Row]  # name -> row

    @property
    def scales(self) -> list[float]:
        found: set[float] = set()
        for model in self.models:
            found |= {point.scale for point in model.points()}
        return sorted(found)

    @property
    def distance(self) -> str:
        """The Fréchet distance that the points have."""
        row = self.models[0].runs[0]["rows"][0]
        return next(name for name in DISTANCES if name in row)

    @property
    def metrics(self) -> list[str]:
        return [self.distance, "kid"]

    @property
    def metric_names(self) -> list[str]:
        return [METRIC_NAMES[metric] for metric in self.metrics]

    def main_models(self) -> list[Model]:
        """All but upcycled models and those for one budget, which are compared with their own kind."""
        apart = [single for _, single, drop in self.budget_pairs() if drop]
        return [model for model in self.models if not (model.is_upcycled or model in apart)]

    def multi_budget_pairs(self) -> list[tuple[Model, Model]]:
        """(with multi-budget training, without): they differ in nothing else."""
        return self._many_and_one(MULTI_BUDGET)

    def budget_pairs(self) -> list[tuple[Model, Model, float]]:
        """(one model for many budgets, a model for one budget, the dropped share that makes their N equal).

        They differ in N and multi-budget training only. A model of the same N is for the budget at which the other
        drops nothing, and shown only beside models of another N.
        """
        found = []
        for one in self.models:
            of_one = [
                other for many, other in self._many_and_one((*MULTI_BUDGET, *DOWNSAMPLE)) if many is one
            ]
            pairs = [(one, other, dropped_share(one, other)) for other in of_one]
            # A model that keeps more has no budget of the other beside it
            pairs = [pair for pair in pairs if pair[2] >= 0]
            if any(drop for _, _, drop in pairs):
                found += sorted(pairs, key=lambda pair: pair[2])
        return found

    def upcycled_pairs(self) -> list[tuple[Model, Model]]:
        """(upcycled, from scratch): they differ in nothing else, steps and the schedule of N aside."""
        scratch = [model for model in self.models if not model.is_upcycled and not model.is_static]
        pairs = []
        for model in self.models:
            if model.is_upcycled:
                pairs += [
                    (model, other) for other in scratch if not model.differs_in(other, (*START, *SCHEDULE))
                ]
        return pairs

    def _many_and_one(self, allowed: Sequence[str]) -> list[tuple[Model, Model]]:
        """(with multi-budget training, without) of equal steps, which differ in no key but the allowed ones."""
        pairs = []
        for one in self.models:
            for other in self.models:
                is_pair = one.has_many_budgets and not other.has_many_budgets and one.step == other.step
                if is_pair and not one.differs_in(other, allowed):
                    pairs.append((one, other))
        return pairs


def dropped_share(one: Model, other: Model) -> float:
    """The share that one model has to drop to keep as much as the other, by their N."""
    factor = one.config["training.downsample_factor"] / other.config["training.downsample_factor"]
    return round(1 - factor, 3)


def read(folder: Path) -> Evidence:
    """Every summary below a folder. Raises UserError if there is none, or if two cannot be compared."""
    runs = []
    floors = {}
    settings: dict[str, Any] = {}
    for path in sorted(folder.rglob("summary.json")):
        summary = read_summary(path)
        if "floor" in summary:
            check_settings(path, summary, FLOOR_SETTINGS, settings)
            floors[summary["floor"]] = {**summary["rows"][0], "measured by": summary["measured by"]}
            continue
        for row in summary["rows"]:
            # Summaries without the column are taken to be of the EMA
            row.setdefault("weights", "ema")
            # Only times of points that took turns can be compared
            if row.get("point") not in summary.get("times", {}):
                row.pop("ms_per_image", None)
        check_settings(path, summary, SETTINGS, settings)
        # A key that is newer than the summary had no other value than its default
        summary["config"] = {**shaping_keys(load_config()), **summary["config"]}
        summary["path"] = path
        runs.append(summary)
    if not runs:
        raise UserError(f"'{folder}': has no summary.json of a run; make one with scripts.evidence")
    return Evidence(group_by_model(runs), floors)


def check_settings(path: Path, summary: Row, names: Sequence[str], settings: Row) -> None:
    """Raise a UserError unless all rows have the settings of those before, which the first one fills in."""
    for row in summary["rows"]:
        for name in names:
            if row.get(name) != settings.setdefault(name, row.get(name)):
                problem = f"has {name} {row.get(name)}, and others {settings[name]}"
                raise UserError(f"'{path}': {problem}; measure it again, or keep it in another folder")


def read_summary(path: Path) -> Row:
    """A summary.json of scripts.evidence; UserError if it is none."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(summary["measured by"], str):
            # Of an older version, which kept the last command only
            summary["measured by"] = [summary["measured by"]]
        if "floor" in summary or {"run", "config", "rows"} <= summary.keys():
            return summary
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        pass
    raise UserError(f"'{path}': is no summary of scripts.evidence; remove it, or name another folder")


def shaping_keys(config: Config) -> dict[str, Any]:
    """The keys that shape a model, as `section.key`; whether it starts from another one, and not from which."""
    keys = {}
    for key, role in ROLES.items():
        if role != "free":
            keys[key] = value_of(config, key)
    return {**keys, "training.init_from": config.training.init_from is not None}


def value_of(config: Config, key: str) -> Any:
    """Value of `section.key` as plain data."""
    value: Any = to_dict(config)
    for name in key.split("."):
        value = value[name]
    return value


def group_by_model(runs: list[Row]) -> list[Model]:
    """The runs without regard to their seed. Models of one name get what they differ in added to it."""
    groups: dict[str, list[Row]] = {}
    for run in runs:
        shape = {key: value for key, value in run["config"].items() if key != "training.seed"}
        groups.setdefault(json.dumps([shape, run["step"]], sort_keys=True), []).append(run)
    by_name: dict[str, list[list[Row]]] = {}
    for group in groups.values():
        check_seeds(group)
        by_name.setdefault(group[0]["model"], []).append(group)
    models = []
    for name, same in by_name.items():
        for group in same:
            models.append(Model(name + differences(group[0], [other[0] for other in same]), group))
    models.sort(key=lambda model: (model.is_static, model.label))
    return models


def check_seeds(runs: list[Row]) -> None:
    """Raise a UserError unless runs of one model differ in their seed, and are sampled alike."""
    first = runs[0]["rows"][0]["sampler"]
    paths: dict[int, Path] = {}
    for run in runs:
        path = run["path"]
        other = paths.setdefault(run["seed"], path)
        if other != path:
            raise UserError(f"'{path}': is of the same model and seed as '{other}'; remove one of them")
        for row in run["rows"]:
            if row["sampler"] != first:
                problem = f"has samples by {row['sampler']}, and others of the same model by {first}"
                raise UserError(f"'{path}': {problem}; measure it again, or keep it in another folder")


def differences(run: Row, others: list[Row]) -> str:
    """`, key value` for each key in which runs of one name differ."""
    parts = []
    for key, value in run["config"].items():
        if key not in UNNAMED and any(other["config"].get(key) != value for other in others):
            parts.append(f", {key.rpartition('.')[2]} {value}")
    if any(other["step"] != run["step"] for other in others):
        parts.append(f", {run['step']:,} steps")
    return "".join(parts)


def losses(model: Model) -> dict[int, float]:
    """Diffusion loss by step: the mean over seeds of a running mean over log lines."""
    curves = []
    for run in model.runs:
        steps = [int(step) for step, _ in run["loss"]]
        values = [loss for _, loss in run["loss"]]
        curve = {}
        for last in range(SMOOTH - 1, len(steps)):
            curve[steps[last]] = statistics.fmean(values[last - SMOOTH + 1 : last + 1])
        curves.append(curve)
    common = [step for step in curves[0] if all(step in curve for curve in curves)]
    return {step: statistics.fmean(curve[step] for curve in curves) for step in common}
