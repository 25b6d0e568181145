"""Files that are complete when their name shows."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_file(
    path: Path, write: Callable[[BinaryIO], None], durable: bool = True, shared: bool = False
) -> None:
    """Let `write` fill a file that appears under its name only when it is complete; nothing is left where that fails.

    `durable` files survive a power cut too, which takes milliseconds each: too long for thousands of pictures.
    A `shared` file may be written by several runs at once, of which the last one stays: each has a temporary name of its own.
    """
    writer = f".{socket.gethostname()}-{os.getpid()}" if shared else ""
    temporary = path.with_name(f"{path.name}{writer}.tmp")
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # half a checkpoint would keep a full disk full
        raise
    if not durable:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, must survive a power cut
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file as `write_file` does."""
    write_file(path, lambda stream: stream.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write plain data as indented JSON, as `write_file` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")
