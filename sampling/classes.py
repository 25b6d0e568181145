"""Choosing classes by name or by label, and the table of both, whose names can be typed back.

A class has the name of its folder of training images. The checkpoint holds the names, in the order of the
labels. Some names cannot be typed, such as those with a line break: they may be given as the table shows them, or
as other reports do, which cut long names. Names and labels may be joined by commas. Where a number is both a name
and a label, it is the name: with the folders "1", "10" and "2", the class "1" has the label 0, and the class "10"
has the label 1.
"""

import difflib
import re
import sys
from collections.abc import Sequence

from config import UserError
from data.folders import quote
from data.names import LONGEST, one_line_name, short_name


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
    for choice in split_lists(chosen, known):
        label = find_label(choice, known)
        if label is None:
            raise UserError(f"--classes '{short_name(str(choice))}': {no_such_name(str(choice), known)}")
        labels.append(label)
    if not labels:
        raise UserError("--classes: names no class; give names or labels")
    return labels


def split_lists(chosen: Sequence[str | int], known: list[str]) -> list[str | int]:
    """The choices one by one: what is no class, and has commas, is a list."""
    choices: list[str | int] = []
    for choice in chosen:
        if isinstance(choice, str) and "," in choice and find_label(choice, known) is None:
            choices += [part.strip() for part in choice.split(",") if part.strip()]
        else:
            choices.append(choice)
    return choices


def find_label(choice: str | int, known: list[str]) -> int | None:
    """The label of a choice: a name, a number, or a name as a report shows it. None if it is nothing of these."""
    if not isinstance(choice, str):
        return int(choice)
    if choice in known:
        return known.index(choice)
    if is_number(choice):
        return int(choice)
    # Whole but escaped, cut as well, or as extraction prints it; cut names may be those of several classes
    for form in (one_line_name, short_name, lambda name: quote(name)[1:-1]):
        shown = [form(name) for name in known]
        if shown.count(choice) == 1:
            return shown.index(choice)
    return None


def is_number(text: str) -> bool:
    """Whether a text is an integer, with a sign or without."""
    return re.fullmatch(r"[+-]?[0-9]+", text) is not None


def no_such_name(name: str, known: list[str]) -> str:
    """Why a name was refused, with the most similar one."""
    if not known:
        return "the checkpoint has no class names; give labels, which are numbers"
    similar = difflib.get_close_matches(name, known, 1, cutoff=0.6)
    guess = f"did you mean '{short_name(similar[0])}'? " if similar else ""
    if [short_name(other) for other in known].count(name) > 1:
        return "several classes are called so where names are cut; --list-classes prints whole names"
    return f"no class has this name; {guess}--list-classes prints all names and labels"


def ambiguity(chosen: Sequence[str], names: Sequence[str] | None) -> str:
    """A note about the first number that is the name of one class and the label of another, or nothing."""
    known = list(names or [])
    for choice in split_lists(chosen, known):
        if not isinstance(choice, str) or choice not in known or not is_number(choice):
            continue
        label = int(choice)
        own = known.index(choice)
        if label != own and 0 <= label < len(known):
            other = short_name(known[label])
            return f"--classes {choice}: the class of this name, with label {own}; label {label} is '{other}'"
    return ""


def shown_name(label: int, names: Sequence[str] | None, longest: int = LONGEST) -> str:
    """Name of a class as text that is safe to show; its label where it has no name."""
    if names is None or not 0 <= label < len(names):
        return str(label)
    return short_name(names[label], longest)


def class_table(num_classes: int, names: Sequence[str] | None) -> str:
    """A line per class with label and whole name, which `choose_labels` takes back."""
    if not names:
        return f"no class names are known; the labels are 0 to {num_classes - 1}"
    width = len(str(num_classes - 1))
    return "\n".join(
        f"{label:>{width}}  {shown_name(label, names, sys.maxsize)}" for label in range(num_classes)
    )
