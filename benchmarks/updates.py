"""What follows the backward pass: optimizer, EMA and checkpoint, each in several ways."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timm.utils import ModelEmaV3

from benchmarks.meters import medians
from benchmarks.report import Row
from benchmarks.step_functions import EMA_DECAY
from benchmarks.workload import Setup, load
from config import to_dict
from models import build_model
from weights.checkpoint import Checkpoint, save_checkpoint


def measure_updates(name: str, setup: Setup) -> list[Row]:
    """Milliseconds of one optimizer step, one EMA update and one checkpoint."""
    config = load(name)
    with setup.device:
        model = build_model(config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3

    # Optimizers and averages
    loop = torch.optim.AdamW(model.parameters(), foreach=False)
    foreach = torch.optim.AdamW(model.parameters(), foreach=True)
    fused = torch.optim.AdamW(model.parameters(), fused=True)
    ema_loop = ModelEmaV3(model, decay=EMA_DECAY, foreach=False)
    ema_foreach = ModelEmaV3(model, decay=EMA_DECAY)
    functions: dict[str, Callable[[], object]] = {
        "AdamW loop": loop.step,
        "AdamW foreach": foreach.step,
        "AdamW fused": fused.step,
        "EMA loop": lambda: ema_loop.update(model),
        "EMA foreach": lambda: ema_foreach.update(model),
    }
    times = medians(functions, setup.device, setup.seconds)

    # A checkpoint
    state: Checkpoint = {
        "step": 1,
        "config": to_dict(config),
        "model": model.state_dict(),
        "ema": ema_foreach.module.state_dict(),
        "optimizer": fused.state_dict(),
    }
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = save_checkpoint(Path(folder), state, keep=0)
        seconds = time.perf_counter() - start
        megabytes = path.stat().st_size / 1e6
    times[f"checkpoint of {megabytes:.0f} MB"] = seconds
    return [{"model": name, "what": what, "ms": value * 1e3} for what, value in times.items()]
