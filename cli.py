"""What all command lines share: a parser, common options, and errors of one line with an exit status."""

import argparse
import difflib
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from config import OneProcessError, UserError

# Faults of the disk, which are not faults of the program.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
# oneDNN keeps code for every shape of a product that it has met, 1024 of them by default, and the number of kept
# tokens differs in almost every step. A step of training needs about a hundred.
ONEDNN_PRIMITIVES = "256"


class Parser(argparse.ArgumentParser):
    """A parser that reports mistakes as a UserError. Options must be written out in full."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As in argparse; a UserError for an unknown option suggests the most similar one."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if not unknown:
            return parsed
        message = f"unrecognized arguments: {' '.join(unknown)}"
        name = unknown[0].partition("=")[0]
        similar = difflib.get_close_matches(name, self._option_string_actions, n=1)
        if similar and name.startswith("-"):
            message += f"; perhaps {similar[0]} is meant"
        self.error(message)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def run(main: Callable[[], None]) -> None:
    """Call `main`. A UserError becomes one line on stderr and status 2.

    A full disk, and samples that are not finite, are one line and status 1.

    The first process of each machine prints errors that all processes have. A process that has a
    OneProcessError prints it itself.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names may have characters that the terminal lacks, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    # Before the first product, when oneDNN reads it
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", ONEDNN_PRIMITIVES)
    try:
        main()
    except UserError as error:
        is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if is_first or isinstance(error, OneProcessError):
            # The names that a message quotes may hold line breaks
            line = str(error).replace("\n", r"\n")
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        file = f"'{error.filename}': " if error.filename else ""
        remedy = "complete files stay: make room and run the same command again"
        sys.exit(f"error: {file}{error.strerror}; {remedy}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------- options


def add_config_arguments(parser: Parser) -> None:
    """Add --config, --set and --dry-run."""
    parser.add_argument("--config", help="YAML file, e.g. configs/DCDiT-B-N4.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key; repeatable"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")


def add_tf32_argument(parser: Parser) -> None:
    """Add --tf32, a --set of its key; for scripts that compute what --set describes."""
    parser.add_argument(
        "--tf32",
        dest="set",
        action="append_const",
        default=[],
        const="training.tf32=true",
        help="products in float32 may run as TF32; the same as --set training.tf32=true",
    )


def boolean(text: str) -> bool:
    """The type of an option whose value is true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() == "true"


def option_name(attribute: str) -> str:
    """Attribute of the parsed arguments -> option on the command line: "batch_size" -> "--batch-size"."""
    return f"--{attribute.replace('_', '-')}"


# -------------------------------------------------------------------------------------------------- checks


def check_at_least(args: argparse.Namespace, least: float, *attributes: str) -> None:
    """UserError unless the options with these attributes are at least `least`."""
    for attribute in attributes:
        value = getattr(args, attribute)
        if value < least:
            raise UserError(f"{option_name(attribute)} {value}: must be at least {least}")


def check_output(option: str, folder: Path | str) -> None:
    """UserError unless files can be written into this folder, which may not exist yet."""
    candidates = (Path(folder), *Path(folder).absolute().parents)
    existing = next(path for path in candidates if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(
            f"{option} '{folder}': '{existing}' is not a folder that can be written to; give another"
        )


def check_output_file(option: str, file: Path) -> None:
    """UserError unless this file can be written. Its folder may not exist yet."""
    if file.is_dir():
        raise UserError(f"{option} '{file}': is a folder; give a file")
    check_output(option, file.parent)
