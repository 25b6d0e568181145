"""How the EMA of the weights forgets what training started with."""

import math

from config import TrainingConfig, config_from_dict
from weights.checkpoint import Checkpoint

# A larger share of the first weights shows in the samples
MAX_INITIAL_SHARE = 0.1


def ema_decay(step: int, training: TrainingConfig) -> float:
    """Share of the old EMA that a step keeps; smaller in the first steps with `ema_warmup`.

    Args:
        step: optimizer steps done before this one.
    """
    if training.ema_warmup:
        return min(training.ema_decay, (1 + step) / (10 + step))
    return training.ema_decay


def young_ema(state: Checkpoint) -> str | None:
    """What is wrong with an EMA that is still much of what training started with; None if it is not.

    Converted weights were not trained here, and have no steps. Those of another average are no EMA.
    """
    if state.get("weights"):
        return None
    training = config_from_dict(state["config"]).training
    steps = state["step"]
    share = initial_share(steps, training)
    if not steps or share <= MAX_INITIAL_SHARE:
        return None
    return (
        f"{share:.0%} of the EMA weights is still what training started with (training.ema_decay "
        f"{training.ema_decay} over {steps:,} steps)"
    )


def initial_share(steps: int, training: TrainingConfig) -> float:
    """Share of the first weights in the EMA after this number of optimizer steps."""
    return math.prod(ema_decay(step, training) for step in range(steps))
