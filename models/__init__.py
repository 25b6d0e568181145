"""Noised latents -> predicted noise. `build_model(config)` is the entry point; start reading at dc_dit.py."""

import torch

from config import Config, parse_layout, to_yaml
from models.attention import attend_by_sample
from models.blocks import DiTBlock
from models.dc_dit import DCDiT
from models.dit import DiT
from models.router import ROUTERS
from models.types import Architecture


def architecture(config: Config) -> Architecture:
    """The part of a configuration that the networks are built from."""
    model, training, hnet = config.model, config.training, config.model.hnet
    layout = parse_layout(hnet.arch_layout)
    return Architecture(
        latent_grid=config.latent_grid,
        latent_channels=config.data.latent_channels,
        num_classes=config.data.num_classes,
        has_null_label=training.class_dropout_prob > 0,
        main_blocks=layout.main_blocks,
        width=config.d_model,
        heads=hnet.num_heads[1],  # of the main network
        mlp_ratio=model.mlp_ratio,
        learn_sigma=training.learn_sigma,
        timestep_divisor=model.timestep_divisor,
        patch=model.patch_size,
        conditions=tuple(config.data.conditions.items()),
        encoder_blocks=layout.encoder_blocks,
        decoder_blocks=layout.decoder_blocks,
        conv_width=config.encoder_width,
        router=model.router,
        downsample_factor=training.downsample_factor,
        min_tokens=model.min_tokens,
        smoothing_sigma=hnet.dechunk_kernel_sigma,
        has_residual=model.residual_projection,
        fp32_chunking=hnet.fp32_router_dechunk is not False,  # true or tf32
        attention=model.attention,
        init=model.init,
        gradient_checkpointing=training.gradient_checkpointing,
    )


def build_model(config: Config) -> DCDiT | DiT:
    """Build the denoiser that a configuration describes, initialised from torch's global generator."""
    if config.is_static:
        return DiT(architecture(config))
    return DCDiT(architecture(config))


def draws_at_random(config: Config) -> bool:
    """Whether the network must be given numbers to draw from, as `draw`."""
    return not config.is_static and ROUTERS[config.model.router].is_random


def describe(config: Config) -> str:
    """The resolved configuration, the number of parameters and the number of tokens, for people."""
    with torch.device("meta"):
        model = build_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = f"{config.tokens} per image ({config.token_grid})"
    return f"{to_yaml(config)}\nparameters    {parameters:,}\ntokens        {tokens}"


def compile_parts(model: DCDiT | DiT, backend: str = "inductor") -> None:
    """Have torch.compile fuse the transformer blocks, the encoder and the decoder, in place; names of weights stay.

    The compiler takes the number of tokens for fixed until it sees a second one. It therefore compiles in the
    first two batches and in no later one. Attention sample by sample (MPS, and float64 on CUDA) stays outside
    the graphs: it would need a new one for every list of lengths.
    """
    for block in model.blocks:
        assert isinstance(block, DiTBlock)
        block.attn.attend_by_sample = torch.compiler.disable(attend_by_sample)
        block.compile(backend=backend)
    if isinstance(model, DCDiT):
        model.encoder.compile(backend=backend)
        model.decoder.compile(backend=backend)
