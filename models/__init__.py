"""Noised latents -> epsilon and sigma. `build_model(config)` is the entry point; start reading at dc_dit.py."""

import torch

from config import Config, parse_layout
from models import attention
from models.dc_dit import DCDiT
from models.dit import DiT


def build_model(config: Config) -> DCDiT | DiT:
    """Build the freshly initialised denoiser that a configuration describes (draws from torch's global generator)."""
    model, training, hnet = config.model, config.training, config.model.hnet
    layout = parse_layout(hnet.arch_layout)
    shared = dict(
        side=config.latent_size,
        channels=config.data.latent_channels,
        num_classes=config.data.num_classes,
        null_label=training.class_dropout_prob > 0,
        main_blocks=layout.main_blocks,
        width=config.d_model,
        heads=hnet.num_heads[1],
        mlp_ratio=model.mlp_ratio,
        learn_sigma=training.learn_sigma,
        attention=model.attention,
        init=model.init,
        gradient_checkpointing=training.gradient_checkpointing,
        timestep_divisor=model.timestep_divisor,
    )
    if model.patch_size is not None:
        return DiT(patch=model.patch_size, **shared)
    return DCDiT(
        encoder_blocks=layout.encoder_blocks,
        decoder_blocks=layout.decoder_blocks,
        conv_width=config.encoder_width,
        sigma=hnet.dechunk_kernel_sigma,
        fp32_scaffold=hnet.fp32_router_dechunk is not False,
        **shared,
    )


def compile_parts(model: DCDiT | DiT, backend: str = "inductor") -> None:
    """Have torch.compile fuse the transformer blocks, the encoder and the decoder, in place; names of weights stay.

    Token counts become dynamic when a second one is seen, so compilation ends with the second batch. Where attention has
    neither a kernel for packed tokens nor the CPU's operation (CUDA in float32, MPS), it runs between two parts of a block.
    """
    attention.by_sample = torch.compiler.disable(
        attention.by_sample
    )  # else: one graph for every list of lengths
    scaffold = (model.encoder, model.decoder) if isinstance(model, DCDiT) else ()
    for part in (*model.blocks, *scaffold):
        part.compile(backend=backend)
