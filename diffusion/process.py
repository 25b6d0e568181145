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
    """A kind of process."""

    samplers: Mapping[str, Sampler]
    default: str  # the sampler of sample.py and sample_ddp.py
    fast: str  # the sampler of everything that must not take long: sample grids, evaluation in training, the demo


OBJECTIVES = {
    "gaussian": Objective(SAMPLERS, default="ddpm", fast="ddim"),
    "flow": Objective(FLOW_SAMPLERS, default="euler", fast="euler"),
}
ALL_SAMPLERS = [name for objective in OBJECTIVES.values() for name in objective.samplers]


def build_process(
    objective: str,
    noise_schedule: str,
    diffusion_steps: int,
    learn_sigma: bool,
    flow_shift: float,
    sampling_steps: int | None = None,
) -> Process:
    """The process that a configuration describes (`Config.process`).

    Args:
        noise_schedule, learn_sigma: of the Gaussian process. flow_shift: of the flow.
        sampling_steps: visit fewer timesteps.

    Raises:
        ValueError: an unknown name, or sampling_steps outside [1, diffusion_steps].
    """
    if objective == "gaussian":
        return create_diffusion(noise_schedule, diffusion_steps, learn_sigma, sampling_steps)
    if objective == "flow":
        return respaced(diffusion_steps, flow_shift, sampling_steps)
    raise ValueError(f"objective '{objective}' is not one of {', '.join(OBJECTIVES)}")


def evaluated_timesteps(process: Process, sampler: str | None) -> np.ndarray:
    """The timesteps at which a sampler evaluates the network, rising: two in every step of Heun's but the last."""
    if sampler != "heun":
        return process.timesteps
    return np.sort(np.concatenate([process.timesteps, process.timesteps[:-1]]))


def draw_timestep(stream: np.random.Generator, diffusion_steps: int, distribution: str) -> int:
    """A timestep of training.

    Args:
        distribution: "uniform", or "logit_normal": mostly in the middle (arXiv 2403.03206, equation 19 with m = 0
            and s = 1).
    """
    if distribution == "uniform":
        return int(stream.integers(diffusion_steps))
    share = 1 / (1 + np.exp(-stream.standard_normal()))
    return min(int(share * diffusion_steps), diffusion_steps - 1)
