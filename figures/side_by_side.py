"""A sample at some budget beside the same sample with nothing dropped, as they come into being; for demo.py."""

import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from figures.chunking import as_map, as_pixels, boundary_overlay, dim_dropped
from processes.memory import peak_memory, reset_peak_memory
from sampling.accounting import StepCounts, image_tflop
from sampling.budgets import Budget
from sampling.denoising import decode_samples, network_timesteps, reverse_process
from sampling.generate import check_labels, warm_up
from sampling.load import TrainedModel
from sampling.options import SamplingOptions

# Small images are enlarged to about this number of pixels
PIXELS = 288

# Finished samples that are remembered
MOST_REMEMBERED = 256

# Seconds between two looks at an unfinished sample, and how often the time of a look must pass before the next
PAUSE = 0.2
PATIENCE = 4


class Choice(NamedTuple):
    """Which sample is asked for."""

    label: int
    seed: int
    guidance: float
    dropped: float  # share of the kept tokens
    uncond_dropped: float  # the same without the class: Lite-CFG


class RoutedStep(NamedTuple):
    """What the router decided in one step, in the conditional branch or the only one."""

    t: int
    prob: np.ndarray  # (rows, columns) boundary probability
    keep: np.ndarray  # (rows, columns), 1 where a token is kept


class ChunkMap(NamedTuple):
    """How the tokens were chosen at one timestep, over the sample."""

    probability: np.ndarray  # (H, W, 3) uint8, the image under the boundary probability
    kept: np.ndarray  # (H, W, 3) uint8, the image, dimmed where no token is kept
    sentence: str


class Drawn(NamedTuple):
    """A sample with its cost, or how far it has come."""

    image: np.ndarray  # (H, W, 3) uint8; unfinished: what the network expects
    steps: list[RoutedStep]  # so far
    all_steps: int  # their number when it is finished
    tflop: float
    ms: float  # of denoising
    peak_memory: int  # bytes

    @property
    def is_finished(self) -> bool:
        return len(self.steps) == self.all_steps

    @property
    def cost(self) -> str:
        kept = np.mean([step.keep.mean() for step in self.steps])
        spent = f"{self.tflop:.4g} TFLOP, {self.ms:.4g} ms, peak memory {self.peak_memory / 1e6:.0f} MB"
        return f"{spent}, {kept:.1%} of the tokens kept"

    def chunk_map(self, t: int) -> ChunkMap:
        """The map of the step next to t."""
        step = min(self.steps, key=lambda step: abs(step.t - t))
        probability = boundary_overlay(self.image, step.prob)
        keep = step.keep
        sentence = f"t = {step.t}: {keep.sum():.0f} of {keep.size} tokens kept ({keep.mean():.0%})"
        return ChunkMap(probability, dim_dropped(self.image, keep), sentence)


class View(NamedTuple):
    """All that the page shows. None: as before."""

    image: np.ndarray | None = None  # (H, W, 3) uint8, at the budget
    full_image: np.ndarray | None = None  # with nothing dropped
    cost: str | None = None
    full_cost: str | None = None
    chunk_map: ChunkMap | None = None  # at the budget
    progress: tuple[str, Drawn] | None = None  # which of the two samples is being drawn


class SideBySide:
    """Draws pairs of samples, and remembers them."""

    def __init__(
        self,
        trained: TrainedModel,
        steps: int,
        sampler: str,
        conditions: Mapping[str, ArrayLike] | None = None,
    ):
        self.trained = trained
        self.steps = steps
        self.sampler = sampler
        self.conditions = conditions
        self.remembered: dict[Choice, Drawn] = {}

    def draw(self, choice: Choice) -> Iterator[Drawn]:
        """The sample now and then while it is drawn; the last one is finished."""
        if choice in self.remembered:
            yield self.remembered[choice]
            return
        uncond = Budget.fraction(choice.uncond_dropped) if choice.guidance > 1 else None
        options = SamplingOptions(
            cfg_scale=choice.guidance,
            num_sampling_steps=self.steps,
            sampler=self.sampler,
            seed=choice.seed,
            budget=Budget.fraction(choice.dropped),
            uncond=uncond,
            conditions=self.conditions,
        )
        # Each thread of a server has caches of its own to fill, which is no cost of the sample
        warm_up(self.trained, [choice.label], options)
        for drawn in draw_sample(self.trained, choice.label, options):
            yield drawn
        if len(self.remembered) >= MOST_REMEMBERED:
            oldest = next(iter(self.remembered))
            self.remembered.pop(oldest, None)
        self.remembered[choice] = drawn

    def views(self, choice: Choice, t: int) -> Iterator[View]:
        """What to show while the two samples are drawn, and at last both, with the chunk map at t."""
        undropped = choice._replace(dropped=0.0, uncond_dropped=0.0)
        if undropped not in self.remembered:
            yield View(full_cost="not drawn yet")

        # At the budget, with the chunk map of the latest step
        for cheap in self.draw(choice):
            shown_t = t if cheap.is_finished else cheap.steps[-1].t
            yield View(
                image=cheap.image,
                cost=cheap.cost,
                chunk_map=cheap.chunk_map(shown_t),
                progress=("at the budget", cheap),
            )

        # With nothing dropped
        for full in self.draw(undropped):
            yield View(full_image=full.image, full_cost=full.cost, progress=("nothing dropped", full))

        # Both
        shares = f"{cheap.tflop / full.tflop:.0%} of the full TFLOP and {cheap.ms / full.ms:.0%} of the time"
        yield View(
            image=cheap.image,
            full_image=full.image,
            cost=f"{cheap.cost}: {shares}",
            full_cost=full.cost,
            chunk_map=cheap.chunk_map(t),
            progress=("both samples", full),
        )

    def chunk_map(self, choice: Choice, t: int) -> ChunkMap:
        """How the tokens of a sample were chosen at a timestep."""
        *_, drawn = self.draw(choice)
        return drawn.chunk_map(t)


@torch.inference_mode()
def draw_sample(trained: TrainedModel, label: int, options: SamplingOptions) -> Iterator[Drawn]:
    """The first sample of a seed, of this class, now and then while it is drawn; the last one is finished.

    Only denoising counts as time, and not what the caller does with an unfinished sample.
    """
    config = trained.config
    options.check(config)
    check_labels([label], config)
    all_steps = len(network_timesteps(config, options))
    reset_peak_memory(trained.device)
    steps: list[RoutedStep] = []
    kept: list[StepCounts] = []
    seconds = 0.0

    def drawn_so_far(image: np.ndarray) -> Drawn:
        tflop = float(image_tflop(config, kept)[0])
        peak = peak_memory(trained.device)
        return Drawn(enlarge(image), list(steps), all_steps, tflop, 1e3 * seconds, peak)

    next_look = 0.0
    started = time.perf_counter()
    for step, routing in reverse_process(trained, [0], [label], options):
        if trained.device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        seconds += now - started
        shown = routing.shown
        prob = as_map(shown.prob[0], config.token_grid)
        keep = as_map(shown.keep[0], config.token_grid)
        steps.append(RoutedStep(step.t, prob, keep))
        kept.append(routing.counts(step.t))

        # Show the sample as it is, but not so often that it takes long
        if now >= next_look and len(steps) < all_steps:
            yield drawn_so_far(as_pixels(trained.autoencoder, step.x0_hat)[0])
            looked = time.perf_counter()
            next_look = looked + max(PAUSE, PATIENCE * (looked - now))
        started = time.perf_counter()
    images = decode_samples(trained, step.x_next, [0]).cpu()
    yield drawn_so_far(images[0].permute(1, 2, 0).numpy())


def enlarge(image: np.ndarray) -> np.ndarray:
    """Repeat pixels until the longer side of the image is about PIXELS long."""
    factor = max(1, PIXELS // max(image.shape[:2]))
    return image.repeat(factor, 0).repeat(factor, 1)
