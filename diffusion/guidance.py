"""Classifier-free guidance over any per-sample conditioning.

The two branches differ in their conditioning alone, be it the label or how much compute a branch may spend (Lite-CFG), so one
function serves both; they run as one batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.samplers import Denoise

ConditionedDenoise = Callable[..., Tensor]  # (x, t, **conditioning) -> prediction

# What one branch of the network is given beside x and t: under each name a tensor (B, ...) or a list of B numbers, or a
# function of the timesteps (B,) that returns one.
Conditioning = dict[str, Tensor | list | Callable[[Tensor], Tensor]]


def condition(denoise: ConditionedDenoise, conditioning: Conditioning) -> Denoise:
    """Fix the conditioning."""

    def denoise_conditioned(x: Tensor, t: Tensor) -> Tensor:
        t = t.to(x.device, non_blocking=True)
        return denoise(x, t, **_at(t, conditioning))

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
        conditional, unconditional: conditioning of the two branches. Under the same names they run as one batch, else one after
            the other.
        channels: how many leading channels are guided; the others come from the conditional branch.
        interval: guide only at lowest <= t <= highest (guidance interval, arXiv 2404.07724); elsewhere the unconditional branch
            is not computed. None: always.
    """

    def denoise_guided(x: Tensor, t: Tensor) -> Tensor:
        inside = (
            interval is None or interval[0] <= t[0].item() <= interval[1]
        )  # samplers give a batch one timestep
        t = t.to(x.device, non_blocking=True)
        ours, theirs = _at(t, conditional), _at(t, unconditional)
        if not inside:
            return denoise(x, t, **ours)
        if ours.keys() == theirs.keys():
            both = {name: _join(ours[name], theirs[name]) for name in ours}
            with_condition, without = denoise(torch.cat([x, x]), torch.cat([t, t]), **both).chunk(2)
        else:
            with_condition, without = denoise(x, t, **ours), denoise(x, t, **theirs)
        guided = without + scale * (with_condition - without)
        return torch.cat([guided[:, :channels], with_condition[:, channels:]], dim=1)

    return denoise_guided


def _at(t: Tensor, conditioning: Conditioning) -> dict[str, Tensor | list]:
    return {name: value(t) if callable(value) else value for name, value in conditioning.items()}


def _join(a: Tensor | list, b: Tensor | list) -> Tensor | list:
    return a + b if isinstance(a, list) else torch.cat([a, b])
