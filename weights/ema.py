"""How the EMA of the weights forgets what training started with."""

import math

from config import TrainingConfig

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


def initial_share(steps: int, training: TrainingConfig) -> float:
    """Share of the first weights in the EMA after this number of optimizer steps."""
    return math.prod(ema_decay(step, training) for step in range(steps))
