"""How to sample: the options, and what may be combined."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from numpy.typing import ArrayLike

from config import Config, UserError
from diffusion import OBJECTIVES
from sampling.budgets import ALL, Budget
from sampling.conditions import check_values, plain_conditions


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample; the names are the command line's.

    `budget` holds for both branches of guidance. If `uncond` is given, which is Lite-CFG, it is the budget of the
    unconditional branch, and `budget` that of the conditional one.
    """

    cfg_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None  # guide at these t only, both ends included
    num_sampling_steps: int = 250
    sampler: str | None = None  # None: the default of the diffusion process
    seed: int = 0
    bf16: bool = False  # of the network
    bf16_vae: bool = False  # of the autoencoder
    budget: Budget = ALL
    uncond: Budget | None = None
    # Name -> value, or a row per sample, see sampling/conditions.py; None, or a name without a value: no condition
    conditions: Mapping[str, ArrayLike] | None = None

    @property
    def has_guidance(self) -> bool:
        """Whether there are two branches: at scale 1 there is the conditional one, at 0 the unconditional one."""
        return self.cfg_scale > 1

    def check(self, config: Config) -> None:
        """Raise UserError for values out of range and for options that contradict each other or the model."""
        diffusion_steps = config.diffusion.diffusion_steps
        if not 1 <= self.num_sampling_steps <= diffusion_steps:
            raise UserError(
                f"--num-sampling-steps {self.num_sampling_steps}: must be from 1 to {diffusion_steps}"
            )
        samplers = OBJECTIVES[config.diffusion.objective].samplers
        if self.sampler is not None and self.sampler not in samplers:
            raise UserError(
                f"--sampler {self.sampler}: the model was trained with diffusion.objective "
                f"{config.diffusion.objective}; use one of {', '.join(samplers)}"
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed}: must be 0 or greater, and below 2**63")
        self._check_guidance(config)
        self._check_budgets(config)
        self._check_conditions(config)

    def plain(self) -> dict:
        """The options as plain data; equal options have equal data."""
        plain = dataclasses.asdict(dataclasses.replace(self, conditions=None))
        return plain | {"conditions": plain_conditions(self.conditions)}

    def _check_conditions(self, config: Config) -> None:
        given = self.conditions or {}
        check_values(given, config)
        if given and self.cfg_scale == 0:
            raise UserError("--condition: --cfg-scale 0 draws samples without conditions; leave one out")
        missing = [name for name in config.data.conditions if name not in given]
        if missing and config.training.class_dropout_prob == 0:
            raise UserError(
                f"--condition {missing[0]}: is missing, and the model was trained without class dropout; "
                f"give --condition {missing[0]}=VALUE"
            )

    def _check_guidance(self, config: Config) -> None:
        scale = f"--cfg-scale {self.cfg_scale}"
        if self.cfg_scale != 0 and not 1 <= self.cfg_scale < math.inf:
            raise UserError(
                f"{scale}: must be a number of at least 1 (1 is no guidance), or 0 for samples without a class"
            )
        possible = possible_scale(self.cfg_scale, config)
        if possible != self.cfg_scale:
            reason = REASONS[possible]
            raise UserError(f"{scale}: the model was trained {reason}; use {possible:g}")
        if self.guidance_interval is None:
            return
        low, high = self.guidance_interval
        interval = f"--guidance-interval {low:g} {high:g}"
        last = config.diffusion.diffusion_steps
        if not 0 <= low <= high <= last:
            raise UserError(f"{interval}: must be two timesteps from 0 to {last}, the lower first")
        if not self.has_guidance:
            raise UserError(f"{interval}: --cfg-scale {self.cfg_scale:g} is no guidance; raise the scale")

    def _check_budgets(self, config: Config) -> None:
        self.budget.check(config)
        if self.uncond is None:
            return
        if not self.has_guidance:
            raise UserError(
                "--lite-cfg: has no unconditional branch to make cheaper at "
                f"--cfg-scale {self.cfg_scale:g}; raise the scale"
            )
        if config.is_static:
            raise UserError("--lite-cfg: a static DiT has no router; leave it out")
        self.uncond.check(config, unconditional=True)


# The only scale that some models can do -> how they were trained
REASONS = {0.0: "without classes", 1.0: "without class dropout"}


def possible_scale(wanted: float, config: Config) -> float:
    """The guidance scale that is wanted or, where the model can do only one, that one."""
    dropped_labels = config.training.class_dropout_prob
    if dropped_labels == 0:
        return 1.0
    if dropped_labels == 1:
        return 0.0
    return wanted
