"""Tables of measurements: on the screen as Markdown, and in a JSON file by machine and title."""

import json
import platform
from pathlib import Path
from typing import Any

import torch

from config import UserError
from data.files import write_json

Row = dict[str, Any]  # column -> text or number
Tables = dict[str, list[Row]]  # title -> rows


def machine(device: torch.device) -> str:
    """Name of the machine: processor or GPU, threads, version of PyTorch."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"{processor_name()}, {torch.get_num_threads()} threads, {capability}"
    return f"{name}; torch {torch.__version__}"


def processor_name() -> str:
    """What Linux calls the processor; elsewhere what Python does."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def print_table(title: str, rows: list[Row]) -> None:
    """Print rows with equal keys as a Markdown table, numbers with three significant digits."""
    print(f"\n{title}\n")
    print_line(list(rows[0]))
    print("|---" * len(rows[0]) + "|")
    for row in rows:
        print_line([value if isinstance(value, str) else f"{value:.3g}" for value in row.values()])


def print_line(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def read_json(path: Path) -> dict[str, Tables]:
    """Machine -> tables of earlier measurements; empty if there is no file.

    Raises:
        UserError: the file holds something else.
    """
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
        if not all(isinstance(tables, dict) for tables in content.values()):
            raise ValueError
    except (OSError, ValueError, AttributeError):
        raise UserError(f"--output '{path}': holds no measurements to add to; give another file") from None
    return content


def add_to_json(path: Path, title: str, rows: list[Row], device: torch.device) -> None:
    """Add a table to a file. It replaces the table with this title of this machine, and no other."""
    content = read_json(path)
    content.setdefault(machine(device), {})[title] = rows
    write_json(path, content)
