"""How to sample: the options, and what may be combined."""

import math
from dataclasses import dataclass

from config import Config, UserError
from diffusion.samplers import SAMPLERS
from sampling.budgets import ALL, Budget


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample; the names are the command line's.

    `budget` holds for both branches of guidance. If `uncond` is given, which is Lite-CFG, it is the budget of the
    unconditional branch, and `budget` that of the conditional one.
    """

    cfg_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None  # guide at these t only, both ends included
    num_sampling_steps: int = 250
    sampler: str = "ddpm"
    seed: int = 0
    bf16: bool = False
    budget: Budget = ALL
    uncond: Budget | None = None

    def check(self, config: Config) -> None:
        """Raise UserError for values out of range and for options that contradict each other or the model."""
        diffusion_steps = config.diffusion.diffusion_steps
        if not 1 <= self.num_sampling_steps <= diffusion_steps:
            raise UserError(
                f"--num-sampling-steps {self.num_sampling_steps}: must be from 1 to {diffusion_steps}"
            )
        if self.sampler not in SAMPLERS:
            raise UserError(f"--sampler '{self.sampler}' is not one of {', '.join(SAMPLERS)}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed}: must be 0 or greater, and below 2**63")
        self._check_guidance(config)
        self._check_budgets(config)

    def _check_guidance(self, config: Config) -> None:
        scale = f"--cfg-scale {self.cfg_scale}"
        if not 1 <= self.cfg_scale < math.inf:
            raise UserError(f"{scale}: must be a number of at least 1 (1 is no guidance)")
        if self.cfg_scale > 1 and config.training.class_dropout_prob == 0:
            raise UserError(f"{scale}: the model was trained without class dropout; use 1")
        if self.guidance_interval is None:
            return
        low, high = self.guidance_interval
        interval = f"--guidance-interval {low:g} {high:g}"
        last = config.diffusion.diffusion_steps
        if not 0 <= low <= high <= last:
            raise UserError(f"{interval}: must be two timesteps from 0 to {last}, the lower first")
        if self.cfg_scale == 1:
            raise UserError(f"{interval}: --cfg-scale 1 is no guidance; raise the scale")

    def _check_budgets(self, config: Config) -> None:
        self.budget.check(config)
        if self.uncond is None:
            return
        if self.cfg_scale == 1:
            raise UserError(
                "--lite-cfg: has no unconditional branch to make cheaper at --cfg-scale 1; raise the scale"
            )
        if config.is_static:
            raise UserError("--lite-cfg: a static DiT has no router; leave it out")
        if self.uncond == ALL and self.budget == ALL:
            raise UserError(
                "--lite-cfg: changes nothing without a budget; add e.g. --uncond-tail-dropping-fraction 0.9"
            )
        self.uncond.check(config, unconditional=True)
