"""What every command line shares: one-line errors with exit status 2, and the process group of torchrun."""

import argparse
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist

from config import Config, OneProcessError, UserError, to_yaml, validate_processes

T = TypeVar("T")
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
)  # the disk's fault, not the program's


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line, like all others; options must be written out in full."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def follow_launcher() -> None:
    """End with the torchrun that started this process, if one did: SIGTERM to itself, and the end 30 s later.

    A launcher that is killed leaves its processes behind, and these would compete with the run that follows.
    """
    launcher = os.getppid()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        print("error: the launcher is gone; run the same command again to go on", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def on_first(function: Callable[[], T]) -> T:
    """Call on the first process; its result or its UserError is everyone's. Collective where there are several processes."""
    outcome: list = [None]
    if int(os.environ.get("RANK", 0)) == 0:
        try:
            outcome = [function()]
        except UserError as error:
            outcome = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


class Processes(NamedTuple):
    """This process among those that torchrun started (or alone)."""

    rank: int
    world: int
    device: torch.device


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


def default_device(local_rank: int = 0) -> torch.device:
    """CUDA where there is one, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def allow_tf32(config: Config) -> None:
    """TF32 for products in float32 (under autocast: router, residual projection, dechunk) where the configuration asks for it.

    A setting of the whole process: PyTorch reads it when the backward pass runs, too.
    """
    asked = config.model.hnet.fp32_router_dechunk == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = asked


def start_processes() -> Processes:
    """Join the process group that torchrun describes (NCCL on CUDA, else gloo); without torchrun, be the only process."""
    follow_launcher()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = default_device(int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, timeout=timedelta(days=1)
        )  # a slow process is not a dead one; torchrun ends those
    return Processes(rank, world, device)


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


def validate_world(config: Config) -> int:
    """Check the batch sizes against the number of processes that the launcher announces; return the local batch size."""
    return validate_processes(config, int(os.environ.get("WORLD_SIZE", 1)))


def describe(config: Config) -> str:
    """The resolved configuration, parameters and tokens."""
    from models import build_model  # here, because scripts without a model need not wait for this import

    with torch.device("meta"):
        model = build_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = f"{config.tokens} per image ({config.token_side} x {config.token_side})"
    return f"{to_yaml(config)}\nparameters    {parameters:,}\ntokens        {tokens}"


def describe_batches(config: Config) -> str:
    """Batch sizes for the number of processes that the launcher announces."""
    local, world = validate_world(config), int(os.environ.get("WORLD_SIZE", 1))
    effective = config.training.global_batch_size * config.training.gradient_accumulation_steps
    return (
        f"processes     {world}\n"
        f"local batch   {local} of {config.training.global_batch_size}\n"
        f"effective     {effective} images per optimizer step"
    )


def print_once(text: str) -> None:
    """Print from the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text)


def flatten(nested: dict, where: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}, lists as text: what experiment trackers take."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{where}{key}."))
        else:
            flat[where + key] = str(value) if isinstance(value, list) else value
    return flat
