"""AdamW over groups of parameters with a learning rate each."""

from collections.abc import Iterable

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from config import TrainingConfig
from processes.sharding import shard_optimizer_state


def make_optimizer(
    model: nn.Module, training: TrainingConfig, others: Iterable[nn.Parameter] = ()
) -> torch.optim.AdamW:
    """AdamW over the parameters of a model and others, in its fused form on devices that have one."""
    groups = parameter_groups(model, training.lr_scales)
    # The others have a group of their own, so that the model's are numbered as without them
    own_group = list(others)
    if own_group:
        groups.append({"params": own_group, "lr_scale": 1.0})
    device = next(model.parameters()).device
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(
        groups, lr=training.learning_rate, weight_decay=training.weight_decay, fused=fused
    )


def parameter_groups(model: nn.Module, lr_scales: dict[str, float]) -> list[dict]:
    """Optimizer groups by factor on the learning rate, in the order in which the factors first occur.

    The longest entry of `lr_scales` that a parameter's name begins with decides; otherwise the factor is 1.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        entries = [entry for entry in lr_scales if is_part(name, entry)]
        scale = lr_scales[max(entries, key=len)] if entries else 1.0
        groups.setdefault(scale, []).append(parameter)
    return [{"params": parameters, "lr_scale": scale} for scale, parameters in groups.items()]


def is_part(name: str, entry: str) -> bool:
    """Whether the dotted name of a parameter begins with the whole parts of an entry: blocks.1, not blocks.10."""
    return name == entry or name.startswith(entry.rstrip(".") + ".")


def load_optimizer(optimizer: AcceleratedOptimizer, state: dict) -> None:
    """Load the moments and step counts of a checkpoint. The options stay those of the configuration."""
    options = []
    for group in optimizer.param_groups:
        options.append({key: group[key] for key in ("weight_decay", "fused", "lr_scale")})
    optimizer.load_state_dict(shard_optimizer_state(state, optimizer))
    # Loading has brought the options of the checkpoint along
    for group, own in zip(optimizer.param_groups, options):
        group.update(own)


def set_learning_rate(optimizer: AcceleratedOptimizer, rate: float) -> None:
    """Set the learning rate of every group to its share of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
