"""The initialisation that DiT and DC-DiT share."""

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def init_transformer(model: Any, zero_blocks: bool) -> None:
    """Stem and linear layers Xavier-uniform, label table and timestep MLP normal with std 0.02, final layer zero.

    Args:
        model: a DiT or DC-DiT.
        zero_blocks: the blocks' modulation starts at zero (adaLN-Zero), so that every block starts as the identity.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    # The stem starts like a linear layer on its patch, the embeddings small
    stem = model.x_embedder.weight
    nn.init.xavier_uniform_(stem.view(len(stem), -1))
    nn.init.zeros_(model.x_embedder.bias)
    nn.init.normal_(model.y_embedder.table.weight, std=0.02)
    for layer in (model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        nn.init.normal_(layer.weight, std=0.02)
    model.conditioner.start()

    # A prediction of zero, and blocks that are the identity
    zero_layers(model.final_layer.linear, model.final_layer.adaLN_modulation[1])
    if zero_blocks:
        zero_layers(*(block.adaLN_modulation[1] for block in model.blocks))


@torch.no_grad()
def zero_layers(*layers: nn.Linear | nn.Conv2d) -> None:
    """Set weights and biases to zero."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
