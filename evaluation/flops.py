"""Closed-form FLOPs of one forward pass, per component.

Convention: 2 per multiply-add; convolutions, matrix products and linear layers only (no norms, activations or additions);
attention scores and values at 2 * 2 * D per token pair plus 3 per head and pair for the softmax; every sample's own token
pairs. Published DiT figures count multiply-adds: half of these.
"""

from typing import NamedTuple

from config import Config, parse_layout


class Kept(NamedTuple):
    """Kept tokens per image: the mean count, and the mean squared count, which attention grows with."""

    count: float
    squared: float


def forward_flops(config: Config, kept: Kept) -> dict[str, float]:
    """FLOPs per image and forward pass by component; their sum is the whole network, the autoencoder aside."""
    layout, hnet = parse_layout(config.model.hnet.arch_layout), config.model.hnet
    d, e, length = config.d_model, config.encoder_width, config.latent_size**2
    channels = config.data.latent_channels
    out = channels * (2 if config.training.learn_sigma else 1)
    return {
        "embeddings": _conv(length, channels, e, 3) + 2 * (256 * d + d * d),
        "encoder": _stack(length, [e] * layout.encoder_blocks + [d], d),
        "router": _router(length, d),
        "residual_proj": 2 * length * d * d,
        "blocks": sum(_block(d, kept.count, config.model.mlp_ratio if kind == "D" else 0) for kind in layout.main_blocks),
        "attention": len(layout.main_blocks) * hnet.num_heads[1] * kept.squared * (4 * d / hnet.num_heads[1] + 3),
        "dechunk": 2 * 2 * length * config.latent_size * (d + 1),
        "decoder": _stack(length, [d] + [e] * layout.decoder_blocks, d),
        "final_layer": 2 * length * e * out + 2 * d * 2 * e,
    }


def _conv(length: int, width_in: int, width_out: int, kernel: int) -> float:
    return 2 * length * width_in * width_out * kernel**2


def _stack(length: int, widths: list[int], d: int) -> float:
    """Convolution blocks: two 3x3 convolutions, the conditioning, and a 1x1 skip where the width changes."""
    total = 0.0
    for a, b in zip(widths, widths[1:]):
        inner = min(a, b)
        total += _conv(length, a, inner, 3) + _conv(length, inner, b, 3) + 2 * d * inner
        total += _conv(length, a, b, 1) if a != b else 0
    return total


def _router(length: int, d: int) -> float:
    q = d // 4
    return _conv(length, d, q, 1) + 2 * _conv(length, q, q, 3) + _conv(length, q, 1, 1)


def _block(d: int, tokens: float, mlp_ratio: float) -> float:
    """qkv, output projection and MLP per kept token; the modulation once per image."""
    return 2 * tokens * (4 * d * d + 2 * d * int(d * mlp_ratio)) + 2 * d * 6 * d
