"""Reads `torch.save` files of strangers without executing anything in them.

torch's weights-only unpickler builds tensors and containers and nothing else. The official DC-DiT checkpoints also hold a
pickled configuration, an object of classes in a module `config`: each of these becomes an `Inert` object, and any other class
or function in the file is refused before unpickling starts.
"""

import pickle
import zipfile
from pathlib import Path

import torch

CONFIG_MODULE = "config."  # the module of the official code whose classes may occur


class Inert:
    """What was pickled as an object of the official configuration: its fields, and no behaviour."""

    def __setstate__(self, fields) -> None:
        self.fields = fields


class Refused(ValueError):
    """The file is no checkpoint, or holds something that is neither tensor, container nor configuration."""


def read_untrusted(path: Path) -> object:
    """The content of a `torch.save` file on the CPU, with `Inert` objects made plain dictionaries.

    Raises:
        Refused: for anything that is not plain data. No code of the file has run then.
        OSError: the file cannot be read.
    """
    names = unknown_names(path)
    if strange := sorted(name for name in names if not name.startswith(CONFIG_MODULE)):
        raise Refused(
            f"it holds {', '.join(strange[:3])}, which is neither tensor, container nor configuration"
        )
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # whatever a mutilated pickle makes the unpickler stumble over
        raise Refused(first_line(error)) from None
    try:
        return to_plain(content)
    except RecursionError:
        raise Refused("something in it contains itself") from None


def unknown_names(path: Path) -> list[str]:
    """Dotted names of the classes and functions in a file that torch does not know as harmless."""
    if not zipfile.is_zipfile(path):
        return []  # torch's older format, in which no such name may occur
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, EOFError, IndexError, pickle.UnpicklingError) as error:
        raise Refused(f"it is not a torch.save file ({first_line(error)})") from None


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def to_plain(content) -> object:
    """Inert objects, at any depth of dictionaries and lists, as dictionaries of their fields."""
    if isinstance(content, Inert):
        content = getattr(content, "fields", None)
        if not isinstance(content, dict):
            raise Refused("its configuration has no fields")
    if isinstance(content, dict):
        return {key: to_plain(value) for key, value in content.items()}
    if isinstance(content, list):
        return [to_plain(value) for value in content]
    return content
