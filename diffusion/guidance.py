"""Classifier-free guidance over any per-sample conditioning.

The two branches differ in their conditioning alone, be it the label or how much compute a branch may spend (Lite-CFG), so one
function serves both; they run as one batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.samplers import Denoise

ConditionedDenoise = Callable[..., Tensor]  # (x, t, **conditioning) -> prediction


def condition(denoise: ConditionedDenoise, conditioning: dict[str, Tensor]) -> Denoise:
    """Fix the conditioning: a dictionary of tensors with a row per sample."""
    return lambda x, t: denoise(x, t, **conditioning)


def guide(
    denoise: ConditionedDenoise,
    conditional: dict[str, Tensor],
    unconditional: dict[str, Tensor],
    scale: float,
    channels: int,
) -> Denoise:
    """Classifier-free guidance (arXiv 2207.12598, equation 6 with scale = 1 + w): u + scale * (c - u).

    Args:
        conditional, unconditional: conditioning of the two branches, tensors (B, ...) under the same names.
        channels: how many leading channels are guided; the others come from the conditional branch.
    """
    both = {name: torch.cat([conditional[name], unconditional[name]]) for name in conditional}

    def denoise_guided(x: Tensor, t: Tensor) -> Tensor:
        prediction = denoise(torch.cat([x, x]), torch.cat([t, t]), **both)
        with_condition, without = prediction.chunk(2)
        guided = without + scale * (with_condition - without)
        return torch.cat([guided[:, :channels], with_condition[:, channels:]], dim=1)

    return denoise_guided
