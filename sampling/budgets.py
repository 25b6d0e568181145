"""Budgets: how many tokens a branch of guidance keeps, said in the unit that the user cares about.

tail_dropping_fraction  share of the router's kept tokens to drop, as in the paper
token_budget            exactly so many tokens per image, the most probable ones; all shapes are static
tflops_per_image        limit for the mean cost of an image over all steps and branches; becomes a fraction before sampling
budget_schedule         fraction as a function of t, piecewise linear: "1000:0.6,300:0.2,0:0"

At most one of them, and with Lite-CFG at most one `uncond_` twin for the unconditional branch; `uncond_tflops_per_image` limits
that branch's share of the cost.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config, UserError
from models import architecture, flops

UNITS = ("tail_dropping_fraction", "token_budget", "tflops_per_image", "budget_schedule")
MOST = 0.999  # fraction dropped at the lowest cost that is offered; of up to 1000 tokens this leaves the two ends


class Budget(NamedTuple):
    """What one branch is told at every step."""

    points: tuple[tuple[float, float], ...] = (
        (0.0, 0.0),
    )  # (t, fraction dropped) by rising t; constant outside
    tokens: int | None = None  # exactly so many instead

    @property
    def drops(self) -> bool:
        return self.tokens is None and any(fraction for _, fraction in self.points)

    def drop(self, t: Tensor) -> Tensor:
        """Fraction at each timestep, float32 on the device of t: a sum of clamped ramps, so that no value is read."""
        t = t.float()
        fraction = torch.full_like(t, self.points[0][1])
        for (start, before), (end, after) in zip(self.points, self.points[1:]):
            fraction += ((t - start) / (end - start)).clamp(0, 1) * (after - before)
        return fraction

    def kept(self, natural: Tensor, t: Tensor) -> Tensor:
        """Kept tokens where the router itself would keep `natural`, as in models/router.py."""
        if self.tokens is not None:
            return torch.full_like(natural, self.tokens)
        return natural - torch.minimum((natural.float() * self.drop(t)).long(), natural - 2)


def flag(name: str) -> str:
    """Field of the sampling options -> option of the command line."""
    return f"--{name.replace('_', '-')}"


def check(options, config: Config) -> None:
    """Raise UserError for budgets out of range, two at once, one for an unconditional branch without Lite-CFG, or Lite-CFG that
    changes nothing.
    """
    if options.lite_cfg and config.is_static:
        raise UserError("--lite-cfg: a static DiT has no router; leave it out")
    if options.lite_cfg and all(
        getattr(options, prefix + unit) is None for prefix in ("", "uncond_") for unit in UNITS
    ):
        raise UserError(
            "--lite-cfg: changes nothing without a budget; add e.g. --uncond-tail-dropping-fraction 0.9"
        )
    for prefix in ("", "uncond_"):
        given = [prefix + unit for unit in UNITS if getattr(options, prefix + unit) is not None]
        if len(given) > 1:
            raise UserError(
                f"{' and '.join(flag(name) for name in given)}: are two budgets for the same tokens; give one"
            )
        for name in given:
            if config.is_static:
                raise UserError(
                    f"{flag(name)} {getattr(options, name)}: a static DiT has no router; leave it out"
                )
            if prefix and not options.lite_cfg:
                raise UserError(f"{flag(name)} {getattr(options, name)}: needs --lite-cfg")
            _check_one(name, getattr(options, name), config)


def _check_one(name: str, value, config: Config) -> None:
    if name.endswith("fraction") and not 0 <= value < 1:
        raise UserError(f"{flag(name)} {value}: must be in [0, 1)")
    if name.endswith("token_budget") and not 2 <= value <= config.tokens:
        raise UserError(
            f"{flag(name)} {value}: must be from 2 (the first and last token) to {config.tokens} (all)"
        )
    if name.endswith("tflops_per_image") and not 0 < value < float("inf"):
        raise UserError(f"{flag(name)} {value}: must be a positive number")
    if name.endswith("schedule"):
        parse_schedule(value, config.diffusion.diffusion_steps, flag(name))


def parse_schedule(
    text: str, diffusion_steps: int, option: str = "--budget-schedule"
) -> tuple[tuple[float, float], ...]:
    """ "1000:0.6,300:0.2,0:0" -> points (t, fraction) by rising t.

    Raises:
        UserError: another form, a t given twice or outside [0, diffusion_steps], or a fraction outside [0, 1).
    """
    number = r"\s*(\d+\.?\d*|\.\d+)\s*"
    parts = [re.fullmatch(f"{number}:{number}", part) for part in text.split(",")]
    if not all(parts):
        raise UserError(
            f"{option} '{text}': must be pairs t:fraction, e.g. {diffusion_steps}:0.6,{diffusion_steps * 3 // 10}:0.2,0:0"
        )
    points = sorted((float(part[1]), float(part[2])) for part in parts)
    for (t, fraction), following in zip(points, [*points[1:], (None, None)]):
        if t > diffusion_steps or t == following[0]:
            raise UserError(
                f"{option} '{text}': t = {t:g} must be from 0 to {diffusion_steps}, and given once"
            )
        if fraction >= 1:
            raise UserError(f"{option} '{text}': the fraction {fraction:g} must be in [0, 1)")
    return tuple(points)


def resolve(options, config: Config) -> tuple[Budget, Budget]:
    """The budgets of the conditional and the unconditional branch; a cost limit must have become a fraction before."""
    ours = _resolve_one(options, "", config)
    return ours, _resolve_one(options, "uncond_", config) if options.lite_cfg else ours


def _resolve_one(options, prefix: str, config: Config) -> Budget:
    fraction, tokens, tflops, schedule = (getattr(options, prefix + unit) for unit in UNITS)
    assert tflops is None, "settle the cost limit first"
    if schedule is not None:
        return Budget(parse_schedule(schedule, config.diffusion.diffusion_steps))
    return Budget(((0.0, fraction or 0.0),), tokens)


# ------------------------------------------------------------------------------------------------------------ cost limit


class Probe(NamedTuple):
    """What the router keeps by itself, seen on a few samples at some timesteps."""

    t: Tensor  # (steps,) falling
    conditional: Tensor  # (samples, steps) int64
    unconditional: Tensor | None  # the same, or None without guidance


class Prediction(NamedTuple):
    """Mean TFLOP per image."""

    conditional: float
    unconditional: float

    @property
    def total(self) -> float:
        return self.conditional + self.unconditional


def predict(
    config: Config,
    probe: Probe,
    steps: np.ndarray,
    interval: tuple[float, float] | None,
    budgets: tuple[Budget, Budget],
) -> Prediction:
    """Mean cost per image over the sampler's timesteps `steps`: what the probe's samples cost, interpolated over t."""

    def branch(natural: Tensor | None, budget: Budget, at: np.ndarray) -> float:
        if natural is None:
            return 0.0
        kept = budget.kept(natural, probe.t.expand_as(natural)).double()
        cost = sum(
            flops.forward_flops(
                architecture(config), flops.TokenCounts(kept.mean(0), kept.square().mean(0))
            ).values()
        )  # (steps,)
        return float(np.interp(at, probe.t.flip(0), cost.flip(0)).sum()) / 1e12

    low, high = interval or (float("-inf"), float("inf"))
    guided = steps[(low <= steps) & (steps <= high)]
    return Prediction(
        branch(probe.conditional, budgets[0], steps), branch(probe.unconditional, budgets[1], guided)
    )


def smallest_fraction(cost: Callable[[float], float], limit: float, option: str) -> float:
    """The smallest fraction to drop, to three digits, at which `cost` (falling) does not exceed the limit: most tokens kept.

    Raises:
        UserError: the limit is below the lowest cost; the message gives the range.
    """
    least, most = cost(MOST), cost(0.0)
    if limit < least:
        raise UserError(
            f"{option} {limit:g}: must be at least {least:.4g}; dropping nothing costs {most:.4g}"
        )
    fractions = range(round(MOST * 1000) + 1)
    low, high = -1, len(fractions) - 1  # cost(high) fits, cost(low) does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle / 1000) <= limit else (middle, high)
    return high / 1000


def choose_fractions(options, config: Config, probe: Probe, steps: np.ndarray):
    """Sampling options with fractions in place of limits on the cost, and the cost they are predicted to have.

    The unconditional branch's own limit is settled first; the image's limit then holds for both branches together.
    """

    def cost(**changes: float) -> Prediction:
        budgets = resolve(
            dataclasses.replace(options, tflops_per_image=None, uncond_tflops_per_image=None, **changes),
            config,
        )
        return predict(config, probe, steps, options.guidance_interval, budgets)

    if (limit := options.uncond_tflops_per_image) is not None:
        fraction = smallest_fraction(
            lambda fraction: cost(uncond_tail_dropping_fraction=fraction).unconditional,
            limit,
            "--uncond-tflops-per-image",
        )
        options = dataclasses.replace(
            options, uncond_tflops_per_image=None, uncond_tail_dropping_fraction=fraction
        )
    if (limit := options.tflops_per_image) is not None:
        fraction = smallest_fraction(
            lambda fraction: cost(tail_dropping_fraction=fraction).total, limit, "--tflops-per-image"
        )
        options = dataclasses.replace(options, tflops_per_image=None, tail_dropping_fraction=fraction)
    return options, cost()
