"""FSDP for models that outgrow one GPU: weights, gradients, EMA and optimizer state are cut over all processes.

Accelerate turns it on (`accelerate launch --use_fsdp`, see the README). Checkpoints hold whole tensors all the same, so that a
run goes on, and samples are drawn, with or without it.
"""

import os

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, convert_to_fp32
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from config import UserError


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def check_sharding(accelerator: Accelerator) -> None:
    """Set Accelerate's FSDP up for this network; UserError for FSDP's older version.

    On a CPU, where Accelerate leaves FSDP out, put it in (for tests).
    """
    if (
        accelerator.device.type == "cpu"
        and os.environ.get("ACCELERATE_USE_FSDP") == "true"
        and accelerator.num_processes > 1
    ):
        for state in (PartialState(), accelerator.state):
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if not is_sharded(accelerator):
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UserError("--fsdp_version 1: is not supported; use --fsdp_version 2")
    plugin.cpu_ram_efficient_loading = (
        False  # the launcher's default, which fails at buffers such as the positions
    )
    plugin.mixed_precision_policy = MixedPrecisionPolicy()  # weights stay in float32; see `forward`


def forward(accelerator: Accelerator, model: torch.nn.Module, *inputs):
    """What the prepared model makes of the inputs, in the accelerator's precision.

    Accelerate wraps the forward pass of every model in autocast but that of a sharded one, whose weights it would rather cast
    as a whole; router and dechunk need theirs in float32.
    """
    if not is_sharded(accelerator):
        return model(*inputs)
    with accelerator.autocast():
        return convert_to_fp32(model(*inputs))


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor on its own device, put together where it is sharded: collective then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(value):
    """Plain data with sharded tensors -> the same with whole ones on the CPU. Collective where a tensor is sharded."""
    if isinstance(value, DTensor):
        return whole_tensor(value).cpu()
    if isinstance(value, dict):
        return type(value)((key, whole(item)) for key, item in value.items())
    return [whole(item) for item in value] if isinstance(value, list) else value


def shard_state(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """An optimizer's state dict with its whole tensors cut like the parameters that they belong to."""
    parameters = [
        parameter for group in optimizer.param_groups for parameter in group["params"]
    ]  # numbered in this order

    def cut(value, parameter):
        if not (
            isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape
        ):
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    moments = {
        number: {name: cut(value, parameters[number]) for name, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": moments}
