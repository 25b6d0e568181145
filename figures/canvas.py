"""What all figures share: the size of their text, names in it, and how they are written."""

import functools
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from config import UserError
from data.files import write_file
from data.names import LONGEST, escape, short_name

FORMATS = (".png", ".pdf", ".svg")

# Settings of matplotlib for `rc_context`; names of classes and models may hold a "$", which is no formula
SMALL: dict[Any, Any] = {"font.size": 8, "text.parse_math": False}


@functools.cache
def drawable_characters() -> frozenset[int]:
    """Code points that the font of the figures has; for any other matplotlib warns and draws a box."""
    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def figure_name(name: str, longest: int = LONGEST) -> str:
    """A short name for figures: what the font cannot draw is escaped, too."""
    known = drawable_characters()
    return short_name("".join(char if ord(char) in known else escape(char) for char in name), longest)


def check_format(option: str, path: Path) -> None:
    """UserError unless the ending of a file names a format that `save_figure` writes."""
    if path.suffix not in FORMATS:
        names = ", ".join(FORMATS)
        raise UserError(f"{option} '{path}': must end in one of {names}; try {path.stem}.png")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that its ending names; its folder is created if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda stream: figure.savefig(stream, format=path.suffix.removeprefix(".")))
