"""What every command line shares: one-line errors with exit status 2, and the process group of torchrun."""

import argparse
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist

from config import Config, UserError, to_yaml, validate_processes


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line, like all others; options must be written out in full."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


class Processes(NamedTuple):
    """This process among those that torchrun started (or alone)."""

    rank: int
    world: int
    device: torch.device


def run(main: Callable[[], None]) -> None:
    """Call `main`; a UserError becomes one line on stderr (once per machine) and exit status 2."""
    try:
        main()
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
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
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = default_device(int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # a slow process is not a dead one; torchrun ends those
    return Processes(rank, world, device)


def add_config_arguments(parser: Parser) -> None:
    """--config, --set and --dry-run."""
    parser.add_argument("--config", help="YAML file, e.g. configs/DCDiT-B-N4.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return text.lower() == "true"


def check_output(option: str, folder: Path | str) -> None:
    """UserError unless files can be written into this folder, which need not exist yet."""
    existing = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{option} '{folder}': '{existing}' is not a folder that can be written to; give another")


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
