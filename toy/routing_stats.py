"""Where and when the router keeps tokens, measured on images whose object masks are known."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from config import Config
from data.streams import rng
from diffusion import build_process
from sampling.generate import TrainedModel

# Timesteps at which the routing is measured, evenly spread over the process.
TIMESTEPS = 10


class RoutingStats(NamedTuple):
    """Shares of tokens that the router itself keeps, before any tail dropping."""

    on_objects: float  # over cells that an object covers by at least half, all timesteps
    on_background: float  # over the other cells, all timesteps
    clean: float  # over all cells at t < 300
    noisy: float  # over all cells at t > 700
    overall: float


def measure_routing(trained: TrainedModel, images: Tensor, masks: Tensor, labels: list[int]) -> RoutingStats:
    """Noise held-out images to timesteps 50, 150, ..., 950 (of 1000) and count what the router keeps.

    Args:
        trained: a DC-DiT with its autoencoder.
        images: (B, 3, H, W) uint8.
        masks: (B, H, W) bool, true on the object.
        labels: B class numbers.
    """
    diffusion_steps = trained.config.diffusion.diffusion_steps
    timesteps = [round((k + 0.5) / TIMESTEPS * diffusion_steps) for k in range(TIMESTEPS)]
    kept = kept_tokens(trained, images, labels, timesteps, seed=0)
    on_object = cells_on_object(masks, trained.config)
    t_of_1000 = torch.tensor(timesteps) * 1000 / diffusion_steps
    return RoutingStats(
        on_objects=kept[:, on_object].mean().item(),
        on_background=kept[:, ~on_object].mean().item(),
        clean=kept[t_of_1000 < 300].mean().item(),
        noisy=kept[t_of_1000 > 700].mean().item(),
        overall=kept.mean().item(),
    )


@torch.inference_mode()
def kept_tokens(
    trained: TrainedModel, images: Tensor, labels: list[int], timesteps: list[int], seed: int
) -> Tensor:
    """What the router keeps of every image at every timestep: (timesteps, B, L) float, 0 or 1."""
    diffusion = build_process(**trained.config.process)
    x0, _ = trained.autoencoder.encode(images.to(trained.device))
    classes = torch.tensor(labels, device=trained.device)
    kept = []
    for timestep in timesteps:
        draw = rng(seed, "routing", timestep)
        noise = torch.from_numpy(draw.standard_normal(x0.shape, dtype=np.float32)).to(trained.device)
        t = torch.full_like(classes, timestep)
        x_t = diffusion.add_noise(x0, t, noise)
        routing = trained.model(x_t, t, classes).routing
        kept.append(routing.boundary.cpu())
    return torch.stack(kept).float()


def cells_on_object(masks: Tensor, config: Config) -> Tensor:
    """Token cells that an object covers by at least half: (B, H, W) bool -> (B, L) bool."""
    pixels_per_token = config.data.image_grid.rows // config.token_grid.rows
    coverage = F.avg_pool2d(masks.float()[:, None], pixels_per_token)
    return coverage.flatten(1) >= 0.5
