"""Files that are complete as soon as their name appears."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_file(
    path: Path, write: Callable[[BinaryIO], object], durable: bool = True, shared: bool = False
) -> None:
    """Let `write` fill a temporary file, then give it its name. If `write` fails, nothing is left behind.

    Args:
        path: the final name; its folder exists.
        write: writes the content to the stream it is given.
        durable: the file survives a power cut. This takes milliseconds a file: too long for thousands of
            pictures.
        shared: several programs may write this file at once; the last one wins. Each uses its own temporary
            name.
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
        # Half a checkpoint would keep a full disk full.
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file as `write_file` does."""
    write_file(path, lambda stream: stream.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write plain data as indented JSON, as `write_file` does."""
    write_text(path, json.dumps(value, indent=1) + "\n")
