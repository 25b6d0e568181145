"""Budgets: how many tokens a branch of guidance may keep.

Budget.fraction(0.4)                     drop this share of the tokens that the router keeps, as in the paper
Budget.tokens(128)                       keep exactly this number of tokens per image, the most probable ones
Budget.tflops(3.5)                       drop the smallest fraction with which an image costs at most this
Budget.schedule("1000:0.6,300:0.2,0:0")  drop a fraction that is piecewise linear in the timestep
ALL                                      drop nothing
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from config import Config, UserError
from spellings import parse_schedule

# Unit of a budget -> the command line's option for it.
OPTIONS = {
    "fraction": "--tail-dropping-fraction",
    "tokens": "--token-budget",
    "tflops": "--tflops-per-image",
    "schedule": "--budget-schedule",
}


@dataclass(frozen=True)
class Budget:
    """What one branch of guidance may spend at every timestep. Plain data; the static methods make it."""

    unit: str = "all"
    value: float | str = 0.0

    @staticmethod
    def fraction(dropped: float) -> "Budget":
        """Drop this share of the kept tokens, in [0, 1), the least probable ones first."""
        return Budget("fraction", dropped)

    @staticmethod
    def tokens(count: int) -> "Budget":
        """Keep exactly this number of tokens per image, the most probable ones: all shapes are static."""
        return Budget("tokens", count)

    @staticmethod
    def tflops(per_image: float) -> "Budget":
        """Limit the mean cost of an image over all steps.

        As the budget of an image it limits both branches together, as that of the unconditional branch its
        share. `sampling.generate.replace_cost_limits` replaces it by a fraction.
        """
        return Budget("tflops", per_image)

    @staticmethod
    def schedule(text: str) -> "Budget":
        """Drop a fraction that depends on t: "t:fraction" pairs, linear between them and constant outside."""
        return Budget("schedule", text)

    def __str__(self) -> str:
        value = self.value if isinstance(self.value, str) else f"{self.value:g}"
        sentences = {
            "all": "drops nothing",
            "fraction": f"drops {value} of the kept tokens",
            "tokens": f"keeps {value} tokens",
            "tflops": f"costs at most {value} TFLOP per image",
            "schedule": f"drops a fraction by timestep, {value}",
        }
        return sentences[self.unit]

    def option(self, unconditional: bool = False) -> str:
        """The option that gives this budget on the command line, e.g. --uncond-token-budget."""
        option = OPTIONS[self.unit]
        return option.replace("--", "--uncond-") if unconditional else option

    def check(self, config: Config, unconditional: bool = False) -> None:
        """Raise UserError, naming the option, for a value out of range or a network without a router."""
        if self.unit == "all":
            return
        option = self.option(unconditional)
        value = self.value
        if config.is_static:
            raise UserError(f"{option} {value}: a static DiT has no router; leave it out")
        if self.unit == "schedule":
            _check_schedule(str(value), option, config.diffusion.diffusion_steps)
            return
        number = float(value)
        if self.unit == "fraction" and not 0 <= number < 1:
            raise UserError(f"{option} {value}: must be in [0, 1)")
        if self.unit == "tokens" and not 2 <= number <= config.tokens:
            limits = f"from 2 (the first and last token) to {config.tokens} (all)"
            raise UserError(f"{option} {value}: must be {limits}")
        if self.unit == "tflops" and not 0 < number < math.inf:
            raise UserError(f"{option} {value}: must be a positive number")

    @property
    def token_count(self) -> int | None:
        """The exact number of tokens to keep, or None where the router decides."""
        return int(self.value) if self.unit == "tokens" else None

    @property
    def drops(self) -> bool:
        """Whether a fraction above zero is dropped at some timestep."""
        if self.unit not in ("fraction", "schedule"):
            return False
        return any(fraction > 0 for _, fraction in self._points())

    def drop_fraction(self, t: Tensor) -> Tensor:
        """Fraction to drop at each timestep, float32 on the device of t; no value is read by the host."""
        return piecewise_linear(self._points(), t)

    def kept_tokens(self, undropped: Tensor, t: Tensor) -> Tensor:
        """Tokens that stay where the router alone would keep `undropped`, by the rule of models/tail_drop.py."""
        if self.token_count is not None:
            return torch.full_like(undropped, self.token_count)
        dropped = (undropped.float() * self.drop_fraction(t)).long()
        return undropped - torch.minimum(dropped, undropped - 2)

    def _points(self) -> list[tuple[float, float]]:
        """(t, fraction) by rising t."""
        if self.unit == "schedule":
            return parse_schedule(str(self.value))
        if self.unit in ("all", "fraction"):
            return [(0.0, float(self.value))]
        raise ValueError(f"a budget in {self.unit} is not a fraction")


ALL = Budget()


def piecewise_linear(points: list[tuple[float, float]], t: Tensor) -> Tensor:
    """The value at each timestep, float32 on the device of t; no value is read by the host.

    Args:
        points: (t, value) by rising t; the value is linear between them and constant outside.
    """
    t = t.float()
    value = torch.full_like(t, points[0][1])
    # A sum of ramps, each of which rises from 0 to 1 between two points
    for (start, before), (end, after) in zip(points, points[1:]):
        value += ((t - start) / (end - start)).clamp(0, 1) * (after - before)
    return value


def _check_schedule(text: str, option: str, diffusion_steps: int) -> None:
    """UserError for another form, a t above the diffusion steps or given twice, and a fraction of 1 or more."""
    try:
        points = parse_schedule(text)
    except ValueError:
        example = f"{diffusion_steps}:0.6,{diffusion_steps * 3 // 10}:0.2,0:0"
        raise UserError(f"{option} '{text}': must be pairs t:fraction, e.g. {example}") from None
    earlier = None
    for t, fraction in points:
        if t > diffusion_steps or t == earlier:
            raise UserError(
                f"{option} '{text}': t = {t:g} must be from 0 to {diffusion_steps}, and given once"
            )
        if fraction >= 1:
            raise UserError(f"{option} '{text}': the fraction {fraction:g} must be in [0, 1)")
        earlier = t
