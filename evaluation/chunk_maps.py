"""Pictures of the chunking: what the network saw, how it scored, and what it kept, from noise to image."""

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from data.autoencoder import Autoencoder
from data.files import write_file
from diffusion.samplers import Step
from evaluation.generate import Kept
from models.types import Routing

matplotlib.rcParams["font.size"] = 8
ROWS = ("noisy input", "boundary probability", "kept tokens")


class Trace:
    """Remembers some steps of the first samples; pass `observe` to evaluation.generate.

    Args:
        steps: all steps of the sampler; `columns` of them, evenly spread and with both ends, are remembered.
        samples: how many samples of the batch.
    """

    def __init__(self, steps: int, columns: int = 8, samples: int = 2):
        self.wanted = {round(k * (steps - 1) / max(columns - 1, 1)) for k in range(min(columns, steps))}
        self.samples = samples
        self.seen: list[tuple[Step, Routing]] = []

    def observe(self, step: Step, routing: Routing) -> None:
        if step.i in self.wanted:
            latents = {name: getattr(step, name)[: self.samples] for name in ("x_t", "x0_hat", "x_next")}
            self.seen.append((step._replace(**latents), Routing(*(x[: self.samples] for x in routing))))


def draw_chunking(trace: Trace, autoencoder: Autoencoder, path: Path) -> None:
    """For each remembered sample three rows (ROWS), a column per timestep, and the kept share under each column."""
    columns, samples = len(trace.seen), len(trace.seen[0][0].x_t)
    figure = Figure(figsize=(1.35 * columns + 0.4, 4.5 * samples), dpi=120, layout="constrained")
    axes = figure.subplots(3 * samples, columns, squeeze=False)
    for column, (step, routing) in enumerate(trace.seen):
        inputs, estimates = as_pixels(autoencoder, step.x_t), as_pixels(autoencoder, step.x0_hat)
        for sample in range(samples):
            prob, keep = (as_map(x[sample]) for x in (routing.prob, routing.keep))
            top, middle, bottom = (axes[3 * sample + row][column] for row in range(3))
            top.imshow(inputs[sample])
            top.set_title(f"t = {step.t}")
            middle.imshow(prob, cmap="magma", vmin=0, vmax=1)
            bottom.imshow(overlay(estimates[sample], keep))
            bottom.set_xlabel(f"{keep.mean():.0%} kept")
    for row, line in enumerate(axes):
        line[0].set_ylabel(ROWS[row % 3])
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
    save_figure(figure, path)


def as_pixels(autoencoder: Autoencoder, latents: Tensor):
    """(B, C, S, S) -> (B, H, W, 3) uint8 array."""
    return autoencoder.decode(latents).permute(0, 2, 3, 1).cpu().numpy()


def as_map(values: Tensor):
    """(L,) -> (S, S) float array."""
    side = int(len(values) ** 0.5)
    return values.float().view(side, side).cpu().numpy()


def overlay(image, keep):
    """The image where tokens are kept, dimmed to a quarter of its contrast towards white elsewhere."""
    stride = len(image) // len(keep)
    mask = keep.repeat(stride, 0).repeat(stride, 1)[:, :, None]
    return (image * (0.25 + 0.75 * mask) + 255 * 0.75 * (1 - mask)).astype("uint8")


def draw_summary(kept: list[list[Kept]], tokens: int, path: Path) -> None:
    """Kept share against the timestep: mean over samples, with one standard deviation and the extremes.

    Args:
        kept: the record of each batch.
        tokens: L, all tokens of an image.
    """
    figure = Figure(figsize=(5, 3), dpi=120, layout="constrained")
    axis = figure.subplots()
    t = [step.t for step in kept[0]]
    branches = {"conditional": "tab:blue", "unconditional": "tab:orange"}
    for branch, colour in branches.items():
        if getattr(kept[0][0], branch) is None:
            continue
        counts = torch.cat([torch.stack([getattr(step, branch) for step in batch], dim=1) for batch in kept])
        share = counts.float().cpu() / tokens  # (samples, steps)
        mean, std = share.mean(0), share.std(0, correction=0)
        axis.plot(t, mean, color=colour, label=branch)
        axis.fill_between(t, mean - std, mean + std, color=colour, alpha=0.25, linewidth=0)
        axis.plot(t, share.amin(0), color=colour, linewidth=0.5, linestyle=":")
        axis.plot(t, share.amax(0), color=colour, linewidth=0.5, linestyle=":")
    axis.set_xlim(max(t), 0)
    axis.set_ylim(0, None)
    axis.set_xlabel("timestep t (noise at the left, image at the right)")
    axis.set_ylabel("share of tokens kept")
    axis.legend(title="mean, std, min and max over samples", fontsize=7, title_fontsize=7)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda stream: figure.savefig(stream, format="png"))
