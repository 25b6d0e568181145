"""Spellings of the official code's files, brought to one form, in which configurations are compared.

A rule takes a value as it stands in the file, and the name of its key. It returns what the value means, or the
value itself, which the check of types then refuses or accepts.
"""

import math
from typing import Any

from schema import UserError, require

# A reduction by one of these is none
NO_REDUCTION = (None, 0, 1)


def one_stage(values: Any, key: str) -> Any:
    """[768, 768, 768] -> [768, 768]: there is one chunking stage, so further entries must repeat the second."""
    if not isinstance(values, list) or len(values) < 3:
        return values
    require(
        all(value == values[1] for value in values[2:]),
        f"{key}: {values!r} has entries for more than one chunking stage, and only one is supported; "
        f"try {values[:2]}",
    )
    return values[:2]


def one_number(value: Any, key: str) -> Any:
    """[4] or [4, 4] -> 4: an entry per chunking stage, of which there is one."""
    if not isinstance(value, list) or not value:
        return value
    first, *others = value
    require(
        all(other == first for other in others),
        f"{key}: {value!r} has numbers for more than one chunking stage, and only one is supported; try {first}",
    )
    return first


def one_reduction(values: Any, key: str) -> Any:
    """[4] -> [4, null], and [], [null, null] or [1] -> null."""
    if not isinstance(values, list):
        return values
    first, *others = values or [None]
    if any(other not in NO_REDUCTION for other in others):
        raise UserError(f"{key}: {values!r} reduces the main network, which cannot work; try [{first}, null]")
    return None if first in NO_REDUCTION else [first, None]


def not_negative(value: Any, key: str) -> Any:
    """A negative weight -> 0: the official code leaves the loss out at either."""
    is_negative = isinstance(value, (int, float)) and value < 0
    return 0 if is_negative else value


def no_limit(value: Any, key: str) -> Any:
    """.inf -> null."""
    return None if value in (math.inf, "inf") else value


def never_read(value: Any, key: str) -> Any:
    """true -> false: the official code has the key, and does not read it."""
    return False if value is True else value
