"""Loading a trained model, and the checks that everything given with it belongs together."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from config import Config, UserError, config_from_dict, differences, flatten, role_of, to_dict
from data.autoencoder import HUB_NAMES, Autoencoder, is_same_autoencoder
from models import build_model
from processes import group
from weights.checkpoint import (
    Checkpoint,
    chosen_weights,
    forget_unknown_keys,
    load_checkpoint,
    non_finite_tensor,
    shape_difference,
    tensor_shapes,
)
from weights.ema import young_ema


class TrainedModel(NamedTuple):
    """A trained model with all that sampling needs."""

    model: torch.nn.Module  # in evaluation mode, with the EMA weights or those that were asked for
    config: Config
    autoencoder: Autoencoder
    class_names: list[str] | None
    step: int  # optimizer steps it was trained for
    fingerprint: str  # of the weights and of what the configuration makes of them
    weights: str = "ema"  # which they are: "ema", "model" or the name of an average

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_trained(
    ckpt: str | Path,
    device: torch.device | str = "cpu",
    vae: str | None = None,
    config: Config | None = None,
    overrides: Sequence[str] = (),
    weights: str = "ema",
    option: str = "--ckpt",
) -> TrainedModel:
    """Load a checkpoint for sampling.

    Args:
        ckpt: a file that training wrote, a weights file, or a folder with one and, maybe, its autoencoder.
        vae: "ema", "mse" or a local folder; default: the autoencoder in the folder, or that the checkpoint names.
        config: default: the checkpoint's own. It must agree with that in what shapes the network or the process.
        overrides: `section.key=value` for the checkpoint's own configuration.
        weights: "ema"; of a run's checkpoint also "model", the trained weights, or a name of `training.averages`.
        option: names the checkpoint in error messages.

    Raises:
        UserError: unreadable checkpoint, non-finite weights, contradicting configuration, or another autoencoder
            than in training.
    """
    state = load_checkpoint(ckpt, option)
    name = f"{option} '{ckpt}'"
    forget_unknown_keys(state, name)
    config = config or config_from_dict(state["config"], overrides)
    check_agreement(config, config_from_dict(state["config"]))

    warn_of_unguided_channels(config)
    warn_of_untrained_labels(state["class_names"], config)

    # The network with its weights
    model = load_network(state, config, weights, name)
    identity = fingerprint(model.state_dict(), config)

    # The autoencoder: the one asked for, else the checkpoint's
    known = state["autoencoder"]
    if vae is None and Path(ckpt, "vae").is_dir():
        vae = str(Path(ckpt, "vae"))
    autoencoder = Autoencoder.load(vae, device) if vae else load_known_autoencoder(known, config, device)
    check_autoencoder(autoencoder, known, config)

    model = model.to(device).eval()
    weights = state.get("weights") or weights
    return TrainedModel(model, config, autoencoder, state["class_names"], state["step"], identity, weights)


def load_known_autoencoder(known: dict | None, config: Config, device: torch.device | str) -> Autoencoder:
    """The autoencoder that the checkpoint names, or a copy in `data.vae` if that place has none any more.

    Raises:
        UserError: neither place has it.
    """
    copy = config.data.vae
    name = known["name"] if known else copy
    try:
        return Autoencoder.load(name, device)
    except UserError as error:
        problem = f"{error}; the checkpoint names it: if it has moved, give its new place as --vae"
    if copy != name:
        with contextlib.suppress(UserError):
            autoencoder = Autoencoder.load(copy, device)
            if known and is_same_autoencoder(autoencoder.describe(), known):
                return autoencoder
    raise UserError(problem)


def load_network(state: Checkpoint, config: Config, weights: str, name: str) -> torch.nn.Module:
    """The configured network with the chosen weights; UserError if they do not fit or are not finite."""
    values = chosen_weights(state, weights, name)
    model = build_model(config)
    difference = shape_difference(tensor_shapes(model.state_dict()), tensor_shapes(values))
    if difference:
        raise UserError(
            f"{name}: its weights are not those of its configuration ({difference}); give another"
        )
    bad = non_finite_tensor(values)
    if bad:
        raise UserError(f"{name} has non-finite values in its weights {bad}; give an earlier checkpoint")
    model.load_state_dict(values)
    if weights == "ema":
        warn_of_young_ema(state)
    return model


def warn_of_young_ema(state: Checkpoint) -> None:
    """Warn if much of the EMA is still what training started with."""
    problem = young_ema(state)
    if problem:
        group.print_once(f"warning: {problem}; --weights model takes the trained weights")


def warn_of_unguided_channels(config: Config) -> None:
    """Say that guidance changes some channels only: the first 3 are the usual choice for 4 channels."""
    guided = config.diffusion.cfg_channels
    channels = config.data.latent_channels
    if isinstance(guided, int) and guided < channels and channels > 4:
        group.print_once(
            f"warning: diffusion.cfg_channels {guided}: guidance changes {guided} of the {channels} latent "
            "channels; --set diffusion.cfg_channels=all guides all of them"
        )


def warn_of_untrained_labels(class_names: list[str] | None, config: Config) -> None:
    """Say that some labels are of no class that the features of training had."""
    classes = config.data.num_classes
    if class_names and len(class_names) < classes:
        group.print_once(
            f"warning: data.num_classes is {classes}, but the model was trained on features of {len(class_names)} "
            f"classes; labels from {len(class_names)} had no images"
        )


def shapes_samples(key: str) -> bool:
    """Whether a key, written `section.key`, decides what network and which process the weights become."""
    return role_of(key) in ("network", "process")


def fingerprint(state_dict: dict[str, Tensor], config: Config) -> str:
    """SHA-256 of names and values, and of the keys that decide what they compute."""
    values = flatten(to_dict(config))
    shaping = {key: values[key] for key in sorted(values) if shapes_samples(key)}
    digest = hashlib.sha256(json.dumps(shaping).encode())
    for name, tensor in state_dict.items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_agreement(given: Config, own: Config) -> None:
    """Refuse a configuration that would make another network or process of the checkpoint's weights."""
    changed = differences(to_dict(given), to_dict(own))
    contradictions = [key for key in changed if shapes_samples(key)]
    if contradictions:
        keys = ", ".join(contradictions)
        raise UserError(f"--config differs from the checkpoint's configuration in {keys}; leave it out")


def check_autoencoder(autoencoder: Autoencoder, known: dict | None, config: Config) -> None:
    """Check that the autoencoder fits the network and made its features.

    The two published ones, ema and mse, share their encoder: one in place of the other is only a warning.

    Args:
        known: the autoencoder of the checkpoint, as `Autoencoder.describe` gives it; None if it is not known.

    Raises:
        UserError: another shape of latents, another scaling, or other weights.
    """
    given = autoencoder.describe()
    name = given["name"]
    data = config.data
    if (given["stride"], given["channels"]) != (data.latent_stride, data.latent_channels):
        found = f"stride {given['stride']} and {given['channels']} channels"
        wanted = f"{data.latent_stride} and {data.latent_channels}"
        raise UserError(
            f"--vae '{name}' has {found}, but the model's are {wanted}; give the autoencoder of the features"
        )
    if known is None:
        return
    trained_with = known["name"]
    if (given["shift"], given["scale"]) != (known["shift"], known["scale"]):
        raise UserError(
            f"--vae '{name}' scales latents differently from '{trained_with}', which the model was trained on"
        )
    if given["sha256"] == known["sha256"]:
        return
    if {name, trained_with} != set(HUB_NAMES):
        when = "when the model's features were made"
        raise UserError(f"--vae '{name}' has other weights than '{trained_with}' had {when}; give that one")
    group.print_once(
        f"warning: --vae {name} decodes the latents of a model that was trained on {trained_with}"
    )
