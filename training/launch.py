"""What the launcher decides: processes, device and precision, checked against the configuration."""

import os

from config import Config, validate_processes


def announced_processes() -> int:
    """Number of processes that the launcher says it starts."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_batch_size(config: Config) -> int:
    """Images of one process per micro-step; UserError where the global batch does not divide."""
    return validate_processes(config, announced_processes())


def describe_batches(config: Config) -> str:
    """Batch sizes for the number of processes that the launcher announces, for people."""
    effective = config.training.global_batch_size * config.training.gradient_accumulation_steps
    return (
        f"processes     {announced_processes()}\n"
        f"local batch   {local_batch_size(config)} of {config.training.global_batch_size}\n"
        f"effective     {effective} images per optimizer step"
    )
