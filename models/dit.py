"""The static DiT (arXiv 2212.09748): a Diffusion Transformer over fixed patches, the baseline of DC-DiT.

It has the interface of models/dc_dit.py without `draw`, and a routing that keeps every patch. Its parameters
have the names of the published checkpoints, apart from `x_embedder` and `y_embedder` (see weights/foreign.py).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grid import Grid
from models.blocks import FinalLayer, build_blocks, run_blocks
from models.conv import to_tokens
from models.embeddings import Conditioner, LabelEmbedder, TimestepEmbedder, sincos_positions
from models.init import init_transformer
from models.packing import full_packing
from models.types import Architecture, DenoiserOutput, Routing


class DiT(nn.Module):
    """Noised latents -> epsilon or velocity, and variance logits, with one token per patch of P x P cells.

    Raises:
        ValueError: an architecture without a patch size.
    """

    pos_embed: Tensor

    def __init__(self, architecture: Architecture):
        super().__init__()
        a = architecture
        if a.patch is None:
            raise ValueError("a static DiT needs a patch size")
        self.patch = a.patch
        self.grid = a.token_grid
        self.gradient_checkpointing = a.gradient_checkpointing
        self.x_embedder = nn.Conv2d(a.latent_channels, a.width, a.patch, stride=a.patch)
        self.t_embedder = TimestepEmbedder(a.width, a.timestep_divisor)
        self.y_embedder = LabelEmbedder(a.num_classes, a.width, a.has_null_label)
        self.conditioner = Conditioner(dict(a.conditions), a.width)
        self.register_buffer("pos_embed", sincos_positions(a.width, self.grid))  # (L, D)
        self.blocks = build_blocks(a)
        self.final_layer = FinalLayer(a.width, a.width, a.patch**2 * a.out_channels)
        init_transformer(self, zero_blocks=a.init == "adaln_zero")

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor,
        drop: Tensor | float | None = None,
        tokens: int | list[int] | None = None,
        hidden: tuple[int, ...] = (),
        conditions: Mapping[str, Tensor] | None = None,
    ) -> DenoiserOutput:
        """Predict what the process asks for, epsilon or velocity.

        Args:
            x_t: (B, C, S, S). t: (B,) timesteps. labels: (B,) int64.
            drop, tokens: a DC-DiT's budget; must be None.
            hidden: indices of the transformer blocks whose tokens are wanted too.
            conditions: by name, values (B, ...) beside the class; NaN, or no entry, is no condition.
        """
        if drop is not None or tokens is not None:
            raise ValueError("a static DiT has no router and takes no budget")
        c = self.t_embedder(t) + self.y_embedder(labels)  # (B, D)
        c = self.conditioner(c, conditions)
        u = to_tokens(self.x_embedder(x_t)) + self.pos_embed  # (B, L, D)
        batch, length, _ = u.shape

        # All tokens go through the transformer, packed like those of a DC-DiT
        packing = full_packing(batch, length, u.device)
        u = u.flatten(0, 1)  # (B L, D)
        u, outputs = run_blocks(self.blocks, u, c, packing, self.gradient_checkpointing, hidden)

        patches = self.final_layer(u.unflatten(0, (batch, length)), c)  # (B, L, P P C) or (B, L, P P 2C)
        prediction = unpatchify(patches, self.patch, self.grid)  # (B, C or 2C, S, S)
        routing = keep_all(batch, length, u.device)
        return DenoiserOutput(prediction, routing, packing, outputs)


def unpatchify(patches: Tensor, patch: int, grid: Grid) -> Tensor:
    """(B, L, P P C), channels varying fastest and then columns -> (B, C, S, S), for this grid of patches."""
    # (B, row, column, row in the patch, column in the patch, C)
    pixels = patches.view(len(patches), *grid, patch, patch, -1)
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def keep_all(batch: int, length: int, device: torch.device) -> Routing:
    """The routing of a model that keeps every token."""
    keep = torch.ones(batch, length, dtype=torch.bool, device=device)
    return Routing(keep.float(), keep, keep)
