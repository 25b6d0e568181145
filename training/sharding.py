"""FSDP for models that outgrow one GPU: weights, gradients, EMA and optimizer state are cut over all processes.

Accelerate turns it on (`accelerate launch --use_fsdp`, see the README). Checkpoints hold whole tensors all the same, so that a
run goes on, and samples are drawn, with or without it.
"""

import os

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor, distribute_tensor

from config import UserError


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def check_sharding(accelerator: Accelerator) -> None:
    """UserError for FSDP's older version; on a CPU, where Accelerate leaves FSDP out, put it in (for tests)."""
    if accelerator.device.type == "cpu" and os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.num_processes > 1:
        for state in (PartialState(), accelerator.state):
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if is_sharded(accelerator) and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise UserError("--fsdp_version 1: is not supported; use --fsdp_version 2")


def whole(value):
    """Plain data with sharded tensors -> the same with whole ones on the CPU. Collective where a tensor is sharded."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return type(value)((key, whole(item)) for key, item in value.items())
    return [whole(item) for item in value] if isinstance(value, list) else value


def shard_state(state: dict, parameters: list[torch.Tensor]) -> dict:
    """An optimizer's state dict with its whole tensors cut like the parameters that they belong to."""

    def cut(value, parameter):
        if not (isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape):
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    moments = {
        number: {name: cut(value, parameters[number]) for name, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": moments}
