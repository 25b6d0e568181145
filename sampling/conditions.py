"""Values of the conditions that samples have beside their class, by name.

A value is a number, or an array of the condition's shape; an array with a further dimension in front has a row per
sample, and sample i gets row i.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from config import Config, UserError, one_line
from data.features import Features
from data.streams import rng
from models.embeddings import ConditionKind, find_kind, forms_of_value


def known_kind(name: str, config: Config) -> ConditionKind:
    """The kind of a condition; UserError if the model was not trained with it."""
    known = config.data.conditions
    if name not in known:
        names = f"its conditions are {', '.join(known)}" if known else "it has no conditions"
        raise UserError(f"--condition {name}: the model was not trained with it; {names}")
    return find_kind(known[name])


def read_conditions(words: list[str], config: Config) -> dict[str, ArrayLike]:
    """The values of --condition by name; UserError for what is no NAME=VALUE, or no value of that condition."""
    values: dict[str, ArrayLike] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"--condition {word}: must have the form NAME=VALUE, such as {name}=0.7")
        kind = known_kind(name, config)
        try:
            values[name] = kind.condition.read(text, kind.shape)
        except ValueError as error:
            raise UserError(f"--condition {word}: {error}") from None
        except OSError as error:
            raise UserError(f"--condition {word}: cannot be read ({one_line(error)})") from None
    return values


def rows_of(value: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    """A value as (n, *shape), with n = 1 for all samples; ValueError if it has another shape."""
    array = np.asarray(value)
    rows = array[None] if array.shape == shape else array
    if rows.ndim == 0 or len(rows) == 0 or rows.shape[1:] != shape:
        raise ValueError(f"has shape {array.shape}; give {forms_of_value(shape)}")
    return rows


def check_values(conditions: Mapping[str, ArrayLike], config: Config) -> None:
    """Raise a UserError for a value of no condition, or of another shape, or that is not finite."""
    for name, value in conditions.items():
        kind = known_kind(name, config)
        try:
            rows = rows_of(value, kind.shape)
        except ValueError as error:
            raise UserError(f"--condition {name}: {error}") from None
        if rows.dtype.kind not in "fiub":
            raise UserError(f"--condition {name}: holds {rows.dtype}; give numbers")
        finite = np.isfinite(rows).reshape(len(rows), -1).all(1)
        if np.ndim(value) == 0 and not finite.all():
            raise UserError(f"--condition {name}={rows[0]}: must be a finite number")
        if not finite.all():
            raise UserError(f"--condition {name}: row {finite.argmin()} is not finite; give finite numbers")


def check_rows(conditions: Mapping[str, ArrayLike], config: Config, count: int) -> None:
    """Raise a UserError for checked values with a row per sample of fewer samples than there are."""
    for name, value in conditions.items():
        rows = len(rows_of(value, known_kind(name, config).shape))
        if 1 < rows < count:
            raise UserError(
                f"--condition {name}: has {rows} rows for {count} samples; give one value, or a row per sample"
            )


def condition_values(
    conditions: Mapping[str, ArrayLike], config: Config, indices: Sequence[int], device: torch.device
) -> dict[str, Tensor]:
    """The conditions of the samples with these indices, by name: (B, ...), NaN for no condition."""
    values = {}
    for name, kind_name in config.data.conditions.items():
        shape = find_kind(kind_name).shape
        rows = rows_of(conditions.get(name, np.full(shape, np.nan)), shape)
        chosen = rows[list(indices)] if len(rows) > 1 else rows.repeat(len(indices), 0)
        values[name] = torch.tensor(chosen, dtype=torch.float32, device=device)
    return values


def plain_conditions(conditions: Mapping[str, ArrayLike] | None) -> dict[str, Any] | None:
    """Plain data that tells the values apart: numbers, and the shapes and checksums of arrays."""
    if conditions is None:
        return None
    plain: dict[str, Any] = {}
    for name, value in conditions.items():
        array = np.asarray(value)
        if array.ndim:
            digest = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
            plain[name] = f"{array.dtype} {array.shape}, SHA-256 {digest}"
        else:
            plain[name] = array.item()
    return plain


def conditions_of_images(store: Features, config: Config, labels: list[int]) -> dict[str, np.ndarray]:
    """Conditions for samples that a run draws by itself: those of training images of the same classes.

    The image of sample i is a function of i and its label; if the features have none of the class, any image.

    Args:
        store: the features, with the columns of the conditions.
    """
    if not config.data.conditions:
        return {}
    by_class = np.argsort(store.labels, kind="stable")
    first = np.searchsorted(store.labels, labels, side="left", sorter=by_class)
    end = np.searchsorted(store.labels, labels, side="right", sorter=by_class)
    images = []
    for sample, bounds in enumerate(zip(first, end)):
        low, high = bounds if bounds[0] < bounds[1] else (0, len(by_class))
        images.append(by_class[rng(0, "condition", sample).integers(low, high)])
    return {name: store.column(name)[images] for name in config.data.conditions}
