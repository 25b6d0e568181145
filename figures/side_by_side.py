"""A sample at some budget beside the same sample with nothing dropped, each with its cost; for demo.py."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torch import Tensor

from diffusion.samplers import Step
from figures.chunking import as_map, boundary_overlay
from models.types import Routing
from sampling.accounting import image_tflop
from sampling.budgets import Budget
from sampling.generate import generate, warm_up
from sampling.load import TrainedModel
from sampling.options import SamplingOptions, possible_scale

# Small images are enlarged to about this number of pixels
PIXELS = 288


class Drawn(NamedTuple):
    """One sample with its cost."""

    image: np.ndarray  # (H, W, 3) uint8
    boundaries: np.ndarray  # (H, W, 3) uint8, the image under the boundary probability of the last step
    tflop: float
    kept: float  # share of the tokens, mean over steps of the conditional branch or the only one
    ms: float  # of denoising
    peak_memory: int  # bytes

    @property
    def cost(self) -> str:
        spent = f"{self.tflop:.4g} TFLOP, {self.ms:.4g} ms, peak memory {self.peak_memory / 1e6:.0f} MB"
        return f"{spent}, {self.kept:.1%} of the tokens kept"


class Pair(NamedTuple):
    """A sample at two budgets: three pictures (H, W, 3) uint8, and a sentence about each cost."""

    image: np.ndarray
    boundaries: np.ndarray
    full_image: np.ndarray
    cost: str
    full_cost: str


def side_by_side(trained: TrainedModel, steps: int, sampler: str) -> Callable[[int, int, float, float], Pair]:
    """A function (label, seed, guidance scale, dropped fraction) -> Pair; it remembers what it has drawn."""
    scale = possible_scale(1.0, trained.config)
    warm_up(trained, [0], SamplingOptions(cfg_scale=scale, sampler=sampler))

    @functools.lru_cache(maxsize=256)
    def draw(label: int, seed: int, guidance: float, dropped: float) -> Drawn:
        options = SamplingOptions(
            cfg_scale=guidance,
            num_sampling_steps=steps,
            sampler=sampler,
            seed=seed,
            budget=Budget.fraction(dropped),
        )
        return draw_sample(trained, label, options)

    def draw_pair(label: int, seed: int, guidance: float, dropped: float) -> Pair:
        cheap = draw(label, seed, guidance, dropped)
        full = draw(label, seed, guidance, 0.0)
        shares = f"{cheap.tflop / full.tflop:.0%} of the full TFLOP and {cheap.ms / full.ms:.0%} of the time"
        cost = f"{cheap.cost}: {shares}"
        return Pair(cheap.image, cheap.boundaries, full.image, cost, full.cost)

    return draw_pair


def draw_sample(trained: TrainedModel, label: int, options: SamplingOptions) -> Drawn:
    """The first sample of a seed, of this class."""
    probabilities: list[Tensor] = []

    def on_step(step: Step, routing: Routing) -> None:
        probabilities.append(routing.prob[0])

    (batch,) = generate(trained, [0], [label], options, on_step=on_step)
    image = enlarge(batch.images[0].permute(1, 2, 0).numpy())
    boundaries = boundary_overlay(image, as_map(probabilities[-1], trained.config.token_grid))
    tflop = float(image_tflop(trained.config, batch.kept)[0])
    counts = [step.shown.item() for step in batch.kept]
    kept = float(np.mean(counts)) / trained.config.tokens
    return Drawn(image, boundaries, tflop, kept, batch.ms_per_image, batch.peak_memory)


def enlarge(image: np.ndarray) -> np.ndarray:
    """Repeat pixels until the longer side of the image is about PIXELS long."""
    factor = max(1, PIXELS // max(image.shape[:2]))
    return image.repeat(factor, 0).repeat(factor, 1)
