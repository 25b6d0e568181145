"""What all command lines share: a parser, common options, and errors of one line with an exit status."""

import argparse
import difflib
import errno
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from config import Config, OneProcessError, TrainingConfig, UserError, one_line
from grid import Grid
from schema import leaves

# All keys of the configuration, as `section.key`
KEYS = [leaf.name for leaf in leaves(Config)]
# Keys that are true or false
SWITCHES = [leaf.name for leaf in leaves(Config) if leaf.hint is bool]
# The keys by their own and their last name, and by what other training programs call them
OTHER_KEYS = {key.rpartition(".")[2]: key for key in KEYS}
OTHER_KEYS |= {name: f"training.{key}" for name, key in TrainingConfig.OTHER_NAMES.items()}
OTHER_KEYS["data_path"] = "data.feature_path"
OTHER_KEYS["train_batch_size"] = "training.global_batch_size"
OTHER_KEYS["num_train_epochs"] = "training.epochs"
OTHER_KEYS |= {key: key for key in KEYS}
# What DiT, fast-DiT and diffusers call an option -> its names here; a program has at most one of them
OTHER_OPTIONS = {
    "allow_tf32": ["--tf32"],
    "batch_size": ["--per-proc-batch-size"],
    "checkpoint": ["--ckpt"],
    "ckpt_path": ["--ckpt"],
    "data_dir": ["--data-path"],
    "global_seed": ["--seed"],
    "guidance_scale": ["--cfg-scale"],
    "model_path": ["--ckpt"],
    "num_samples": ["--num-fid-samples"],
    "sample_dir": ["--output-dir", "--output"],
}
# Options of accelerate launch and torchrun, which are often placed after the script
LAUNCHER_OPTIONS = (
    "mixed_precision",
    "multi_gpu",
    "gpu_ids",
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_port",
    "nproc_per_node",
    "standalone",
)

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
        """As in argparse, but unknown options are reported first, with what is probably meant."""
        arguments = list(sys.argv[1:] if args is None else args)
        try:
            parsed, extra = self.parse_known_args(arguments, namespace)
        except UserError:
            # The mistyped option may be the one that is missing
            self._refuse_unknown_options(arguments)
            raise
        self._refuse_unknown_options(arguments)
        if extra:
            self.error(f"unrecognized arguments: {' '.join(extra)}{self._remedy_of_extra(extra[0])}")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def _refuse_unknown_options(self, arguments: Sequence[str]) -> None:
        """UserError for arguments that look like options of this program and are none."""
        mistakes = []
        for place, argument in enumerate(arguments):
            if argument == "--":
                break
            name, _, value = argument.partition("=")
            if not re.fullmatch(r"--?[A-Za-z][^ ]*", name) or name in self._option_string_actions:
                continue
            if value == "" and place + 1 < len(arguments) and not arguments[place + 1].startswith("-"):
                value = arguments[place + 1]
            mistakes.append(f"unknown option {name}{self._remedy(name, value)}")
        if mistakes:
            self.error("; ".join(mistakes))

    def _remedy(self, name: str, value: str) -> str:
        """What an unknown option probably means, to follow its name in an error line."""
        word = name.lstrip("-").lower().replace("-", "_")
        options = {option.lstrip("-").replace("-", "_"): option for option in self._option_string_actions}
        # The same option with other hyphens
        if word in options:
            return f"; did you mean {options[word]}?"
        if word in LAUNCHER_OPTIONS:
            return "; it belongs to the launcher, before the name of the script"
        # An option of other programs, or a key of the configuration
        takes_keys = "set" in options
        remedy = self._remedy_of_other_name(word) or self._remedy_of_opposite(word, options)
        if not remedy and takes_keys:
            remedy = remedy_of_key(word, value)
        if remedy:
            return remedy
        longer = [option for option in options if set(word.split("_")) <= set(option.split("_"))]
        longer.sort(key=lambda option: (not option.startswith(word), len(option)))
        # A typing error, or some words of a longer name
        similar = difflib.get_close_matches(word, options, n=1, cutoff=0.8)
        likely = [*similar, *longer, *difflib.get_close_matches(word, options, n=1)]
        if likely:
            return f"; did you mean {options[likely[0]]}?"
        if takes_keys and (similar := difflib.get_close_matches(word, OTHER_KEYS, n=1, cutoff=0.7)):
            return f"; did you mean --set {OTHER_KEYS[similar[0]]}={value or '...'}?"
        return ""

    def _remedy_of_other_name(self, word: str) -> str:
        """The option of this program that other programs call by this name."""
        for option in OTHER_OPTIONS.get(word, []):
            if option in self._option_string_actions:
                return f"; did you mean {option}?"
        return ""

    def _remedy_of_opposite(self, word: str, options: dict[str, str]) -> str:
        """For --no-tf32 or --visualize, whose opposites are switches of this program."""
        negated = word.removeprefix("no_") if word.startswith("no_") else f"no_{word}"
        opposite = options.get(negated)
        if opposite is None or self._option_string_actions[opposite].nargs != 0:
            return ""
        return f"; it is the default, so leave it out ({opposite} is the opposite)"

    def _remedy_of_extra(self, argument: str) -> str:
        """What a value without an option probably means, such as training.seed=1."""
        is_key = argument.partition("=")[0] in KEYS and "--set" in self._option_string_actions
        return f"; did you mean --set {argument}?" if is_key else ""


def remedy_of_key(word: str, value: str) -> str:
    """What an option that is none means for a program with --set."""
    if word == "model":
        return "; the network comes from --config in training, and from --ckpt in sampling"
    if word == "ckpt" or "--ckpt" in OTHER_OPTIONS.get(word, []):
        return f"; training starts from a checkpoint with --set training.init_from={value or '...'}"
    if word in ("wandb", "report_to"):
        return "; did you mean --set logging.trackers=[wandb]?"
    if word not in OTHER_KEYS:
        return ""
    key = OTHER_KEYS[word]
    default = "true" if key in SWITCHES else "..."
    return f"; did you mean --set {key}={value or default}?"


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
        if is_first_of_machine() or isinstance(error, OneProcessError):
            # The names that a message quotes may hold line breaks
            line = str(error).replace("\n", r"\n")
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        if is_first_of_machine():
            print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)  # the status that shells give to a process ended by this signal
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        file = f"'{error.filename}': " if error.filename else ""
        remedy = "complete files stay: make room and run the same command again"
        sys.exit(f"error: {file}{error.strerror}; {remedy}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def is_first_of_machine() -> bool:
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


# ------------------------------------------------------------------------------------------------- options


class ImportModule(argparse.Action):
    """Imports a module, also from the current folder. Nothing but the command line can name one."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(values)
        except ImportError as error:
            raise UserError(
                f"--import {values}: {one_line(error)}; give a module of an installed package or of this folder"
            ) from None


def add_config_arguments(parser: Parser) -> None:
    """Add --config, --set, --import and --dry-run."""
    parser.add_argument("--config", help="YAML file, e.g. configs/DCDiT-B-N4.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key; repeatable"
    )
    add_import_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")


def add_import_argument(parser: Parser) -> None:
    """Add --import; for all scripts that read a configuration or a checkpoint."""
    parser.add_argument(
        "--import",
        action=ImportModule,
        metavar="MODULE",
        help="import a module of yours first, which registers a router, an objective, a condition, a loss term "
        "or an average",
    )


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


def add_measuring_tf32_argument(parser: Parser) -> None:
    """Add --tf32 as a switch; for scripts that have no --set and measure images."""
    parser.add_argument(
        "--tf32", action="store_true", help="products in float32 may run as TF32, those of the features too"
    )


def add_image_size_argument(parser: Parser, meaning: str, default: list[int] | None = None) -> None:
    """Add --image-size, which `image_size` reads."""
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        default=default,
        metavar="PIXELS",
        help=f"side of a square, or height and width, of {meaning}",
    )


def image_size(args: argparse.Namespace) -> Grid:
    """The value of --image-size as rows and columns; UserError unless it is one or two whole numbers above 0."""
    sides: list[int] = args.image_size
    if len(sides) > 2 or min(sides) < 1:
        given = " ".join(map(str, sides))
        raise UserError(
            f"--image-size {given}: give one number of pixels, or height and width, above 0; try 256"
        )
    return Grid.of(sides if len(sides) == 2 else sides[0])


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


def check_seed(args: argparse.Namespace, attribute: str = "seed") -> None:
    """UserError unless the option with this attribute is a seed that random streams take."""
    seed = getattr(args, attribute)
    if not 0 <= seed < 2**63:
        raise UserError(f"{option_name(attribute)} {seed}: must be 0 or greater, and below 2**63")


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
