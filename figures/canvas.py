"""What all figures share: the size of their text, and how they are written."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from data.files import write_file

# Settings of matplotlib for `rc_context`; names of classes and models may hold a "$", which is no formula
SMALL: dict[Any, Any] = {"font.size": 8, "text.parse_math": False}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG; its folder is created if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda stream: figure.savefig(stream, format="png"))
