"""What changes over a run, each as a function of the number of optimizer steps done."""

import torch

from config import FractionRange, TrainingConfig, downsample_factors
from data.streams import rng


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Linear warm-up over `lr_warmup_steps`, then constant."""
    return training.learning_rate * min(1.0, (step + 1) / (training.lr_warmup_steps + 1))


def downsample_factor(step: int, training: TrainingConfig) -> float:
    """N at this step: from `downsample_factor_start` to `downsample_factor`, linear over the warm-up steps."""
    end = downsample_factors(training.downsample_factor)
    if training.downsample_factor_start is None or training.downsample_factor_warmup_steps == 0:
        return end
    start = downsample_factors(training.downsample_factor_start)
    return start + (end - start) * min(1.0, step / training.downsample_factor_warmup_steps)


def drop_fraction(step: int, training: TrainingConfig) -> float:
    """Multi-budget training's fraction of this step, the same on every process (DC-DiT, elastic inference).

    From a list the draw is that of the official code: a generator seeded with the step picks an entry. From a range it is
    uniform, a function of the run's seed and the step.
    """
    first = training.multi_budget_start_step
    first = training.downsample_factor_warmup_steps if first is None else first
    if not training.multi_budget_training or step < first:
        return 0.0
    fractions = training.multi_budget_drop_fractions
    if isinstance(fractions, FractionRange):
        return float(rng(training.seed, "drop fraction", step).uniform(fractions.min, fractions.max))
    generator = torch.Generator().manual_seed(step)
    return fractions[torch.randint(0, len(fractions), (1,), generator=generator).item()]
