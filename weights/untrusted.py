"""Reads `torch.save` files of strangers without executing anything in them.

torch's weights-only unpickler builds tensors and containers and nothing else. The official DC-DiT checkpoints
also hold a pickled configuration, an object of classes in a module `config`, and those of DiT its options. Each
of these becomes an `Inert` object. Any other class or function in the file is refused before unpickling starts.
"""

import pickle
import re
import zipfile
from pathlib import Path

import torch

from schema import one_line, printable

CONFIG_MODULE = "config."  # the module of the official code whose classes may occur
NAMESPACE = "argparse.Namespace"  # the options of train.py, which the code of DiT and SiT stores


class Inert:
    """Stands for a pickled object of an official configuration: it has the fields, and no behaviour."""

    def __setstate__(self, fields: object) -> None:
        self.fields = fields


class Refused(ValueError):
    """The file is no checkpoint, or holds something that is neither tensor, container nor configuration."""


def read_untrusted(path: Path) -> object:
    """Read a `torch.save` file onto the CPU, with `Inert` objects turned into plain dictionaries.

    Raises:
        Refused: the file holds more than plain data; no code in the file has run.
        OSError: the file cannot be read.
    """
    # Refuse unknown classes before anything is unpickled
    names = unknown_names(path)
    refused = sorted(name for name in names if not name.startswith(CONFIG_MODULE) and name != NAMESPACE)
    if refused:
        listed = printable(", ".join(refused[:3]))
        raise Refused(
            f"it holds {listed}, which is neither tensor, container nor configuration; "
            "load it where it was made, and save its state dict alone"
        )

    # Unpickle with an inert class in place of each configuration class
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in {*names, NAMESPACE}]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive(path))
    except OSError:
        raise
    except Exception as error:  # a mutilated pickle can make the unpickler raise anything
        raise Refused(unpickling_problem(error)) from None
    try:
        return to_plain(content)
    except RecursionError:
        raise Refused("something in it contains itself") from None


def unpickling_problem(error: Exception) -> str:
    """Why torch.load has refused a file, without its advice to load the file unsafely."""
    text = str(error)
    if "TorchScript" in text:
        return "it is a TorchScript module"
    if not isinstance(error, pickle.UnpicklingError):
        return one_line(error)
    found = re.search(r"GLOBAL (\S+)", text)
    if found is None:
        return "it was not written by torch.save, or is damaged"
    return f"it holds {printable(found[1])}, which is neither tensor nor plain data"


def is_archive(path: Path) -> bool:
    """Whether a file is a zip archive, as torch.save writes them since PyTorch 1.6."""
    try:
        return zipfile.is_zipfile(path)
    except (OSError, zipfile.BadZipFile):
        return False


def unknown_names(path: Path) -> list[str]:
    """Dotted names of the classes and functions in a file that torch does not know to be harmless."""
    if not is_archive(path):
        return []  # torch's older format, in which the unpickler refuses every such name
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, EOFError, IndexError, pickle.UnpicklingError) as error:
        raise Refused(f"it is not a torch.save file ({unpickling_problem(error)})") from None


def to_plain(content: object) -> object:
    """Replace `Inert` objects, at any depth of dictionaries and lists, by dictionaries of their fields."""
    if isinstance(content, Inert):
        content = getattr(content, "fields", None)
        if not isinstance(content, dict):
            raise Refused("its configuration has no fields")
    if isinstance(content, dict):
        return {key: to_plain(value) for key, value in content.items()}
    if isinstance(content, list):
        return [to_plain(value) for value in content]
    return content
