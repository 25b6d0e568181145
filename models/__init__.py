"""Noised latents -> epsilon and sigma. `build_model(config)` is the entry point; start reading at dc_dit.py."""

from config import Config, parse_layout
from models.dc_dit import DCDiT


def build_model(config: Config) -> DCDiT:
    """Build the freshly initialised denoiser that a configuration describes (draws from torch's global generator)."""
    model, training, hnet = config.model, config.training, config.model.hnet
    layout = parse_layout(hnet.arch_layout)
    return DCDiT(
        side=config.latent_size,
        channels=config.data.latent_channels,
        num_classes=config.data.num_classes,
        null_label=training.class_dropout_prob > 0,
        encoder_blocks=layout.encoder_blocks,
        main_blocks=layout.main_blocks,
        decoder_blocks=layout.decoder_blocks,
        width=config.d_model,
        conv_width=config.encoder_width,
        heads=hnet.num_heads[1],
        mlp_ratio=model.mlp_ratio,
        learn_sigma=training.learn_sigma,
        sigma=hnet.dechunk_kernel_sigma,
        fp32_scaffold=hnet.fp32_router_dechunk,
        attention=model.attention,
        init=model.init,
        gradient_checkpointing=training.gradient_checkpointing,
    )
