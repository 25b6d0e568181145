"""Samplers as generators: each yields one Step per evaluation of the network and ends with the sample in `x_next`.

`denoise(x_t, t)` is any function from noised latents (B, C, S, S) and original timesteps (B,) to a
prediction. Guidance and recording wrap it from outside. The timesteps are on the host, where reading them
does not wait for the device.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.gaussian import Entries, GaussianDiffusion

Denoise = Callable[[Tensor, Tensor], Tensor]


class Step(NamedTuple):
    """One reverse step."""

    i: int  # evaluation of the network, counting down to 0
    t: int  # the original timestep that the network saw
    x_t: Tensor  # (B, C, S, S), the input of the network
    x0_hat: Tensor  # (B, C, S, S), the x_0 it implies
    x_next: Tensor  # (B, C, S, S), the result of the step; the sample after the last one


def ddpm(
    diffusion: GaussianDiffusion, denoise: Denoise, x: Tensor, noise: Callable[[], Tensor]
) -> Iterator[Step]:
    """Ancestral sampling (DDPM, algorithm 2). `noise()` returns the next standard normal draw, shaped like x."""
    for i in reversed(range(diffusion.steps)):
        t, at, prediction = _evaluate(diffusion, denoise, x, i)
        mean, log_variance, x0_hat = diffusion.reverse(prediction, x, at)
        # The last step adds no noise
        x_next = mean
        if i > 0:
            x_next = mean + torch.exp(0.5 * log_variance) * noise()
        yield Step(i, t, x, x0_hat, x_next)
        x = x_next


def ddim(
    diffusion: GaussianDiffusion, denoise: Denoise, x: Tensor, noise: Callable[[], Tensor]
) -> Iterator[Step]:
    """Deterministic sampling (DDIM, arXiv 2010.02502, equation 12 with eta = 0); `noise` is not called."""
    for i in reversed(range(diffusion.steps)):
        t, at, prediction = _evaluate(diffusion, denoise, x, i)
        epsilon = diffusion.predict_epsilon(prediction, x, at)
        x0_hat = diffusion.predict_x0(x, at, epsilon)
        # Move to the previous noise level along the same epsilon
        previous = at["alpha_bar_previous"]
        x_next = previous.sqrt() * x0_hat + (1 - previous).sqrt() * epsilon
        yield Step(i, t, x, x0_hat, x_next)
        x = x_next


def dpm_solver(
    diffusion: GaussianDiffusion, denoise: Denoise, x: Tensor, noise: Callable[[], Tensor]
) -> Iterator[Step]:
    """DPM-Solver++ (arXiv 2211.01095), second order, multistep, by diffusers; `noise` is not called.

    It solves the equation of DDIM, which is its first-order case. 20 to 50 steps are enough.
    """
    from diffusers import DPMSolverMultistepScheduler  # here, because this import takes seconds

    # The solver runs on the steps of the respaced process
    betas = np.clip(diffusion.tables["betas"], 0.0, 1.0)
    solver = DPMSolverMultistepScheduler(num_train_timesteps=diffusion.steps, trained_betas=betas)
    solver.set_timesteps(timesteps=list(reversed(range(diffusion.steps))))
    for i in reversed(range(diffusion.steps)):
        t, at, prediction = _evaluate(diffusion, denoise, x, i)
        epsilon = diffusion.predict_epsilon(prediction, x, at)
        x0_hat = diffusion.predict_x0(x, at, epsilon)
        # First order to t = 0: the signal-to-noise ratio jumps too far there to extrapolate
        if i == 1:
            solver.lower_order_nums = 0
        x_next = solver.step(epsilon, i, x).prev_sample
        yield Step(i, t, x, x0_hat, x_next)
        x = x_next


def _evaluate(
    diffusion: GaussianDiffusion, denoise: Denoise, x: Tensor, i: int
) -> tuple[int, Entries, Tensor]:
    """The prediction at step i: the original timestep, the tables' entries, and the network's output in float32."""
    index = torch.full((len(x),), i, device=x.device)
    t = int(diffusion.timesteps[i])
    prediction = denoise(x, torch.full((len(x),), t))
    return t, diffusion.entries(index, x.ndim), prediction.float()


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpm_solver}
