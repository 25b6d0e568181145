"""Closed-form FLOPs of one forward pass, per component, and a table of them for a configuration, with no weights.

    python -m models.flops --config configs/DCDiT-B-N4.yaml

Convention: 2 per multiply-add; convolutions, matrix products and linear layers only (no norms, activations or additions);
attention scores and values at 2 * 2 * D per token pair plus 3 per head and pair for the softmax; every sample's own token
pairs. Published DiT figures count multiply-adds: half of these.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cli
from config import Config, UserError, downsample_factors, load_config
from models import architecture, describe
from models.blocks import block_ratios
from models.types import Architecture

# Dense half-precision peak of one GPU in FLOP/s, from the makers' data sheets; the longest name that is part of the device's.
HALF_PRECISION_PEAKS = {
    "A100": 312e12, "H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12, "B200": 2250e12, "L4": 121e12,
    "L40S": 362e12, "A10": 125e12, "A40": 150e12, "RTX A6000": 155e12, "RTX 3090": 71e12, "RTX 4090": 165e12,
    "RTX 5090": 210e12, "MI250X": 383e12, "MI300X": 1307e12,
}  # fmt: skip

# What the autoencoder needs to be known by, of the published ones that the configurations name.
STABLE_DIFFUSION = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "out_channels": 3,
}  # fmt: skip


class TokenCounts(NamedTuple):
    """Kept tokens per image: the mean, and the mean square, with which attention grows. Numbers or arrays."""

    mean: float
    mean_square: float


def total_flops(network: Architecture, kept: TokenCounts) -> float:
    """FLOPs per image and forward pass of the whole network, the autoencoder aside."""
    return sum(forward_flops(network, kept).values())


def forward_flops(network: Architecture, kept: TokenCounts) -> dict[str, float]:
    """FLOPs per image and forward pass by component; their sum is the whole network, the autoencoder aside.

    A static DiT computes all its tokens: `kept` does not matter there.
    """
    if network.is_static:
        return static_dit_flops(network)
    d, e, length = network.width, network.conv_width, network.tokens
    ratios = block_ratios(network)
    return {
        "embeddings": _conv(length, network.latent_channels, e, 3) + _timestep(d),
        "encoder": _stack(length, [e] * network.encoder_blocks + [d], d),
        "router": _router(length, d),
        "residual_proj": 2 * length * d * d,
        "blocks": sum(_block(d, kept.mean, ratio) for ratio in ratios),
        "attention": len(ratios) * _attention(d, network.heads, kept.mean_square),
        "dechunk": 2 * 2 * length * network.latent_side * (d + 1),
        "decoder": _stack(length, [d] + [e] * network.decoder_blocks, d),
        "final_layer": _final_layer(length, e, network.out_channels, d),
    }


def static_dit_flops(network: Architecture) -> dict[str, float]:
    """FLOPs per image and forward pass of a static DiT (arXiv 2212.09748), by component.

    The published multiply-adds are half of this without the softmax, plus one per element and LayerNorm.
    """
    d, tokens, ratios = network.width, network.tokens, block_ratios(network)
    return {
        "embeddings": _conv(tokens, network.latent_channels, d, network.patch) + _timestep(d),
        "blocks": sum(_block(d, tokens, ratio) for ratio in ratios),
        "attention": len(ratios) * _attention(d, network.heads, tokens**2),
        "final_layer": _final_layer(tokens, d, network.out_channels * network.patch**2, d),
    }


def decoder_flops(vae: Mapping, side: int) -> dict[str, float]:
    """FLOPs to decode one latent of side x side cells, from the configuration of a diffusers AutoencoderKL.

    Its decoder is [1x1 convolution], 3x3 convolution, two residual blocks around an attention over all cells, and
    `layers_per_block` + 1 residual blocks per resolution, with nearest-neighbour upsampling and a 3x3 convolution between.
    """
    widths, layers = list(vae["block_out_channels"])[::-1], vae["layers_per_block"] + 1
    latent, cells, top = vae["latent_channels"], side * side, widths[0]
    quantised = _conv(cells, latent, latent, 1) if vae.get("use_post_quant_conv", True) else 0
    parts = {
        "input": quantised + _conv(cells, latent, top, 3),
        "middle": 2 * _residual_block(cells, top, top),
    }
    if vae.get("mid_block_add_attention", True):
        parts["middle"] += 2 * cells * 4 * top**2 + _attention(top, 1, cells**2)
    parts["blocks"] = parts["upsampling"] = 0
    for before, width, following in zip([top, *widths], widths, [*widths[1:], None]):
        parts["blocks"] += _residual_block(cells, before, width) + (layers - 1) * _residual_block(
            cells, width, width
        )
        if following is not None:
            cells *= 4
            parts["upsampling"] += _conv(cells, width, width, 3)
    parts["output"] = _conv(cells, widths[-1], vae["out_channels"], 3)
    return parts


def peak_flops(device: str) -> float | None:
    """Half-precision peak of a GPU by the name that the driver gives it, or None where it is not known."""
    found = [
        name for name in HALF_PRECISION_PEAKS if set(name.split()) <= set(device.replace("-", " ").split())
    ]
    return HALF_PRECISION_PEAKS[max(found, key=len)] if found else None


def _conv(length: int, width_in: int, width_out: int, kernel: int) -> float:
    return 2 * length * width_in * width_out * kernel**2


def _timestep(d: int) -> float:
    return 2 * (256 * d + d * d)


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


def _attention(d: int, heads: int, pairs: float) -> float:
    """Scores, softmax and values for so many token pairs."""
    return pairs * (4 * d + 3 * heads)


def _final_layer(length: int, width: int, out: int, d: int) -> float:
    return 2 * length * width * out + 2 * d * 2 * width


def _residual_block(cells: int, width_in: int, width_out: int) -> float:
    """Of the autoencoder: two 3x3 convolutions, and a 1x1 skip where the width changes."""
    skip = _conv(cells, width_in, width_out, 1) if width_in != width_out else 0
    return _conv(cells, width_in, width_out, 3) + _conv(cells, width_out, width_out, 3) + skip


def table(config: Config, fractions: Sequence[float], natural: float, steps: int) -> str:
    """GFLOP of one forward pass by component (rows) at several dropped fractions (columns), and TFLOP per image below.

    Args:
        natural: share of the tokens that the router keeps by itself; every image is taken to keep the same number.
        steps: of the sampler.
    """
    counts = [max(2, round(natural * config.tokens * (1 - fraction))) for fraction in fractions]
    columns = [forward_flops(architecture(config), TokenCounts(count, count**2)) for count in counts]
    totals = [sum(column.values()) for column in columns]
    rows = [
        ("dropped", [f"{fraction:g}" for fraction in fractions]),
        ("kept tokens", [str(count) for count in counts]),
    ]
    rows += [(name, [f"{column[name] / 1e9:.3f}" for column in columns]) for name in columns[0]]
    rows += [("GFLOP per forward pass", [f"{total / 1e9:.3f}" for total in totals])]
    rows += [(f"TFLOP per image, {steps} steps", [f"{total * steps / 1e12:.3f}" for total in totals])]
    rows += [("the same with guidance", [f"{2 * total * steps / 1e12:.3f}" for total in totals])]
    return "\n".join(f"{name:<28}" + "".join(f"{value:>12}" for value in values) for name, values in rows)


def decoder_config(vae: str) -> Mapping:
    """Configuration of an autoencoder by its name, or of a local diffusers folder."""
    if vae in ("ema", "mse"):
        return STABLE_DIFFUSION
    try:
        return json.loads((Path(vae) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"data.vae: '{vae}' is neither ema, mse nor a diffusers folder; make one, or name another"
        ) from None


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    cli.add_config_arguments(parser)
    parser.add_argument("--budgets", type=float, nargs="+", help="dropped fractions (default: 0 0.2 0.4 0.6)")
    parser.add_argument(
        "--kept", type=float, help="share of the tokens that the router keeps by itself (default: 1 / N)"
    )
    parser.add_argument("--num-sampling-steps", type=int, default=250, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    config = load_config(args.config, args.set)
    static = config.is_static
    if static and (args.budgets or args.kept):
        raise UserError("--budgets, --kept: a static DiT has no router and keeps every token; leave them out")
    budgets = args.budgets or ([0] if static else [0, 0.2, 0.4, 0.6])
    kept = (
        args.kept
        if args.kept is not None
        else (1 if static else 1 / downsample_factors(config.training.downsample_factor))
    )
    for option, value, fits in (
        *(("--budgets", fraction, 0 <= fraction < 1) for fraction in budgets),
        ("--kept", kept, 0 < kept <= 1),
        ("--num-sampling-steps", args.num_sampling_steps, args.num_sampling_steps >= 1),
    ):
        if not fits:
            raise UserError(
                f"{option} {value}: is out of range; dropped fractions are in [0, 1), a share in (0, 1], steps >= 1"
            )
    if args.dry_run:
        print(describe(config))
        return
    decoding = sum(decoder_flops(decoder_config(config.data.vae), config.latent_size).values())
    print(
        f"{config.model.name}: {config.tokens} tokens per image, 2 FLOP per multiply-add, GFLOP per forward pass\n"
    )
    print(table(config, budgets, kept, args.num_sampling_steps))
    print(f"\nautoencoder: {decoding / 1e12:.3f} TFLOP more to decode an image")


if __name__ == "__main__":
    cli.run(main)
