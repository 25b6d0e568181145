"""Spellings of the official code's files, brought to one form, in which configurations are compared.

A rule takes a value as it stands in the file, and the name of its key. It returns what the value means, or the
value itself, which the check of types then refuses or accepts.
"""

import math
import re
from typing import Any

from schema import UserError, require, shown

# A reduction by one of these is none
NO_REDUCTION = (None, 0, 1)


def one_stage(values: Any, key: str) -> Any:
    """768 or [768, 768, 768] -> [768, 768]: there is one chunking stage, so more entries must repeat the second."""
    if isinstance(values, int) and not isinstance(values, bool):
        return [values, values]
    if not isinstance(values, list) or len(values) < 3:
        return values
    main = values[1]
    require(
        all(value == main for value in values[2:]),
        f"{key}: {shown(values)} has entries for more than one chunking stage, and only one is supported; "
        f"try {shown([main, main])}",
    )
    return values[:2]


def one_number(value: Any, key: str) -> Any:
    """[4] or [4, 4] -> 4: an entry per chunking stage, of which there is one."""
    if not isinstance(value, list) or not value:
        return value
    first, *others = value
    if all(other == first for other in others):
        return first
    # The ratio loss needs a factor above 1
    factors = [number for number in value if isinstance(number, (int, float)) and number > 1]
    raise UserError(
        f"{key}: {shown(value)} has numbers for more than one chunking stage, and only one is supported; "
        f"try {shown(factors[0] if factors else 4)}"
    )


def one_reduction(values: Any, key: str) -> Any:
    """4 or [4] -> [4, null], and [], [null, null] or [1] -> null."""
    if isinstance(values, int) and not isinstance(values, bool):
        values = [values]
    if not isinstance(values, list):
        return values
    first, *others = values or [None]
    nearest = None if first in NO_REDUCTION else [first, None]
    if any(other not in NO_REDUCTION for other in others):
        raise UserError(
            f"{key}: {shown(values)} reduces the main network, which cannot work; try {shown(nearest)}"
        )
    return nearest


def one_side(value: Any, key: str) -> Any:
    """[256] or [256, 256] -> 256: the side of a square."""
    is_square = isinstance(value, list) and len(value) in (1, 2) and value[0] == value[-1]
    return value[0] if is_square else value


def not_negative(value: Any, key: str) -> Any:
    """A negative weight -> 0: the official code leaves the loss out at either."""
    is_negative = isinstance(value, (int, float)) and value < 0
    return 0 if is_negative else value


def no_limit(value: Any, key: str) -> Any:
    """.inf, 'Infinity' or 1e400 -> null."""
    text = str(value).strip().lower().removeprefix("+").removeprefix(".")
    try:
        is_infinite = float(text) == math.inf
    except ValueError:  # not a number
        return value
    return None if is_infinite and not isinstance(value, (list, dict)) else value


def precision(value: Any, key: str) -> Any:
    """The names that accelerate and PyTorch have: no or float32 -> fp32, bfloat16 -> bf16."""
    names = {"no": "fp32", "float32": "fp32", "bfloat16": "bf16"}
    return names.get(value, value) if isinstance(value, str) else value


def no_entries(value: Any, key: str) -> Any:
    """null -> [], for a list of texts."""
    return [] if value in (None, "None") else value


def no_pairs(value: Any, key: str) -> Any:
    """null -> {}, for 'name: value' pairs."""
    return {} if value in (None, "None") else value


def never_read(value: Any, key: str) -> Any:
    """Anything -> false: the official code has the key, and does not read it."""
    return False


def parse_schedule(text: str) -> list[tuple[float, float]]:
    """Read "1000:0.6,300:0.2,0:0" as points (t, value) by rising t; ValueError for another form."""
    number = r"\s*(\d+\.?\d*|\.\d+)\s*"
    points = []
    for part in text.split(","):
        pair = re.fullmatch(f"{number}:{number}", part)
        if pair is None:
            raise ValueError(f"'{part}' is not a pair t:value")
        points.append((float(pair[1]), float(pair[2])))
    return sorted(points)
