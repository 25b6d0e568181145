"""DC-DiT: a Diffusion Transformer over learned chunks (arXiv 2603.06351), one chunking stage."""

import torch
from torch import Tensor, nn

from models.blocks import FinalLayer, RMSNorm, build_blocks, run_blocks
from models.conv import build_decoder, build_encoder, to_grid, to_tokens
from models.dechunk import Dechunk
from models.embeddings import LabelEmbedder, TimestepEmbedder, sincos_positions
from models.init import init_transformer, zero_layers
from models.packing import pack, plan_packing
from models.router import INITIAL_BIAS, Router
from models.types import Architecture, DenoiserOutput


class DCDiT(nn.Module):
    """Noised latents -> epsilon and variance logits, with a learned number of tokens in the transformer."""

    def __init__(self, architecture: Architecture):
        super().__init__()
        a = architecture
        self.fp32_scaffold = a.fp32_scaffold
        self.gradient_checkpointing = a.gradient_checkpointing
        self.x_embedder = nn.Conv2d(a.latent_channels, a.conv_width, 3, padding=1)
        self.t_embedder = TimestepEmbedder(a.width, a.timestep_divisor)
        self.y_embedder = LabelEmbedder(a.num_classes, a.width, a.has_null_label)
        self.register_buffer("pos_embed", sincos_positions(a.width, a.latent_side))  # (L, D)
        self.encoder = build_encoder(a.encoder_blocks, a.conv_width, a.width)
        self.router = Router(a.width)
        self.residual_proj = nn.Linear(a.width, a.width)
        self.blocks = build_blocks(a)
        self.norm = RMSNorm(a.width)
        self.dechunk = Dechunk(a.latent_side, a.smoothing_sigma)
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
    ) -> DenoiserOutput:
        """Predict the noise in x_t.

        Args:
            x_t: (B, C, S, S). t: (B,) timesteps. labels: (B,) int64.
            drop: fraction of the kept tokens to drop, in [0, 1): one number, one per sample (B,), or None.
            tokens: keep exactly so many instead, in [2, L]: one number, one per sample, or None. Nothing then waits for the
                device to say how many tokens there are.
        """
        c = self.t_embedder(t) + self.y_embedder(labels)  # (B, D)
        x = self.x_embedder(x_t.contiguous(memory_format=torch.channels_last))  # (B, E, S, S)
        features = self.encoder(x, c)  # (B, D, S, S)
        with self.scaffold_precision(features):
            features = features.float() if self.fp32_scaffold else features
            routing = self.router(features, drop, tokens)  # (B, L)
            residual = self.residual_proj(to_tokens(features))  # (B, L, D)
        packing = plan_packing(routing.keep, tokens)
        u = pack(to_tokens(features), packing) + self.pos_embed.index_select(
            0, packing.index % len(self.pos_embed)
        )  # (T, D)
        u = self.norm(run_blocks(self.blocks, u, c, packing, self.gradient_checkpointing))
        with self.scaffold_precision(u):
            u = u.float() if self.fp32_scaffold else u
            h = self.dechunk(u, routing, packing).add_(residual)  # (B, L, D)
        h = self.decoder(to_grid(h), c)  # (B, E, S, S)
        prediction = to_grid(self.final_layer(to_tokens(h), c))  # (B, 2C, S, S)
        return DenoiserOutput(prediction, routing)

    def scaffold_precision(self, x: Tensor):
        """Switch autocast off around router, residual projection and dechunk when they are to run in float32."""
        enabled = torch.is_autocast_enabled(x.device.type) and not self.fp32_scaffold
        return torch.autocast(x.device.type, enabled=enabled)


@torch.no_grad()
def init_weights(model: DCDiT, init: str) -> None:
    """Initialise every parameter that does not keep PyTorch's own start.

    "adaln_zero": the DiT blocks' modulation and the residual projection start at zero, as the DiT and H-Net papers intend.
    "released": they start Xavier-uniform, which is what the official code really does.
    Both: linear layers Xavier-uniform with zero bias, tables and timestep MLP N(0, 0.02), the final layer zero, the router's
    last bias so that about one token in four scores as a boundary.
    """
    init_transformer(model, zero_blocks=init == "adaln_zero")
    nn.init.constant_(model.router.residual_scorer[-1].bias, INITIAL_BIAS)
    if init == "adaln_zero":
        zero_layers(model.residual_proj)
