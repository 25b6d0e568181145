"""Where a run starts: which checkpoint it resumes from, and in what it may differ from that checkpoint.

A resumed run may differ from its checkpoint in the free keys of config_keys.py only (`role_of`), and it needs the
same features. Everything else starts a new run from a checkpoint, with `training.resume_from_ckpt`.
"""

from pathlib import Path
from typing import NamedTuple

from config import (
    Config,
    UserError,
    config_from_dict,
    differences,
    is_read,
    load_config,
    role_of,
    to_dict,
    validate_processes,
)
from data.features import Features
from training.schedules import total_steps
from weights import upcycle
from weights.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    network_shapes,
    non_finite_tensor,
    shape_difference,
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
        UserError: the folder was started with another configuration or other features, none of its
            checkpoints can be used, or the checkpoint leaves no step to train.
    """
    last_step = total_steps(config, len(store))
    # Resume from the folder. A run that is finished may be started again, and does nothing
    if folder is not None:
        check_same_run(config, folder)
        start = resume_from_folder(config, folder)
        if start.state is not None:
            check_same_features(config, folder, start.state, store)
            if start.state["step"] > last_step:
                raise UserError(
                    f"--output '{folder}' has a checkpoint of step {start.state['step']}, but the run ends "
                    f"at step {last_step}; {raise_length(config, start.state['step'])}"
                )
            return start

    # Start a new run
    path = config.training.resume_from_ckpt
    if path:
        state = load_fitting_checkpoint(config, path, "training.resume_from_ckpt")
        if state["step"] >= last_step:
            raise UserError(
                f"training.resume_from_ckpt: '{path}' is of step {state['step']}, but the run ends at step "
                f"{last_step}; {raise_length(config, state['step'])}, or start at step 0 from its weights "
                "with training.init_from"
            )
        # The log of the new run begins with its own first step
        state["averages"] = {}
        state["skipped"] = {"total": 0, "in_a_row": 0}
        return Start(state, {}, [])
    if config.training.init_from:
        state, origins = upcycle.initial_state(config)
        check_finite(state, f"training.init_from '{config.training.init_from}'")
        return Start(state, origins, [])
    return Start(None, {}, [])


def starting_files(folder: Path | None) -> list[Path]:
    """The files in a run's folder that `find_start` chooses from."""
    if folder is None:
        return []
    return [*folder.glob("config.yaml"), *list_checkpoints(folder / "checkpoints")]


def raise_length(config: Config, step: int) -> str:
    """The remedy for a run that ends at or before this step."""
    if config.training.max_steps is None:
        return f"raise training.epochs ({config.training.epochs}), or set training.max_steps above {step}"
    return f"set training.max_steps above {step}"


# --------------------------------------------------------------------------------------- the run's own folder


def check_processes(config: Config, folder: Path | None, processes: int) -> None:
    """Raise a UserError if the batch sizes do not fit this number of processes.

    A run that has checkpoints must keep its batch sizes, so its remedies are fewer processes or a new folder.
    """
    try:
        validate_processes(config, processes)
    except UserError as error:
        if folder is None or not list_checkpoints(folder / "checkpoints"):
            raise
        most = most_processes(config, processes)
        noun = "process" if most == 1 else "processes"
        raise UserError(
            f"{error} in a new run; a resumed run keeps its batch sizes, so resume '{folder}' on {most} {noun}, "
            f"or {new_run_from(config, folder, [])}"
        ) from None


def most_processes(config: Config, limit: int) -> int:
    """The largest number of processes, at most `limit`, that the batch sizes fit."""
    for processes in range(limit, 1, -1):
        try:
            validate_processes(config, processes)
        except UserError:
            continue
        return processes
    return 1


def new_run_from(config: Config, folder: Path, changed: list[str]) -> str:
    """The remedy for keys that a run must not change: a new folder, from the newest checkpoint if it fits.

    Args:
        folder: of the run.
        changed: the keys.
    """
    checkpoints = list_checkpoints(folder / "checkpoints")
    if not checkpoints:
        return "choose another folder"
    # Another network cannot take the weights
    if any(role_of(key) == "network" for key in changed):
        saved = load_config(folder / "config.yaml")
        if network_shapes(config) != network_shapes(saved):
            return "choose another folder"
    # Other groups of parameters do not fit the optimizer of the checkpoint
    is_regrouped = any(key.startswith("training.lr_scales") for key in changed)
    key = "training.init_from" if is_regrouped else "training.resume_from_ckpt"
    return f"start a new run from it with --config CONFIG --output NEW --set {key}={checkpoints[-1]}"


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
        raise UserError(
            f"--output '{folder}' was started with a different {', '.join(changed)}; "
            f"{new_run_from(config, folder, changed)}"
        )


def check_same_features(config: Config, folder: Path, state: Checkpoint, store: Features) -> None:
    if state["features"] != store.fingerprint():
        raise UserError(
            f"data.feature_path: '{config.data.feature_path}' holds other features than '{folder}' was "
            f"trained on; give those, or {new_run_from(config, folder, [])}"
        )


def changed_keys(config: Config, saved: dict) -> list[str]:
    """Keys that differ from a saved configuration and must not change on resume."""
    saved_config = config_from_dict(saved)
    keys = [key for key in differences(to_dict(config), saved) if role_of(key) != "free"]
    # A key that has no effect in either makes no difference
    return [key for key in keys if is_read(config, key) or is_read(saved_config, key)]


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
            f"training.lr_scales: {config.training.lr_scales} differs from the {scales} of {option} '{path}'; "
            "start at step 0 from its weights with training.init_from"
        )
    # The network must have the same tensors
    difference = shape_difference(network_shapes(config), tensor_shapes(state["model"]))
    if difference:
        changed = differences(to_dict(config), state["config"])
        keys = [key for key in changed if role_of(key) == "network"]
        raise UserError(
            f"{option} '{path}' holds another network than the configuration describes: {difference}; "
            f"see {', '.join(keys)}"
        )
    check_finite(state, f"{option} '{path}'")
    return state


def check_finite(state: Checkpoint, name: str) -> None:
    """Raise a UserError if weights, EMA or moments of the optimizer hold a number that is not finite.

    Training from them would skip every step and blame the images.
    """
    tensors = {**state["model"]}
    for key, tensor in state["ema"].items():
        tensors[f"ema.{key}"] = tensor
    for number, entry in state.get("optimizer", {}).get("state", {}).items():
        for key, tensor in entry.items():
            tensors[f"optimizer.{number}.{key}"] = tensor
    bad = non_finite_tensor(tensors)
    if bad:
        raise UserError(f"{name} has non-finite values in {bad}; give an earlier checkpoint")
