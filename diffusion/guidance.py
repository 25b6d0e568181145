"""Classifier-free guidance over any per-sample conditioning.

The two branches differ in their conditioning alone, whether that is the label or how much compute a branch
may spend (Lite-CFG). One function therefore serves both, and the branches run as one batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusion.samplers import Denoise

ConditionedDenoise = Callable[..., Tensor]  # (x, t, **conditioning) -> prediction

# What one branch of the network gets beside x and t. Under each name stands a tensor (B, ...), a list of B
# numbers, a dictionary of these, or a function of the timesteps (B,) that returns one of them.
Conditioning = dict[str, Any]


def condition(denoise: ConditionedDenoise, conditioning: Conditioning) -> Denoise:
    """Fix the conditioning."""

    def denoise_conditioned(x: Tensor, t: Tensor) -> Tensor:
        t = t.to(x.device, non_blocking=True)
        return denoise(x, t, **evaluate_at(t, conditioning))

    return denoise_conditioned


def guide(
    denoise: ConditionedDenoise,
    conditional: Conditioning,
    unconditional: Conditioning,
    scale: float,
    channels: int,
    interval: tuple[float, float] | None = None,
) -> Denoise:
    """Classifier-free guidance (arXiv 2207.12598, equation 6 with scale = 1 + w): u + scale * (c - u).

    Args:
        conditional, unconditional: conditioning of the two branches. With the same names they run as one batch,
            otherwise one after the other.
        channels: how many leading channels are guided; the others come from the conditional branch.
        interval: guide only at lowest <= t <= highest (guidance interval, arXiv 2404.07724); elsewhere the
            unconditional branch is not computed. None: guide always.
    """

    def denoise_guided(x: Tensor, t: Tensor) -> Tensor:
        # Samplers give all samples of a batch one timestep, which is still on the host here
        is_guided = interval is None or interval[0] <= t[0].item() <= interval[1]
        t = t.to(x.device, non_blocking=True)
        conditions = evaluate_at(t, conditional)
        if not is_guided:
            return denoise(x, t, **conditions)

        # Both branches, as one batch if their conditioning can be joined
        no_conditions = evaluate_at(t, unconditional)
        if conditions.keys() == no_conditions.keys():
            joined = {name: join(conditions[name], no_conditions[name]) for name in conditions}
            with_condition, without = denoise(torch.cat([x, x]), torch.cat([t, t]), **joined).chunk(2)
        else:
            with_condition = denoise(x, t, **conditions)
            without = denoise(x, t, **no_conditions)

        guided = without + scale * (with_condition - without)
        return torch.cat([guided[:, :channels], with_condition[:, channels:]], dim=1)

    return denoise_guided


def evaluate_at(t: Tensor, conditioning: Conditioning) -> Conditioning:
    """The conditioning at timesteps t (B,): functions replaced by their values."""
    return {name: value(t) if callable(value) else value for name, value in conditioning.items()}


def join(conditional: Any, unconditional: Any) -> Any:
    """Two tensors (B, ...) or lists of B numbers as one of 2B, also in dictionaries."""
    if isinstance(conditional, dict):
        return {name: join(conditional[name], unconditional[name]) for name in conditional}
    if isinstance(conditional, list):
        return conditional + unconditional
    return torch.cat([conditional, unconditional])
