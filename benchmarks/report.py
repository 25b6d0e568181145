"""Results: a JSON file by machine, part and job, and a Markdown report of one machine."""

import json
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from config import UserError
from data.files import write_json, write_text
from processes.hardware import processor_name

Row = dict[str, Any]  # column -> text or number
Result = dict[str, Any]  # "rows" and "seconds" of a job, or why it "failed"
Parts = dict[str, dict[str, Result]]  # part -> job -> result


def environment(device: torch.device) -> dict[str, str]:
    """What else the numbers may depend on."""
    found = {
        "Python": platform.python_version(),
        "system": platform.platform(),
        "processor of the host": processor_name(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "GPU": f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, "
            f"capability {properties.major}.{properties.minor}",
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
            "flash-attn": version_of("flash-attn"),
        }
    return found


def version_of(package: str) -> str:
    """Its version, if it is installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


# ------------------------------------------------------------------------------------------------ tables


def table(rows: list[Row]) -> str:
    """Rows with equal keys as a Markdown table, numbers with three significant digits."""
    lines = [line_of(list(rows[0])), "|---" * len(rows[0]) + "|"]
    for row in rows:
        lines.append(line_of([cell(value) for value in row.values()]))
    return "\n".join(lines)


def line_of(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def cell(value: Any) -> str:
    """A number or text for a table."""
    if isinstance(value, str):
        return value.replace("|", r"\|")
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def write_report(
    path: Path, title: str, facts: Mapping[str, str], parts: Parts, about: Mapping[str, str]
) -> None:
    """Write one machine's results as Markdown.

    Args:
        facts: about the machine and the command.
        about: part -> what its tables show, in the order of the report.
    """
    lines = [f"# Benchmarks: {title}", ""]
    lines += [f"- {name}: {fact}" for name, fact in facts.items()]
    for part, meaning in about.items():
        if part not in parts:
            continue
        lines += ["", f"## {part.capitalize()}", "", meaning]
        for rows in same_columns(parts[part]):
            lines += ["", table(rows)]
        for name, result in parts[part].items():
            if "failed" in result:
                lines += ["", f"**{name}**: not measured. {result['failed']}"]
    write_text(path, "\n".join(lines) + "\n")


def same_columns(results: dict[str, Result]) -> list[list[Row]]:
    """The rows of all jobs, in tables of equal columns."""
    tables: dict[tuple[str, ...], list[Row]] = {}
    for result in results.values():
        for row in result.get("rows", []):
            tables.setdefault(tuple(row), []).append(row)
    return list(tables.values())


# ------------------------------------------------------------------------------------------------ file


def read_json(path: Path) -> dict[str, Parts]:
    """Machine -> results of earlier calls; empty if there is no file.

    Raises:
        UserError: the file holds something else.
    """
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
        for parts in content.values():
            for results in parts.values():
                if not all("rows" in result or "failed" in result for result in results.values()):
                    raise ValueError
    except (OSError, ValueError, AttributeError, TypeError):
        raise UserError(f"--output '{path}': holds no measurements to add to; give another file") from None
    return content


def add_to_json(path: Path, machine_name: str, part: str, job: str, result: Result) -> None:
    """Add the result of a job to a file. It replaces the result of this job on this machine, and no other."""
    content = read_json(path)
    content.setdefault(machine_name, {}).setdefault(part, {})[job] = result
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def command_line() -> str:
    """The command that runs, as a user types it."""
    return " ".join(["python -m benchmarks", *sys.argv[1:]])
