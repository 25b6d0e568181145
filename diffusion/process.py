"""The diffusion process by name. Whoever trains or samples asks here, and never which process it is.

A process is any object with the attributes of `Process`. To add one, write it beside gaussian.py, and name it in
`OBJECTIVES`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from diffusion.flow import FLOW_SAMPLERS, respaced
from diffusion.gaussian import create_diffusion
from diffusion.samplers import SAMPLERS, Denoise, Step


class Process(Protocol):
    """How images become noise, and what the network learns of it."""

    steps: int  # reverse steps
    timesteps: np.ndarray  # (steps,) the timestep of each, rising: 0 is the image, the last one noise

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t (B, ...) from x_0 and noise at timesteps t (B,)."""
        ...

    def losses(
        self, prediction: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """Terms per sample (B,), whose sum training minimises."""
        ...


# (process, denoise, noise to start from, function that draws more) -> a Step per evaluation of the network
Sampler = Callable[[Any, Denoise, Tensor, Callable[[], Tensor]], Iterator[Step]]


class Objective(NamedTuple):
    """A kind of process. The network predicts a channel per latent channel; two for a learned variance."""

    build: Callable[..., Process]  # takes what `build_process` takes
    samplers: Mapping[str, Sampler]
    default: str  # the sampler of sample.py and sample_ddp.py
    fast: str  # the sampler of everything that must not take long: sample grids, evaluation in training, the demo
    two_stage: tuple[str, ...] = ()  # samplers that evaluate the network twice in every step but the last
    learns_variance: bool = False  # whether `training.learn_sigma` means something


def build_gaussian(
    noise_schedule: str,
    diffusion_steps: int,
    learn_sigma: bool,
    prediction: str,
    sampling_steps: int | None,
    **_: Any,
) -> Process:
    return create_diffusion(noise_schedule, diffusion_steps, learn_sigma, sampling_steps, prediction)


def build_flow(diffusion_steps: int, flow_shift: float, sampling_steps: int | None, **_: Any) -> Process:
    return respaced(diffusion_steps, flow_shift, sampling_steps)


# The names of `diffusion.objective`
OBJECTIVES = {
    "gaussian": Objective(build_gaussian, SAMPLERS, default="ddpm", fast="ddim", learns_variance=True),
    "flow": Objective(build_flow, FLOW_SAMPLERS, default="euler", fast="euler", two_stage=("heun",)),
}


def build_process(objective: str, sampling_steps: int | None = None, **settings: Any) -> Process:
    """The process that a configuration describes.

    Args:
        objective, settings: `Config.process`. An objective reads the settings that it needs.
        sampling_steps: visit fewer timesteps.

    Raises:
        ValueError: sampling_steps is outside [1, diffusion_steps].
    """
    return OBJECTIVES[objective].build(sampling_steps=sampling_steps, **settings)


def evaluated_timesteps(objective: str, process: Process, sampler: str | None) -> np.ndarray:
    """The timesteps at which a sampler evaluates the network, rising."""
    if sampler not in OBJECTIVES[objective].two_stage:
        return process.timesteps
    return np.sort(np.concatenate([process.timesteps, process.timesteps[:-1]]))


def draw_timestep(stream: np.random.Generator, diffusion_steps: int, distribution: str) -> int:
    """A timestep of training.

    Args:
        distribution: "uniform", or "logit_normal": mostly in the middle (arXiv 2403.03206, with m = 0 and s = 1).
    """
    if distribution == "uniform":
        return int(stream.integers(diffusion_steps))
    share = 1 / (1 + np.exp(-stream.standard_normal()))
    return min(int(share * diffusion_steps), diffusion_steps - 1)
