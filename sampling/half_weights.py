"""A network whose weights are in half precision already: autocast would cast them in every evaluation."""

import copy

import torch
from torch import Tensor, nn

from models.dc_dit import CHUNKING, DCDiT
from models.dit import DiT


def with_half_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a network that computes the same under autocast, its weights cast once and not in every evaluation.

    It shares everything else. A compiled network is returned as it is, because its copy would be compiled again;
    so is a network that casts its weights itself.
    """
    if not isinstance(model, DCDiT | DiT) or any(part._compiled_call_impl for part in model.modules()):
        return model
    return replace_weights(model, cast_weights(model, dtype), "")


def replace_weights(module: nn.Module, weights: dict[str, Tensor], prefix: str) -> nn.Module:
    """A copy of a module, and of those within it, that has other weights, by name, and shares the rest with it."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    for name in module._parameters:
        if prefix + name in weights:
            twin._parameters[name] = nn.Parameter(weights[prefix + name], requires_grad=False)
    # A child of two names has one entry in `named_children`, and one that is None has none
    twin._modules = dict(module._modules)
    for name, child in module.named_children():
        twin._modules[name] = replace_weights(child, weights, f"{prefix}{name}.")
    return twin


def cast_weights(model: DCDiT | DiT, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the weights that autocast would cast, by name."""
    in_float32 = CHUNKING if isinstance(model, DCDiT) and model.fp32_chunking else ()
    copies = {}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not prefix.startswith(in_float32):
            for name, parameter in module.named_parameters():
                copies[f"{prefix}.{name}"] = parameter.detach().to(dtype)
    return copies
