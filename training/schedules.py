"""What changes over a run, each as a function of the number of optimizer steps done."""

import torch
from torch import Tensor

from config import Config, FractionRange, TrainingConfig
from data.streams import rng
from sampling.budgets import piecewise_linear
from spellings import parse_schedule


def total_steps(config: Config, images: int) -> int:
    """Optimizer steps from the start of the run to its end."""
    training = config.training
    if training.max_steps is not None:
        return training.max_steps
    micro_steps_per_epoch = images // training.global_batch_size
    return training.epochs * micro_steps_per_epoch // training.gradient_accumulation_steps


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Linear warm-up over `lr_warmup_steps`, then constant."""
    return training.learning_rate * min(1.0, (step + 1) / (training.lr_warmup_steps + 1))


def downsample_factor(step: int, training: TrainingConfig) -> float:
    """N at this step, from `downsample_factor_start` to `downsample_factor` linearly over the warm-up."""
    end = training.downsample_factor
    if training.downsample_factor_start is None or training.downsample_factor_warmup_steps == 0:
        return end
    start = training.downsample_factor_start
    return start + (end - start) * min(1.0, step / training.downsample_factor_warmup_steps)


def downsample_factors(step: int, t: Tensor, training: TrainingConfig) -> Tensor:
    """N at this step for samples with these timesteps (B,), from `downsample_factor_points`.

    The warm-up, if there is one, leads from `downsample_factor_start` to the points.
    """
    end = piecewise_linear(parse_schedule(str(training.downsample_factor_points)), t)
    start, steps = training.downsample_factor_start, training.downsample_factor_warmup_steps
    if start is None or steps == 0:
        return end
    return start + (end - start) * min(1.0, step / steps)


def drop_fraction(step: int, training: TrainingConfig) -> float:
    """Fraction of the kept tokens that this step drops, the same on every process (multi-budget training).

    From a list the draw is that of the official code: a generator seeded with the step picks an entry. From a
    range it is uniform, a function of the run's seed and the step.
    """
    # Drop nothing before the first step of multi-budget training
    first_step = training.multi_budget_start_step
    if first_step is None:
        first_step = training.downsample_factor_warmup_steps
    if not training.multi_budget_training or step < first_step:
        return 0.0

    # Draw a fraction
    fractions = training.multi_budget_drop_fractions
    if isinstance(fractions, FractionRange):
        return float(rng(training.seed, "drop fraction", step).uniform(fractions.min, fractions.max))
    generator = torch.Generator().manual_seed(step)
    entry = torch.randint(0, len(fractions), (1,), generator=generator)
    return fractions[int(entry)]
