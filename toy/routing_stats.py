"""Where and when the router keeps tokens, measured on images whose object masks are known."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.streams import rng
from diffusion import create_diffusion
from sampling.generate import TrainedModel


class RoutingStats(NamedTuple):
    """Kept share of the network's own decision, before any tail dropping."""

    on_objects: float  # over cells that an object covers by at least half, all timesteps
    on_background: float
    clean: float  # over all cells at t < 300
    noisy: float  # at t > 700
    overall: float


@torch.inference_mode()
def measure_routing(
    trained: TrainedModel, images: Tensor, masks: Tensor, labels: list[int], seed: int = 0
) -> RoutingStats:
    """Noise held-out images to timesteps 50, 150, ..., 950 and look at what the router keeps.

    Args:
        images: (B, 3, H, W) uint8. masks: (B, H, W) bool, true on the object. labels: B.
    """
    config, device = trained.config, trained.device
    diffusion = create_diffusion(config.diffusion.noise_schedule, config.diffusion.diffusion_steps)
    x0, _ = trained.autoencoder.encode(images.to(device))
    labels = torch.tensor(labels, device=device)
    pixels = config.data.image_size // config.token_side  # per token and side
    cells = torch.nn.functional.avg_pool2d(masks.float()[:, None], pixels).flatten(1) >= 0.5  # (B, L)
    timesteps = [round((k + 0.5) / 10 * config.diffusion.diffusion_steps) for k in range(10)]
    kept = []
    for t in timesteps:
        noise = torch.from_numpy(rng(seed, "routing", t).standard_normal(x0.shape, dtype=np.float32)).to(
            device
        )
        steps = torch.full_like(labels, t)
        kept.append(
            trained.model(diffusion.add_noise(x0, steps, noise), steps, labels).routing.boundary.cpu()
        )
    share = torch.stack(kept).float()  # (timesteps, B, L)
    steps = torch.tensor(timesteps) * 1000 / config.diffusion.diffusion_steps
    return RoutingStats(
        on_objects=share[:, cells].mean().item(),
        on_background=share[:, ~cells].mean().item(),
        clean=share[steps < 300].mean().item(),
        noisy=share[steps > 700].mean().item(),
        overall=share.mean().item(),
    )
