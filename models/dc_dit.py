"""DC-DiT: a Diffusion Transformer over learned chunks (arXiv 2603.06351), one chunking stage."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.blocks import FinalLayer, RMSNorm, build_blocks, run_blocks
from models.conv import build_decoder, build_encoder, to_grid, to_tokens
from models.dechunk import Dechunk
from models.embeddings import Conditioner, LabelEmbedder, TimestepEmbedder, sincos_positions
from models.init import init_transformer, zero_layers
from models.packing import pack, plan_packing
from models.router import ROUTERS
from models.types import Architecture, DenoiserOutput, Packing, Routing

TIMESTEP_BOUND = 1 << 20  # above every timestep

# Parts with weights that stay in float32 under autocast if `fp32_chunking` says so
CHUNKING = ("router", "residual_proj")


class DCDiT(nn.Module):
    """Noised latents -> epsilon or velocity, and variance logits; the number of tokens is learned."""

    pos_embed: Tensor

    def __init__(self, architecture: Architecture):
        super().__init__()
        a = architecture
        self.grid = a.latent_grid
        self.fp32_chunking = a.fp32_chunking
        self.gradient_checkpointing = a.gradient_checkpointing
        self.x_embedder = nn.Conv2d(a.latent_channels, a.conv_width, 3, padding=1)
        self.t_embedder = TimestepEmbedder(a.width, a.timestep_divisor)
        self.y_embedder = LabelEmbedder(a.num_classes, a.width, a.has_null_label)
        self.conditioner = Conditioner(dict(a.conditions), a.width)
        self.register_buffer("pos_embed", sincos_positions(a.width, self.grid))  # (L, D)
        self.encoder = build_encoder(a.encoder_blocks, a.conv_width, a.width)
        self.router = ROUTERS[a.router](a.width, a.downsample_factor)
        self.router.min_tokens = a.min_tokens
        self.residual_proj = nn.Linear(a.width, a.width) if a.has_residual else None
        self.blocks = build_blocks(a)
        self.norm = RMSNorm(a.width)
        self.dechunk = Dechunk(self.grid, a.smoothing_sigma)
        self.decoder = build_decoder(a.decoder_blocks, a.conv_width, a.width)
        self.final_layer = FinalLayer(a.conv_width, a.width, a.out_channels)
        init_weights(self, a.init)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor,
        drop: Tensor | float | None = None,
        tokens: int | list[int] | None = None,
        draw: Tensor | None = None,
        hidden: tuple[int, ...] = (),
        conditions: Mapping[str, Tensor] | None = None,
    ) -> DenoiserOutput:
        """Predict what the process asks for, epsilon or velocity.

        Args:
            x_t: (B, C, S, S). t: (B,) timesteps. labels: (B,) int64.
            drop: fraction of the boundary tokens to drop, in [0, 1): one number, one per sample (B,), or None.
            tokens: keep exactly this number, in [2, L]: one number, one per sample, or None. `drop` is then
                ignored, and the host knows all shapes without waiting for the device.
            draw: (B,) int64, from which a random router draws at each timestep; None: the row of the batch.
            hidden: indices of the transformer blocks whose tokens are wanted too.
            conditions: by name, values (B, ...) beside the class; NaN, or no entry, is no condition.
        """
        c = self.t_embedder(t) + self.y_embedder(labels)  # (B, D)
        c = self.conditioner(c, conditions)
        if self.router.is_random:
            draw = mix_timestep(draw, t)

        # Encode at full resolution and find the chunk boundaries
        x = self.x_embedder(x_t.contiguous(memory_format=torch.channels_last))  # (B, E, S, S)
        features = self.encoder(x, c)  # (B, D, S, S)
        routing, residual = self.route(features, drop, tokens, draw)  # (B, L), (B, L, D)

        # Only the kept tokens go through the transformer
        packing = plan_packing(routing.keep, tokens)
        u = pack(to_tokens(features), packing) + self.positions(packing)  # (T, D)
        u, outputs = run_blocks(self.blocks, u, c, packing, self.gradient_checkpointing, hidden)
        u = self.norm(u)

        # Give every cell a token again and decode
        h = self.plug_back(u, residual, routing, packing)  # (B, L, D)
        h = self.decoder(to_grid(h, self.grid), c)  # (B, E, S, S)
        prediction = to_grid(self.final_layer(to_tokens(h), c), self.grid)  # (B, C or 2C, S, S)
        return DenoiserOutput(prediction, routing, packing, outputs)

    def route(
        self,
        features: Tensor,
        drop: Tensor | float | None,
        tokens: int | list[int] | None,
        draw: Tensor | None,
    ) -> tuple[Routing, Tensor]:
        """Encoder output (B, D, S, S) -> the routing and the residual (B, L, D), in the precision of chunking.

        Without a residual projection, the residual is a zero (1, 1, 1).
        """
        with self.chunking_precision(features):
            features = self.to_chunking_precision(features)
            routing = self.router(features, drop, tokens, draw)
            if self.residual_proj is None:
                residual = features.new_zeros(1, 1, 1)
            else:
                residual = self.residual_proj(to_tokens(features))
        return routing, residual

    def plug_back(self, u: Tensor, residual: Tensor, routing: Routing, packing: Packing) -> Tensor:
        """Processed tokens (T, D) and the residual (B, L, D) -> (B, L, D), in the precision of chunking."""
        with self.chunking_precision(u):
            return self.dechunk(self.to_chunking_precision(u), residual, routing, packing)

    def positions(self, packing: Packing) -> Tensor:
        """Position embeddings of the kept tokens: (T, D)."""
        return self.pos_embed.index_select(0, packing.token_index % len(self.pos_embed))

    def chunking_precision(self, x: Tensor) -> torch.autocast:
        """Switch autocast off around router, residual projection and dechunk if they are to run in float32."""
        enabled = torch.is_autocast_enabled(x.device.type) and not self.fp32_chunking
        return torch.autocast(x.device.type, enabled=enabled)

    def to_chunking_precision(self, x: Tensor) -> Tensor:
        """The input of router, residual projection or dechunk in their precision."""
        return x.float() if self.fp32_chunking else x


def mix_timestep(draw: Tensor | None, t: Tensor) -> Tensor:
    """Another number for every sample and timestep: (B,), (B,) -> (B,) int64."""
    if draw is None:
        draw = torch.arange(len(t), device=t.device)
    return draw * TIMESTEP_BOUND + t.long()


@torch.no_grad()
def init_weights(model: DCDiT, init: str) -> None:
    """Initialise the stem, all linear layers and the embeddings; other convolutions and norms keep PyTorch's start.

    Args:
        init: "adaln_zero": the blocks' modulation and the residual projection start at zero, as the DiT and H-Net
            papers intend. "released": they start Xavier-uniform, which is what the official code does.

    In both, the stem and the linear layers start Xavier-uniform with zero bias, the label table and the timestep
    MLP normal with std 0.02, the final layer at zero, and the router as its `start` says.
    """
    init_transformer(model, zero_blocks=init == "adaln_zero")
    model.router.start()
    if init == "adaln_zero" and model.residual_proj is not None:
        zero_layers(model.residual_proj)
