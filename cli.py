"""What every command line shares: one parser, shared options, and one-line errors with exit status 2."""

import argparse
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from config import OneProcessError, UserError

# Faults of the disk, which are not faults of the program.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line, like all others; options must be written out in full."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def run(main: Callable[[], None]) -> None:
    """Call `main`; a UserError becomes one line on stderr and exit status 2; a full disk, status 1.

    The first process of a machine prints what all have in common; a OneProcessError is printed by the process that has it.
    """
    try:
        main()
    except UserError as error:
        if isinstance(error, OneProcessError) or int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f"'{error.filename}': " if error.filename else ""
        sys.exit(
            f"error: {where}{error.strerror}; what is complete stays: make room and run the same command again"
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def add_config_arguments(parser: Parser) -> None:
    """--config, --set and --dry-run."""
    parser.add_argument("--config", help="YAML file, e.g. configs/DCDiT-B-N4.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key; repeatable"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() == "true"


def check_output(option: str, folder: Path | str) -> None:
    """UserError unless files can be written into this folder, which need not exist yet."""
    existing = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(
            f"{option} '{folder}': '{existing}' is not a folder that can be written to; give another"
        )


def check_output_file(option: str, file: Path) -> None:
    """UserError unless this file can be written; its folder need not exist yet."""
    if file.is_dir():
        raise UserError(f"{option} '{file}': is a folder; give a file")
    check_output(option, file.parent)


def check_at_least(args: argparse.Namespace, least: int, *names: str) -> None:
    """UserError unless the options of these attribute names are at least `least`."""
    for name in names:
        value = getattr(args, name)
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
