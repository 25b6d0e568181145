"""Choosing classes by name or by label, and the table of both.

A class has the name of its folder of training images. The checkpoint holds the names, in the order of the
labels. Where a number is both a name and a label, it is the name: with the folders "1", "10" and "2", the class
"1" has the label 0, and the class "10" has the label 1.
"""

import difflib
import re
from collections.abc import Sequence

from config import UserError
from data.names import short_name


def choose_labels(chosen: Sequence[str | int], names: Sequence[str] | None) -> list[int]:
    """Labels of the classes that a user chose; integers are labels already, and their range is not checked.

    Args:
        chosen: names of classes, or labels.
        names: of all classes, by label, where they are known.

    Raises:
        UserError: neither a name nor a number.
    """
    known = list(names or [])
    labels = []
    for choice in chosen:
        if not isinstance(choice, str):
            labels.append(int(choice))
        elif choice in known:
            labels.append(known.index(choice))
        elif is_number(choice):
            labels.append(int(choice))
        else:
            raise UserError(f"--classes '{short_name(choice)}': {no_such_name(choice, known)}")
    return labels


def is_number(text: str) -> bool:
    """Whether a text is an integer, with a sign or without."""
    return re.fullmatch(r"[+-]?[0-9]+", text) is not None


def no_such_name(name: str, known: list[str]) -> str:
    """Why a name was refused, with the most similar one."""
    if not known:
        return "the checkpoint has no class names; give labels, which are numbers"
    similar = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    guess = f"did you mean '{short_name(similar[0])}'? " if similar else ""
    return f"no class has this name; {guess}--list-classes prints all names and labels"


def ambiguity(chosen: Sequence[str], names: Sequence[str] | None) -> str:
    """A note about the first number that is the name of one class and the label of another, or nothing."""
    known = list(names or [])
    for choice in chosen:
        if choice not in known or not is_number(choice):
            continue
        label = int(choice)
        own = known.index(choice)
        if label != own and 0 <= label < len(known):
            other = short_name(known[label])
            return f"--classes {choice}: the class of this name, with label {own}; label {label} is '{other}'"
    return ""


def shown_name(label: int, names: Sequence[str] | None) -> str:
    """Name of a class as text that is safe to show; its label where it has no name."""
    if names is None or not 0 <= label < len(names):
        return str(label)
    return short_name(names[label])


def class_table(num_classes: int, names: Sequence[str] | None) -> str:
    """A line per class with label and name."""
    if not names:
        return f"no class names are known; the labels are 0 to {num_classes - 1}"
    width = len(str(num_classes - 1))
    return "\n".join(f"{label:>{width}}  {shown_name(label, names)}" for label in range(num_classes))
