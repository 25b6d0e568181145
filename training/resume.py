"""Where a run starts: which checkpoint it resumes from, and in what it may differ from that checkpoint.

A resumed run may differ from its checkpoint in the free keys of config_keys.py only (`role_of`), and it needs the
same features. Everything else starts a new run from a checkpoint, with `training.resume_from_ckpt`.
"""

import shlex
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

from config import (
    Config,
    UserError,
    config_from_dict,
    differences,
    is_read,
    largest_divisor,
    role_of,
    to_dict,
    validate_processes,
)
from data.features import Features
from data.names import renamed_label, short_name
from plain_data import read_yaml
from schema import require, shown
from training.schedules import total_steps
from weights import upcycle
from weights.checkpoint import (
    Checkpoint,
    find_damage,
    list_checkpoints,
    load_checkpoint,
    network_shapes,
    non_finite_tensor,
    remove_old,
    shape_difference,
    tensor_shapes,
)
from weights.upcycle import LABEL_KEYS, Origins, check_same_meaning, process_changes

LAST_KEY = "ckpt"  # in the order of `Config`, in which config.yaml is written
DOCUMENT_END = "...\n"  # what PyYAML writes after a single value


class CommandLine(NamedTuple):
    """What a user has typed to start or resume a run."""

    option: str  # "--output" or "--resume", which names the run's folder
    folder: Path | None
    config_file: Path
    overrides: list[str]
    processes: int  # that the launcher starts

    def in_new_folder(self, overrides: list[str]) -> str:
        """The command again with further overrides and a new folder beside the present one, for a shell."""
        launcher = ["python"] if self.processes == 1 else ["torchrun", f"--nproc_per_node={self.processes}"]
        words = [*launcher, "train.py", "--config", str(self.config_file)]
        words += ["--output", str(free_folder(Path(self.folder or "run")))]
        for change in [*self.overrides, *overrides]:
            words += ["--set", change]
        return shlex.join(words)


def free_folder(folder: Path) -> Path:
    """A folder beside this one that does not exist yet: results/run-2."""
    number = 2
    while (candidate := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return candidate


class Start(NamedTuple):
    """What a run starts from."""

    state: Checkpoint | None  # without "optimizer" it is only the first weights; None: fresh from the seed
    origins: Origins  # where the first weights come from, for `training.init_from`
    warnings: list[str]  # one for each newer checkpoint that cannot be used


def finish_interrupted_save(config: Config, state: Checkpoint | None, folder: Path) -> None:
    """Remove the old checkpoints of a run that was killed between a save and their removal.

    A finished run saves no more. With another `logging.ckpt_keep`, or if a newer checkpoint cannot be used, they
    stay until a new checkpoint replaces them.
    """
    newest = list_checkpoints(folder / "checkpoints")[-1:]
    if state is None or [int(path.stem) for path in newest] != [state["step"]]:
        return
    keep = config.logging.ckpt_keep
    if keep and state["config"]["logging"].get("ckpt_keep") == keep:
        remove_old(folder / "checkpoints", keep)


def find_start(config: Config, command: CommandLine, store: Features) -> Start:
    """Choose what the run starts from.

    This is the newest checkpoint in its folder that can be read and belongs to the run, otherwise
    `training.resume_from_ckpt`, otherwise the weights of `training.init_from`, otherwise fresh weights.

    Raises:
        UserError: the folder was started with another configuration or other features, none of its
            checkpoints can be used, the batch sizes do not fit the processes, or the checkpoint leaves no step
            to train.
    """
    last_step = total_steps(config, len(store))
    check_same_run(config, command, store)
    check_processes(config, command, store)
    # Resume from the folder. A run that is finished may be started again, and does nothing
    start = resume_from_folder(config, command)
    if start.state is not None:
        check_same_features(config, command, start.state, store)
        if start.state["step"] > last_step:
            raise UserError(
                f"{command.option} '{command.folder}' has a checkpoint of step {start.state['step']}, but the "
                f"run ends at step {last_step}; {raise_length(config, start.state['step'])}"
            )
        return start

    # Start a new run
    path = config.training.resume_from_ckpt
    if path:
        state = load_fitting_checkpoint(config, path, "training.resume_from_ckpt")
        check_same_labels(state, path, store)
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
        state, origins = upcycle.initial_state(config, store.class_names)
        check_finite(state, f"training.init_from '{config.training.init_from}'")
        return Start(state, origins, [])
    return Start(None, {}, [])


def check_same_labels(state: Checkpoint, path: str, store: Features) -> None:
    """Raise a UserError if a label stands for another class in the features than in a checkpoint."""
    label = renamed_label(store.class_names, state["class_names"])
    if label is not None:
        raise UserError(
            f"training.resume_from_ckpt: {describe_label(label, store, state)} in '{path}'; start at step 0 from "
            "its weights with training.init_from, which matches classes by name"
        )


def describe_label(label: int, store: Features, state: Checkpoint) -> str:
    """The name of a label in the features and in a checkpoint, for messages."""
    names = state["class_names"] or []
    own = short_name(store.class_names[label])
    return f"label {label} is '{own}' in the features and '{short_name(names[label])}'"


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


def read_run_config(folder: Path, option: str) -> Config:
    """The configuration of the run in a folder: from config.yaml, or from a checkpoint if there is no such file.

    Raises:
        UserError: config.yaml is damaged, for example empty or cut off, or the folder is not that of a run.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        return config_from_dict(load_newest(folder, option)["config"])
    try:
        raw = read_yaml(file)
        # The file holds all keys, so one that is cut off between two lines lacks the last
        require(LAST_KEY in raw, "it is incomplete")
        return config_from_dict(raw)
    except UserError as error:
        reason = str(error).removeprefix(f"--config '{file.resolve()}'").lstrip(": ")
    remedy = "choose another folder, or remove the file if nothing needs it"
    if list_checkpoints(folder / "checkpoints"):
        remedy = "remove it and run the same command again: checkpoints hold the configuration, too"
    raise UserError(f"{option} '{folder}': '{file}' cannot be used ({reason}); {remedy}")


def load_newest(folder: Path, option: str) -> Checkpoint:
    """The newest checkpoint of a run that can be read."""
    problem = f"{option} '{folder}' has no checkpoint; start a run with --config"
    for path in reversed(list_checkpoints(folder / "checkpoints")):
        try:
            return load_checkpoint(path, option)
        except UserError as error:
            problem = str(error)
    raise UserError(problem)


def check_same_run(config: Config, command: CommandLine, store: Features) -> None:
    """Raise a UserError if the folder was started with a configuration that a resumed run must not change."""
    folder = command.folder
    if folder is None or not (folder / "config.yaml").is_file():
        return
    saved = read_run_config(folder, command.option)
    changed = changed_keys(config, to_dict(saved))
    if changed:
        raise UserError(
            f"{command.option} '{folder}' was started with a different {', '.join(changed)}; "
            f"{new_run_from(config, command, store, changed)}"
        )


def check_processes(config: Config, command: CommandLine, store: Features) -> None:
    """Raise a UserError if the batch sizes do not fit the number of processes.

    A run that has checkpoints must keep its batch sizes, so its remedies are fewer processes or a new folder.
    """
    try:
        validate_processes(config, command.processes)
    except UserError as error:
        folder = command.folder
        most = most_processes(config, command.processes)
        if folder is None or most == command.processes or not list_checkpoints(folder / "checkpoints"):
            raise
        noun = "process" if most == 1 else "processes"
        raise UserError(
            f"{error} in a new run; a resumed run keeps its batch sizes, so resume '{folder}' on {most} {noun}, "
            f"or {new_run_from(config, command, store, [])}"
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


def new_run_from(
    config: Config, command: CommandLine, store: Features, changed: list[str], same_labels: bool = True
) -> str:
    """The remedy for what a run must not change: a new folder, from the newest checkpoint if it fits.

    Args:
        config: the one that is wanted.
        changed: keys that differ from those of the run.
        same_labels: whether labels stand for the same classes as in the run.
    """
    refusal = "choose another folder"
    folder = command.folder
    newest = None if folder is None else newest_readable(folder / "checkpoints")
    if folder is None or newest is None:
        return refusal
    overrides = fitting_batches(config, command.processes)
    fitted = config_from_dict(to_dict(config), overrides)
    step = int(newest.stem)
    is_late = step >= total_steps(fitted, len(store))
    use = use_of_checkpoint(config, read_run_config(folder, command.option), changed, same_labels, is_late)
    if use is None:
        return refusal

    # A run has one source
    used, unused = "training.resume_from_ckpt", "training.init_from"
    if use != "training":
        used, unused = unused, used
    overrides.append(override(used, str(newest)))
    if getattr(config.training, unused.removeprefix("training.")):
        overrides.append(override(unused, None))
    try:
        config_from_dict(to_dict(config), overrides)
    except UserError:
        return refusal

    new_command = command.in_new_folder(overrides)
    if use == "training":
        return f"start a new run from it with `{new_command}`"
    remedy = f"start at step 0 from its weights with `{new_command}`"
    if use == "weights":
        return remedy
    longer = raise_length(fitted, step)
    return f"{remedy}, or {longer} and give training.resume_from_ckpt in place of training.init_from"


# What a new run can take from a checkpoint: also its step and optimizer, its weights alone, or its weights
# unless the run becomes longer
Use = Literal["training", "weights", "weights unless longer"]


def use_of_checkpoint(
    config: Config, saved: Config, changed: list[str], same_labels: bool, is_late: bool
) -> Use | None:
    """What a new run can take from a checkpoint of a run; None if it can take nothing.

    Args:
        config: of the new run.
        saved: of the run.
        changed: keys in which they differ.
        same_labels: whether labels stand for the same classes in both.
        is_late: whether the new run ends at or before the step of the checkpoint.
    """
    # Another network cannot take the weights, unless only the table of labels differs
    shaping = {key for key in changed if role_of(key) == "network"}
    is_reshaped = bool(shaping) and network_shapes(config) != network_shapes(saved)
    if is_reshaped and not shaping <= set(LABEL_KEYS):
        return None
    # Other groups of parameters do not fit the optimizer
    is_regrouped = any(key.startswith("training.lr_scales") for key in changed)
    is_regrouped = is_regrouped or settings_of_terms(config) != settings_of_terms(saved)
    # An average that the run does not track cannot start in the middle
    new_averages = config.training.averages.keys() - same_averages(config, saved)
    new_stds = set(config.training.posthoc_ema_stds) - set(saved.training.posthoc_ema_stds)
    is_new_average = bool(new_averages or new_stds)
    weights_only = is_reshaped or is_regrouped or is_new_average or not same_labels
    # No weights start a network that computes something else
    if any(key.startswith("model.") for key in process_changes(config, saved)):
        return None
    if not weights_only and not is_late:
        return "training"
    return "weights" if weights_only else "weights unless longer"


def newest_readable(folder: Path) -> Path | None:
    """The newest checkpoint in a folder that is not damaged."""
    for path in reversed(list_checkpoints(folder)):
        if find_damage(path) is None:
            return path
    return None


def fitting_batches(config: Config, processes: int) -> list[str]:
    """Overrides that make the batch sizes fit the number of processes; none if they do."""
    training = config.training
    local = -(-training.global_batch_size // processes)
    overrides = []
    if local * processes != training.global_batch_size:
        overrides.append(override("training.global_batch_size", local * processes))
    if training.ratio_loss_weight and training.ratio_batch_size:
        group = largest_divisor(local, training.ratio_batch_size)
        if group != training.ratio_batch_size:
            overrides.append(override("training.ratio_batch_size", group))
    return overrides


def override(key: str, value: object) -> str:
    """The value of a --set option."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return f"{key}={text.removesuffix(DOCUMENT_END).strip()}"


def resume_from_folder(config: Config, command: CommandLine) -> Start:
    """Load the newest checkpoint that can be used. UserError if there are some, but none can be used."""
    folder = command.folder
    if folder is None:
        return Start(None, {}, [])
    warnings: list[str] = []
    for path in reversed(list_checkpoints(folder / "checkpoints")):
        try:
            state = load_own_checkpoint(config, path, command.option)
        except UserError as error:
            warnings.append(str(error))
            continue
        return Start(state, {}, warnings)
    if warnings:
        raise UserError(f"{warnings[0]}; '{folder}' has no other checkpoint to resume from")
    return Start(None, {}, [])


def load_own_checkpoint(config: Config, path: Path, option: str) -> Checkpoint:
    """Load a checkpoint that this run has written. UserError if it is another file."""
    state = load_fitting_checkpoint(config, path, option)
    # A run's checkpoint has these entries; a converted one lacks them
    entries = {key: state.get(key) for key in ("features", "averages", "skipped")}
    missing = [key for key, value in entries.items() if value is None]
    if missing:
        raise UserError(f"{option} '{path}' is not a checkpoint of a run (it lacks {', '.join(missing)})")
    # A checkpoint of another run may have been copied here
    changed = changed_keys(config, state["config"])
    if changed:
        raise UserError(f"{option} '{path}' comes from a run with a different {', '.join(changed)}")
    return state


def check_same_features(config: Config, command: CommandLine, state: Checkpoint, store: Features) -> None:
    """Raise a UserError if the features differ from those of the run, or their classes have other labels."""
    label = renamed_label(store.class_names, state["class_names"])
    is_renamed = label is not None
    if state["features"] == store.fingerprint() and not is_renamed:
        return
    problem = f"'{config.data.feature_path}' holds other features than '{command.folder}' was trained on"
    if label is not None:
        problem += f" ({describe_label(label, store, state)} in the run)"
    remedy = new_run_from(config, command, store, [], same_labels=not is_renamed)
    raise UserError(f"data.feature_path: {problem}; give those, or {remedy}")


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
    if settings_of_terms(saved) != settings_of_terms(config):
        raise UserError(
            f"training.terms: {shown(config.training.terms)} differs from the {shown(saved.training.terms)} of "
            f"{option} '{path}'; start at step 0 from its weights with training.init_from"
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
    check_same_meaning(config, saved, f"{option} '{path}'")
    check_finite(state, f"{option} '{path}'")
    same = same_averages(config, saved)
    averages = state.get("weight_averages", {})
    state["weight_averages"] = {name: average for name, average in averages.items() if name in same}
    return state


def same_averages(config: Config, saved: Config) -> set[str]:
    """Names of `training.averages` that both have: an average with other settings is another one."""
    own = config.training.averages
    return {name for name, settings in saved.training.averages.items() if own.get(name) == settings}


def settings_of_terms(config: Config) -> dict[str, dict]:
    """What decides the weights that the terms of the loss own: all settings but the weights in the loss."""
    settings: dict[str, dict] = {}
    for name, term in config.active_terms.items():
        if name != "ratio":
            settings[name] = {key: value for key, value in term.items() if key != "weight"}
    return settings


def check_finite(state: Checkpoint, name: str) -> None:
    """Raise a UserError if weights, EMA or moments of the optimizer hold a number that is not finite.

    Training from them would skip every step and blame the images.
    """
    tensors = {**state["model"]}
    for key, tensor in state["ema"].items():
        tensors[f"ema.{key}"] = tensor
    for key, tensor in state.get("terms", {}).items():
        tensors[f"terms.{key}"] = tensor
    for number, entry in state.get("optimizer", {}).get("state", {}).items():
        for key, tensor in entry.items():
            tensors[f"optimizer.{number}.{key}"] = tensor
    bad = non_finite_tensor(tensors)
    if bad:
        raise UserError(f"{name} has non-finite values in {bad}; give an earlier checkpoint")
