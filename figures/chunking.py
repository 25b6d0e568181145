"""Pictures of the chunking: what the network saw, how it scored, and what it kept, from noise to image."""

from pathlib import Path

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from torch import Tensor

from data.autoencoder import Autoencoder
from diffusion.samplers import Step
from figures.cost import SMALL, save_figure
from models.types import Routing

ROWS = ("noisy input", "boundary probability", "kept tokens")


class Trace:
    """Remembers some steps of the first samples; pass `observe` to sampling.generate.

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


@rc_context(SMALL)
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


def boundary_overlay(image, prob):
    """The boundary probability (S, S) in colour over a grey version of the image (H, W, 3): (H, W, 3) uint8."""
    stride = len(image) // len(prob)
    colour = 255 * colormaps["magma"](prob.repeat(stride, 0).repeat(stride, 1))[:, :, :3]
    return (0.5 * image.mean(2, keepdims=True) + 0.5 * colour).astype("uint8")
