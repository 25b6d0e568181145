"""Pictures of the chunking: what the network saw, how it scored, and what it kept, from noise to image."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from data.autoencoder import Autoencoder, to_levels
from diffusion.samplers import Step
from figures.canvas import SMALL, save_figure
from grid import Grid
from models.types import Routing

ROWS = ("noisy input", "boundary probability", "kept tokens")
# Samples in the picture of all timesteps, and in that of few
DETAILED = 2
SHOWN = 8


class TracedStep(NamedTuple):
    """What a column of the picture shows of the first samples of a batch."""

    t: int
    x_t: Tensor  # (B, C, S, S), the input of the network
    x0_hat: Tensor  # (B, C, S, S), the clean latent that its prediction implies
    prob: Tensor  # (B, L) boundary probability
    keep: Tensor  # (B, L) bool


class Trace:
    """Records some steps of the first samples; pass `record` to sampling.generate.

    Args:
        steps: all steps of the sampler.
        columns: steps to record at most, evenly spread and including both ends.
        samples: number of samples to record out of the batch.
    """

    def __init__(self, steps: int, columns: int = 8, samples: int = SHOWN):
        columns = min(columns, steps)
        intervals = max(columns - 1, 1)
        self.wanted = {round(k * (steps - 1) / intervals) for k in range(columns)}
        self.samples = samples
        self.steps: list[TracedStep] = []

    def record(self, step: Step, routing: Routing) -> None:
        """Keep this step if it is one of the wanted ones."""
        if step.i not in self.wanted:
            return
        first = slice(self.samples)
        traced = TracedStep(
            step.t, step.x_t[first], step.x0_hat[first], routing.prob[first], routing.keep[first]
        )
        self.steps.append(traced)


@rc_context(SMALL)
def draw_chunking(trace: Trace, autoencoder: Autoencoder, tokens: Grid, path: Path) -> None:
    """Three rows for each of the first samples (ROWS), a column per timestep, the kept share under each column.

    Args:
        tokens: rows and columns of the tokens.
    """
    columns = len(trace.steps)
    samples = min(len(trace.steps[0].x_t), DETAILED)
    # A panel with its title is 1.35 wide and, of a square image, 1.5 high
    height = 0.15 + 1.35 * tokens.rows / tokens.columns
    size = (1.35 * columns + 0.4, len(ROWS) * height * samples)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    grid = figure.subplots(len(ROWS) * samples, columns, squeeze=False)
    for column, step in enumerate(trace.steps):
        inputs = as_pixels(autoencoder, step.x_t[:samples])
        estimates = as_pixels(autoencoder, step.x0_hat[:samples])
        for sample in range(samples):
            first_row = len(ROWS) * sample
            panels = grid[first_row : first_row + len(ROWS), column]
            prob = as_map(step.prob[sample], tokens)
            keep = as_map(step.keep[sample], tokens)
            draw_column(panels, step.t, inputs[sample], estimates[sample], prob, keep)

    name_rows(grid, ROWS * samples, tokens)
    save_figure(figure, path)


@rc_context(SMALL)
def draw_chunk_maps(trace: Trace, images: np.ndarray, tokens: Grid, path: Path) -> None:
    """The recorded samples, a column each, and which tokens were kept at the first, a middle and the last step.

    Args:
        images: (B, H, W, 3) uint8, the samples.
        tokens: rows and columns of the tokens.
    """
    last = len(trace.steps) - 1
    steps = [trace.steps[i] for i in sorted({0, last // 2, last})]
    samples = len(steps[0].keep)
    height = 0.15 + 1.2 * tokens.rows / tokens.columns
    size = (1.2 * samples + 0.4, height * (1 + len(steps)))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    draw_maps(figure.subplots(1 + len(steps), samples, squeeze=False), steps, images, tokens)
    save_figure(figure, path)


def draw_maps(panels: np.ndarray, steps: Sequence[TracedStep], images: np.ndarray, tokens: Grid) -> None:
    """A row of samples, and a row per step of the tokens that were kept for each of them.

    Args:
        panels: (1 + steps, samples) axes. images: (B, H, W, 3) uint8. tokens: their rows and columns.
    """
    for column, image in enumerate(images[: panels.shape[1]]):
        panels[0, column].imshow(image)
        for panel, step in zip(panels[1:, column], steps, strict=True):
            keep = as_map(step.keep[column], tokens)
            panel.imshow(dim_dropped(image, keep))
            panel.set_xlabel(f"{keep.mean():.0%} kept")
    name_rows(panels, ("sample", *(f"t = {step.t}" for step in steps)), tokens)


def name_rows(grid: np.ndarray, names: Sequence[str], tokens: Grid) -> None:
    """Names at the left of the rows of panels, and no ticks anywhere."""
    for panels, name in zip(grid, names, strict=True):
        # Panels of wide images are too short for a name in one line
        panels[0].set_ylabel(name if tokens.rows >= tokens.columns else name.replace(" ", "\n"))
    for panel in grid.flat:
        panel.set_xticks([])
        panel.set_yticks([])


def draw_column(
    panels: np.ndarray, t: int, noisy: np.ndarray, estimate: np.ndarray, prob: np.ndarray, keep: np.ndarray
) -> None:
    """The three panels of one sample at one timestep.

    Args:
        noisy, estimate: images (H, W, 3) uint8. prob, keep: (rows, columns) of the tokens.
    """
    top: Axes
    middle: Axes
    bottom: Axes
    top, middle, bottom = panels
    top.imshow(noisy)
    top.set_title(f"t = {t}")
    middle.imshow(prob, cmap="magma", vmin=0, vmax=1)
    bottom.imshow(dim_dropped(estimate, keep))
    bottom.set_xlabel(f"{keep.mean():.0%} kept")


def as_pixels(autoencoder: Autoencoder, latents: Tensor) -> np.ndarray:
    """(B, C, S, S) -> (B, H, W, 3) uint8.

    What the network saw on the way may be far from any image; the picture of it may not fail.
    """
    pixels = autoencoder.decode_pixels(latents).nan_to_num()
    return to_levels(pixels).permute(0, 2, 3, 1).cpu().numpy()


def as_map(values: Tensor, tokens: Grid) -> np.ndarray:
    """(L,) -> (rows, columns) float32."""
    return values.float().view(*tokens).cpu().numpy()


def enlarge(cells: np.ndarray, height: int) -> np.ndarray:
    """(rows, columns) -> (height, width), each cell as a square."""
    stride = height // len(cells)
    return cells.repeat(stride, 0).repeat(stride, 1)


def dim_dropped(image: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The image (H, W, 3), dimmed towards white where no token is kept (rows, columns)."""
    mask = enlarge(keep, len(image))[:, :, None]
    opacity = 0.25 + 0.75 * mask
    white = 255 * 0.75 * (1 - mask)
    return (image * opacity + white).astype("uint8")


def boundary_overlay(image: np.ndarray, prob: np.ndarray) -> np.ndarray:
    """The boundary probability (rows, columns) in colour over a grey image (H, W, 3): (H, W, 3) uint8."""
    colour = 255 * colormaps["magma"](enlarge(prob, len(image)))[:, :, :3]
    grey = image.mean(2, keepdims=True)
    return (0.5 * grey + 0.5 * colour).astype("uint8")
