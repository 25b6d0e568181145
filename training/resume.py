"""Where a run starts: which checkpoint it resumes from, and in what it may differ from that checkpoint.

A resumed run may differ from its checkpoint in the free keys of config.py only (`role_of`), and it needs the
same features.
"""

from pathlib import Path
from typing import NamedTuple

from config import Config, UserError, config_from_dict, differences, load_config, role_of, to_dict
from data.features import Features
from weights import upcycle
from weights.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    network_shapes,
    tensor_shapes,
)
from weights.upcycle import Origins


class Start(NamedTuple):
    """What a run starts from."""

    state: Checkpoint | None  # without "optimizer" it is only the first weights; None: fresh from the seed
    origins: Origins  # where the first weights come from, for `training.init_from`
    warnings: list[str]  # one for each newer checkpoint that cannot be used


def find_start(config: Config, folder: Path | None, store: Features) -> Start:
    """Choose what the run starts from.

    This is the newest checkpoint in its folder that can be read and belongs to the run, otherwise
    `training.resume_from_ckpt`, otherwise the weights of `training.init_from`, otherwise fresh weights.

    Raises:
        UserError: the folder was started with another configuration or other features, or none of its
            checkpoints can be used.
    """
    # Resume from the folder
    if folder is not None:
        check_same_run(config, folder)
        start = resume_from_folder(config, folder)
        if start.state is not None:
            check_same_features(config, folder, start.state, store)
            return start

    # Start a new run
    path = config.training.resume_from_ckpt
    if path:
        state = load_fitting_checkpoint(config, path, "training.resume_from_ckpt")
        # The log of the new run begins with its own first step
        state["averages"] = {}
        state["skipped"] = {"total": 0, "in_a_row": 0}
        return Start(state, {}, [])
    if config.training.init_from:
        state, origins = upcycle.initial_state(config)
        return Start(state, origins, [])
    return Start(None, {}, [])


def starting_files(folder: Path | None) -> list[Path]:
    """The files in a run's folder that `find_start` chooses from."""
    if folder is None:
        return []
    return [*folder.glob("config.yaml"), *list_checkpoints(folder / "checkpoints")]


# --------------------------------------------------------------------------------------- the run's own folder


def resume_from_folder(config: Config, folder: Path) -> Start:
    """Load the newest checkpoint that can be used. UserError if there are some, but none can be used."""
    warnings: list[str] = []
    for path in reversed(list_checkpoints(folder / "checkpoints")):
        try:
            state = load_own_checkpoint(config, path)
        except UserError as error:
            warnings.append(str(error))
            continue
        return Start(state, {}, warnings)
    if warnings:
        raise UserError(f"{warnings[0]}; '{folder}' has no other checkpoint to resume from")
    return Start(None, {}, [])


def load_own_checkpoint(config: Config, path: Path) -> Checkpoint:
    """Load a checkpoint that this run has written. UserError if it is another file."""
    state = load_fitting_checkpoint(config, path, "--output")
    # A run's checkpoint has these entries; a converted one lacks them
    entries = {key: state.get(key) for key in ("features", "averages", "skipped")}
    missing = [key for key, value in entries.items() if value is None]
    if missing:
        raise UserError(f"--output '{path}' is not a checkpoint of a run (it lacks {', '.join(missing)})")
    # A checkpoint of another run may have been copied here
    changed = changed_keys(config, state["config"])
    if changed:
        raise UserError(f"--output '{path}' comes from a run with a different {', '.join(changed)}")
    return state


def check_same_run(config: Config, folder: Path) -> None:
    """Raise a UserError if the folder was started with a configuration that a resumed run must not change."""
    file = folder / "config.yaml"
    if not file.is_file():
        return
    changed = changed_keys(config, to_dict(load_config(file)))
    if changed:
        remedy = way_to_change(changed, folder)
        raise UserError(f"--output '{folder}' was started with a different {', '.join(changed)}; {remedy}")


def way_to_change(keys: list[str], folder: Path) -> str:
    """How to train on with other values of some keys, as the end of an error line."""
    checkpoints = list_checkpoints(folder / "checkpoints")
    # Another network, another process or other parameter groups do not fit the checkpoint
    fits = all(role_of(key) == "training" and not key.startswith("training.lr_scales") for key in keys)
    if not fits or not checkpoints:
        return "choose another folder"
    return (
        "to train on with the new values, start another --output from its newest checkpoint: add "
        f"--set training.resume_from_ckpt={checkpoints[-1]}"
    )


def check_same_features(config: Config, folder: Path, state: Checkpoint, store: Features) -> None:
    if state["features"] != store.fingerprint():
        raise UserError(
            f"data.feature_path: '{config.data.feature_path}' holds other features than '{folder}' was "
            "trained on; give those, or choose another --output"
        )


def changed_keys(config: Config, saved: dict) -> list[str]:
    """Keys that differ from a saved configuration and must not change on resume."""
    return [key for key in differences(to_dict(config), saved) if role_of(key) != "free"]


# --------------------------------------------------------------------------------------------- any checkpoint


def load_fitting_checkpoint(config: Config, path: Path | str, option: str) -> Checkpoint:
    """Load a checkpoint that has an optimizer and fits the configured network. UserError for any other."""
    state = load_checkpoint(path, option)
    if "optimizer" not in state:
        raise UserError(
            f"{option} '{path}' holds weights only, which are not enough to resume; "
            "give it as training.init_from"
        )
    # Give keys that are newer than the checkpoint their defaults
    saved = config_from_dict(state["config"])
    state["config"] = to_dict(saved)

    # The optimizer numbers parameters by group, so the groups must be the same
    scales = saved.training.lr_scales
    if scales != config.training.lr_scales:
        raise UserError(
            f"training.lr_scales: {config.training.lr_scales} differs from the {scales} of {option} '{path}'"
        )
    # The network must have the same tensors
    if tensor_shapes(state["model"]) != network_shapes(config):
        changed = differences(to_dict(config), state["config"])
        keys = [key for key in changed if role_of(key) == "network"]
        raise UserError(
            f"{option} '{path}' holds another network than the configuration describes; see {', '.join(keys)}"
        )
    return state
