"""Noise schedules and respacing, in float64."""

import math

import numpy as np


def betas(name: str, steps: int) -> np.ndarray:
    """Noise variances (steps,) float64.

    "linear": DDPM's 1e-4 ... 0.02 at 1000 steps, scaled to other lengths. "squaredcos_cap_v2": the squared
    cosine of improved DDPM (arXiv 2102.09672, equation 17), capped at 0.999.
    """
    if name == "linear":
        first = 1e-4 * 1000 / steps
        last = 0.02 * 1000 / steps
        return np.linspace(first, last, steps, dtype=np.float64)
    if name == "squaredcos_cap_v2":
        u = np.arange(steps + 1, dtype=np.float64) / steps
        angle = (u + 0.008) / 1.008 * math.pi / 2
        alpha_bar = np.cos(angle) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    raise ValueError(f"noise schedule '{name}' is not one of linear, squaredcos_cap_v2")


def respaced_timesteps(steps: int, sampling_steps: int) -> np.ndarray:
    """The original timesteps (sampling_steps,) int64 that a shorter process visits.

    They spread evenly from 0 to steps - 1. A single step visits steps - 1, where the input is pure noise.

    Raises:
        ValueError: sampling_steps is not in [1, steps].
    """
    if not 1 <= sampling_steps <= steps:
        raise ValueError(
            f"{sampling_steps} sampling steps are outside [1, {steps}], the steps of the diffusion process"
        )
    if sampling_steps == 1:
        return np.array([steps - 1])
    stride = (steps - 1) / (sampling_steps - 1)
    # Summed and not multiplied, like the spacing of the released checkpoints, to the last bit
    position = 0.0
    kept = []
    for _ in range(sampling_steps):
        kept.append(round(position))
        position += stride
    return np.array(kept)


def respaced_betas(original: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    """Betas of the process that visits only `timesteps`, with the same alpha-bar there."""
    alpha_bar = np.cumprod(1 - original)[timesteps]
    previous = np.append(1.0, alpha_bar[:-1])
    return 1 - alpha_bar / previous
