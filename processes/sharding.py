"""FSDP for models that outgrow one GPU: all processes share weights, gradients, EMA and optimizer state.

Accelerate turns it on (`accelerate launch --use_fsdp`, see docs/long_runs.md). Checkpoints hold full tensors
all the same, so a run may resume with or without FSDP, and sampling needs nothing special.

torch.distributed.checkpoint.state_dict does not replace the functions below: it names the entries of the
optimizer's state after the parameters, and checkpoints number them, as plain optimizers do.
"""

import os
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, convert_to_fp32
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from config import UserError


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP shards the model over the processes."""
    return accelerator.distributed_type == DistributedType.FSDP


def prepare_sharding(accelerator: Accelerator) -> None:
    """Set Accelerate's FSDP up for this network, if it is turned on. UserError for FSDP's older version."""
    wants_sharding = os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.num_processes > 1
    if wants_sharding and accelerator.device.type == "cpu":
        # Accelerate ignores FSDP on a CPU; the tests need it there
        for state in (PartialState(), accelerator.state):
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if not is_sharded(accelerator):
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise UserError("--fsdp_version 1: is not supported; use --fsdp_version 2")
    # The launcher's default, which fails at buffers such as the positions
    plugin.cpu_ram_efficient_loading = False
    # Weights stay in float32; see `forward`
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


def forward(accelerator: Accelerator, model: torch.nn.Module, *inputs: Tensor | None, **options: Any) -> Any:
    """Call the prepared model in the accelerator's precision.

    Accelerate wraps the forward pass of every model in autocast, except that of a sharded one, whose weights
    it casts as a whole. Router and dechunk need theirs in float32, so the autocast is added here.
    """
    if not is_sharded(accelerator):
        return model(*inputs, **options)
    with accelerator.autocast():
        return convert_to_fp32(model(*inputs, **options))


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor on its own device, gathered if it is sharded. Collective then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_full_state(state: Any) -> Any:
    """A state dict, or any plain data, with full tensors on the CPU in place of sharded ones. Collective."""
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, dict):
        gathered = {key: gather_full_state(item) for key, item in state.items()}
        return type(state)(gathered)
    if isinstance(state, list):
        return [gather_full_state(item) for item in state]
    return state


def shard_optimizer_state(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """An optimizer's state dict with its full tensors sharded like the parameters that they belong to."""
    # The state numbers parameters in the order of the groups
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    moments = {}
    for number, entry in state["state"].items():
        moments[number] = {name: shard_like(value, parameters[number]) for name, value in entry.items()}
    return {**state, "state": moments}


def shard_like(value: Any, parameter: Tensor) -> Any:
    """A tensor of a sharded parameter's shape, sharded like it. Other values, such as step counts, as is."""
    if not isinstance(parameter, DTensor):
        return value
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
