"""Averages of the weights that training tracks beside the EMA. `AVERAGES` names the kinds.

An average follows the network's parameters after every step and is saved in checkpoints. `--weights NAME` takes it
from there in place of the EMA.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from config import Config, UserError
from config_keys import EmaStd
from data.files import write_file
from schema import build_complete, require
from weights.checkpoint import exit_unwritten
from weights.posthoc import FOLDER, exponent


@dataclass(kw_only=True)
class AverageSettings:
    """What `training.averages` says of an average. Types and ranges are checked as those of configuration keys."""


class Average:
    """An average of the parameters of a network in training.

    Args:
        settings: those of the average.
        parameters: of the network by name, with their first values.

    Attributes:
        weights: the average, by name of the parameter.
        first_step: optimizer steps before it begins. Until then it is not updated, and checkpoints do not have it.
    """

    # A dataclass, whose fields are the settings
    settings_type: ClassVar[type[AverageSettings]] = AverageSettings
    first_step: int = 0

    def __init__(self, settings: Any, parameters: Mapping[str, Tensor]):
        self.weights = {name: value.detach().clone() for name, value in parameters.items()}

    def update(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """Follow the parameters after optimizer step number `step`, counted from 1. No gradient is recorded."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data to resume from; "weights" is what `--weights` takes."""
        return {"weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        for name, value in state["weights"].items():
            self.weights[name].copy_(value)

    def save_snapshot(self, run: Path, step: int) -> None:
        """Write files of its own into the run's folder, before each checkpoint. Most averages need none."""


# ------------------------------------------------------------------------------------------- post-hoc EMA


@dataclass(kw_only=True)
class PowerSettings(AverageSettings):
    """Settings of `PowerAverages`."""

    stds: list[EmaStd]  # relative standard deviation of each


class PowerAverages(Average):
    """Power-function averages of several lengths, which are set by a key of their own: `training.posthoc_ema_stds`.

    Attributes:
        tracked: the weights of each relative standard deviation.
    """

    settings_type = PowerSettings

    def __init__(self, settings: PowerSettings, parameters: Mapping[str, Tensor]):
        self.exponents = {std: exponent(std) for std in settings.stds}
        self.tracked: dict[float, dict[str, Tensor]] = {}
        for std in settings.stds:
            self.tracked[std] = {name: value.detach().clone() for name, value in parameters.items()}

    def update(self, parameters: Mapping[str, Tensor], step: int) -> None:
        current = list(parameters.values())
        for std, weights in self.tracked.items():
            kept = (1 - 1 / step) ** (self.exponents[std] + 1)
            torch._foreach_lerp_(list(weights.values()), current, 1 - kept)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Standard deviation as text -> the weights."""
        return {str(std): weights for std, weights in self.tracked.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`. Raises UserError for a length that the checkpoint does not have."""
        for std, weights in self.tracked.items():
            if str(std) not in state:
                raise UserError(
                    f"training.posthoc_ema_stds: {std} is not tracked in the checkpoint, and an average cannot "
                    f"start in the middle; it has {[float(known) for known in state]}"
                )
            for name, value in state[str(std)].items():
                weights[name].copy_(value)

    def save_snapshot(self, run: Path, step: int) -> None:
        """Write all averages in half precision; reconstruction needs many of them, and they are never removed."""
        folder = run / FOLDER
        folder.mkdir(exist_ok=True)
        for std, weights in self.tracked.items():
            halves = {name: value.half() for name, value in weights.items()}
            path = folder / f"{step:07d}-{std}.pt"
            try:
                write_file(path, functools.partial(torch.save, halves))
            except (OSError, RuntimeError) as error:
                exit_unwritten(path, error)


# ------------------------------------------------------------------------------------------- all averages

POSTHOC = "posthoc"
# The kinds of averages. "posthoc" has a key of its own; the others are the names of `training.averages`
AVERAGES: dict[str, type[Average]] = {POSTHOC: PowerAverages}


def read_settings(config: Config) -> dict[str, AverageSettings]:
    """The checked settings of a run's averages, by name.

    Raises:
        UserError: an average that is not known, or a setting that is missing, unknown or of another type.
    """
    found: dict[str, AverageSettings] = {}
    stds = config.training.posthoc_ema_stds
    if stds:
        found[POSTHOC] = PowerSettings(stds=stds)
    for name, raw in config.training.averages.items():
        key = f"training.averages.{name}"
        require(name != POSTHOC, f"{key}: its lengths are training.posthoc_ema_stds, e.g. [0.05, 0.1]")
        require(name in AVERAGES, f"{key}: is no known average; name the module that adds it with --import")
        found[name] = build_complete(AVERAGES[name].settings_type, raw, f"{key}.")
    return found


class WeightAverages:
    """The averages of a run, by name. Raises UserError as `read_settings`."""

    def __init__(self, config: Config, model: nn.Module):
        parameters = dict(model.named_parameters())
        self.averages: dict[str, Average] = {}
        for name, settings in read_settings(config).items():
            self.averages[name] = AVERAGES[name](settings, parameters)

    def begun(self, step: int) -> dict[str, Average]:
        """The averages that have begun by this step, by name."""
        return {name: average for name, average in self.averages.items() if step > average.first_step}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Follow the weights after optimizer step number `step`, counted from 1."""
        parameters = {name: value.detach() for name, value in model.named_parameters()}
        for average in self.begun(step).values():
            average.update(parameters, step)

    def state_dict(self, step: int) -> dict[str, dict[str, Any]]:
        """The states of those that have begun by this step, by name."""
        return {name: average.state_dict() for name, average in self.begun(step).items()}

    def load_state_dict(self, states: Mapping[str, Any], step: int) -> None:
        """Continue from `state_dict` of this step. Raises UserError for an average that is missing there."""
        for name, average in self.averages.items():
            if name in states:
                average.load_state_dict(states[name])
                continue
            require(
                step <= average.first_step,
                f"training.averages.{name}: is not in the checkpoint with these settings, and an average cannot "
                f"start in the middle; leave it out, or start at step 0 with training.init_from",
            )

    def save_snapshots(self, run: Path, step: int) -> None:
        """Write what averages that have begun keep beside the checkpoint of this step."""
        for average in self.begun(step).values():
            average.save_snapshot(run, step)
