"""Flow matching on the straight path from noise to image, with velocity prediction, and its samplers.

The path is x_t = (1 - sigma) x_0 + sigma noise, and the network predicts its velocity noise - x_0 (rectified
flow, arXiv 2209.03003; SiT, arXiv 2401.08740). Timesteps are whole numbers like those of the Gaussian process:
t = 0 is nearly the image and the last one is pure noise.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from diffusion import schedule
from diffusion.samplers import Denoise, Step


class FlowMatching:
    """The straight path at a list of timesteps.

    Args:
        timesteps: (steps,) rising, the timesteps that are visited.
        diffusion_steps: number of timesteps of training.
        shift: above 1, more of the path is noisy, as large images need (arXiv 2403.03206).
    """

    def __init__(self, timesteps: np.ndarray, diffusion_steps: int, shift: float):
        self.timesteps = timesteps
        self.steps = len(timesteps)
        even = (np.arange(diffusion_steps) + 1) / diffusion_steps
        self.sigmas = shift * even / (1 + (shift - 1) * even)  # (diffusion_steps,), the last one is 1
        self._on_device: dict[torch.device, Tensor] = {}

    def sigma(self, t: Tensor, ndim: int) -> Tensor:
        """The noise level at timesteps t (B,), float32, shaped to broadcast over (B, ...)."""
        if t.device not in self._on_device:
            self._on_device[t.device] = torch.as_tensor(self.sigmas).to(t.device, torch.float32)
        return self._on_device[t.device][t].view(-1, *[1] * (ndim - 1))

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The point of the path at timesteps t (B,)."""
        sigma = self.sigma(t, x0.ndim)
        return (1 - sigma) * x0 + sigma * noise

    def losses(
        self, prediction: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Loss terms per sample (B,): "mse", the mean squared error of the velocity."""
        error = noise - x0 - prediction
        return {"mse": error.square().flatten(1).mean(1)}

    def levels(self) -> list[tuple[int, int, float, float]]:
        """(step, timestep, sigma before, sigma after) of every reverse step, from noise to image."""
        levels = []
        for i in reversed(range(self.steps)):
            t = int(self.timesteps[i])
            before = float(self.sigmas[t])
            after = float(self.sigmas[self.timesteps[i - 1]]) if i > 0 else 0.0
            levels.append((i, t, before, after))
        return levels


def respaced(diffusion_steps: int, shift: float, sampling_steps: int | None) -> FlowMatching:
    """The process of training, or one that visits fewer timesteps. Raises ValueError for a number out of range."""
    timesteps = np.arange(diffusion_steps)
    if sampling_steps is not None:
        timesteps = schedule.respaced_timesteps(diffusion_steps, sampling_steps)
    return FlowMatching(timesteps, diffusion_steps, shift)


def euler(flow: FlowMatching, denoise: Denoise, x: Tensor, noise: Callable[[], Tensor]) -> Iterator[Step]:
    """The probability flow by Euler's method; `noise` is not called."""
    for i, t, before, after in flow.levels():
        velocity = _velocity(denoise, x, t)
        x_next = x + (after - before) * velocity
        yield Step(i, t, x, x - before * velocity, x_next)
        x = x_next


def heun(flow: FlowMatching, denoise: Denoise, x: Tensor, noise: Callable[[], Tensor]) -> Iterator[Step]:
    """The probability flow by Heun's method, which evaluates the network twice in every step but the last."""
    for i, t, before, after in flow.levels():
        velocity = _velocity(denoise, x, t)
        trial = x + (after - before) * velocity
        # Evaluations count down to 0: two per step, one in the last
        yield Step(2 * i, t, x, x - before * velocity, trial)
        if i == 0:
            return
        # Once more at the end of the step; the mean of both velocities counts
        t_after = int(flow.timesteps[i - 1])
        second = _velocity(denoise, trial, t_after)
        x = x + (after - before) * (velocity + second) / 2
        yield Step(2 * i - 1, t_after, trial, trial - after * second, x)


def sde(flow: FlowMatching, denoise: Denoise, x: Tensor, noise: Callable[[], Tensor]) -> Iterator[Step]:
    """The reverse diffusion of strength sigma, by Euler and Maruyama (as in SiT), down to x_0."""
    for i, t, before, after in flow.levels():
        velocity = _velocity(denoise, x, t)
        x0_hat = x - before * velocity
        x_next = x0_hat
        if i > 0:
            implied_noise = x + (1 - before) * velocity
            step = before - after
            x_next = x - step * (velocity + implied_noise / 2) + (step * before) ** 0.5 * noise()
        yield Step(i, t, x, x0_hat, x_next)
        x = x_next


def _velocity(denoise: Denoise, x: Tensor, t: int) -> Tensor:
    """The network's output at one timestep, in float32."""
    return denoise(x, torch.full((len(x),), t)).float()


FLOW_SAMPLERS = {"euler": euler, "heun": heun, "sde": sde}
