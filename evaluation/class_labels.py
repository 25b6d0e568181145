"""Which class of a classifier each image should be: matched by name where both sides have names.

The number of a class depends on the other classes of its set: the first folder of a part of the classes is not
the first class of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.names import repeats_numbers, short_name


@dataclass(frozen=True, eq=False)
class ClassLabels:
    """Class of each image of a set."""

    numbers: np.ndarray  # (N,) int64
    names: Sequence[str] | None  # of all classes, by number, where they are known


def sampled_classes(
    labels: Sequence[int], names: Sequence[str] | None, cfg_scale: float
) -> ClassLabels | None:
    """Classes of samples of a model; none at guidance scale 0, which draws them without a class."""
    return ClassLabels(np.array(labels), names) if cfg_scale else None


class ClassMatch(NamedTuple):
    """Class numbers of a classifier for each image, (N,), or None without a match; and a note, or nothing."""

    numbers: np.ndarray | None
    note: str = ""


def match_classes(
    labels: ClassLabels | None, classifier_names: Sequence[str] | None, num_classes: int
) -> ClassMatch:
    """Find the images' classes among the `num_classes` of a classifier, by name or else by number."""
    if labels is None:
        return without("the samples have no labels; give an .npz with arr_1, or a folder for each class")
    known = classifier_names
    if known is not None and len(known) != num_classes:
        known = None
    names = labels.names
    if names is not None and repeats_numbers(names) and not set(names) <= set(known or []):
        names = None
    if names is not None and known is not None:
        return match_by_name(labels.numbers, names, known)

    # By number, where both may count the same classes
    largest = int(labels.numbers.max())
    if names is not None and len(names) != num_classes:
        return without(
            f"the samples are of {len(names)} classes, and the classifier knows {num_classes} without names"
        )
    if largest >= num_classes:
        return without(f"the samples have the class {largest}, but the classifier has {num_classes} classes")
    if names is None and known is None:
        return ClassMatch(labels.numbers)
    nameless = "classifier has" if known is None else "samples have"
    return ClassMatch(
        labels.numbers, f"class accuracy: by class number, because the {nameless} no class names"
    )


def match_by_name(numbers: np.ndarray, names: Sequence[str], known: Sequence[str]) -> ClassMatch:
    """The classifier's numbers of the classes with the same names."""
    used = np.unique(numbers).tolist()
    if used[-1] >= len(names):
        return without(f"the samples have the class {used[-1]}, but {len(names)} class names")
    missing = [names[number] for number in used if names[number] not in known]
    if missing:
        several = f" and {len(missing) - 1} others of the samples" if len(missing) > 1 else ""
        return without(f"the classifier does not know the class '{short_name(missing[0])}'{several}")
    table = np.zeros(used[-1] + 1, dtype=np.int64)
    for number in used:
        table[number] = known.index(names[number])
    return ClassMatch(table[numbers])


def without(reason: str) -> ClassMatch:
    return ClassMatch(None, f"class accuracy is left out: {reason}")
