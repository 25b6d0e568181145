"""What must agree with the configuration before a run starts: the features and the names of parameters."""

import numpy as np
import torch

from config import Config, UserError
from data.features import Features, open_features
from models import build_model
from models.embeddings import VectorCondition, find_kind
from processes import group
from training.losses import Terms
from training.optimizer import is_part
from training.schedules import total_steps

MAX_RANGES = 5  # of labels in a warning
LARGEST_SCALAR = 10  # of a condition, without a warning; and the largest deviation of a vector's numbers
MOST_VECTORS = 1000  # that are looked at


def open_fitting_features(config: Config) -> Features:
    """Open the features of a configuration.

    Raises:
        UserError: they cannot be read, or they do not fit the configuration.
    """
    data = config.data
    store = open_features(data.feature_path, data.image_grid, config.columns)
    # The latents have the shape that the model expects
    found = tuple(store.latent_shape)
    expected = config.latent_shape
    if found != expected:
        raise UserError(
            f"data.feature_path: '{data.feature_path}' holds latents of shape {found}, but image_size, "
            f"latent_stride and latent_channels make {expected}; change those keys or extract again"
        )
    check_conditions(config, store)
    with torch.device("meta"):
        Terms(config, store)
    # The model knows every label
    largest = store.labels.max()
    if largest >= data.num_classes:
        raise UserError(
            f"data.num_classes: {data.num_classes} is too small for label {largest} in the features"
        )
    warn_of_untrained_classes(config, store)
    # There are images for at least one optimizer step
    images = len(store)
    batch = config.training.global_batch_size
    if images < batch:
        raise UserError(
            f"training.global_batch_size: {batch} is more than the {images} images of '{data.feature_path}'; "
            "make it smaller"
        )
    if total_steps(config, images) == 0:
        raise UserError(
            "training.epochs: no optimizer step fits into the run; "
            "raise it or lower gradient_accumulation_steps"
        )
    return store


def check_conditions(config: Config, store: Features) -> None:
    """Raise a UserError for a condition of another shape than its column; warn of values of another scale."""
    for name, kind_name in config.data.conditions.items():
        kind = find_kind(kind_name)
        found = store.columns[name]
        if found != kind.shape:
            raise UserError(
                f"data.conditions: {name} is a {kind_name} of shape {kind.shape}, but its column holds {found} per "
                "image; name another column or kind"
            )
        values = store.column(name)
        if not kind.shape:
            warn_of_scalars(name, values)
        elif issubclass(kind.condition, VectorCondition):
            warn_of_vectors(name, values)


def warn_of_scalars(name: str, values: np.ndarray) -> None:
    """Warn of scalars (n,) far from 0 to 1."""
    if max(abs(values.min()), abs(values.max())) > LARGEST_SCALAR:
        group.print_once(
            f"warning: data.conditions: {name} goes from {values.min():.4g} to {values.max():.4g}, and scalars "
            "are told apart best between 0 and 1; scale the column"
        )


def warn_of_vectors(name: str, vectors: np.ndarray) -> None:
    """Warn of vectors (n, N) whose numbers have a deviation far from 1, judged by some of them."""
    some = vectors[:: -(-len(vectors) // MOST_VECTORS)]
    deviation = some.std(dtype=np.float64)
    if not 1 / LARGEST_SCALAR <= deviation <= LARGEST_SCALAR:
        group.print_once(
            f"warning: data.conditions: the numbers of {name} have a deviation of {deviation:.4g}, and vectors are "
            "told apart best with a deviation of about 1; scale the column"
        )


def warn_of_untrained_classes(config: Config, store: Features) -> None:
    """Warn if the model has classes without an image in the features.

    It is no error: a model that is fine-tuned on some of its classes keeps the others.
    """
    classes = config.data.num_classes
    trained = np.unique(store.labels).tolist()
    untrained = sorted(set(range(classes)) - set(trained))
    if not untrained:
        return
    known = max(len(store.class_names), trained[-1] + 1)
    remedy = f"; for features of all classes, set data.num_classes={known}" if known < classes else ""
    group.print_once(
        f"warning: data.num_classes is {classes}, but the features have images of {len(trained)} classes; labels "
        f"{label_ranges(untrained)} are never trained{remedy}"
    )


def label_ranges(labels: list[int]) -> str:
    """Ascending labels as text, such as "1, 4 to 7", without the middle if it is long."""
    ranges: list[list[int]] = []
    for label in labels:
        if ranges and label == ranges[-1][1] + 1:
            ranges[-1][1] = label
        else:
            ranges.append([label, label])
    parts = [str(first) if first == last else f"{first} to {last}" for first, last in ranges]
    if len(parts) > MAX_RANGES:
        parts = [*parts[: MAX_RANGES - 1], "...", parts[-1]]
    return ", ".join(parts)


def check_parameter_names(config: Config) -> None:
    """Raise a UserError for an entry of `training.frozen` or `training.lr_scales` that fits no parameter."""
    with torch.device("meta"):
        model = build_model(config)
    names = [name for name, _ in model.named_parameters()]
    entries = {"frozen": config.training.frozen, "lr_scales": list(config.training.lr_scales)}
    for key, chosen in entries.items():
        for entry in chosen:
            if not any(is_part(name, entry) for name in names):
                first_parts = sorted({name.split(".")[0] for name in names})
                raise UserError(
                    f"training.{key}: no parameter's name begins with '{entry}'; "
                    f"they begin with {', '.join(first_parts)}"
                )
