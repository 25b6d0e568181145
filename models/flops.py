"""Closed-form FLOPs of one forward pass, per component, and a table of them for a configuration, with no weights.

    python -m models.flops --config configs/DCDiT-B-N4.yaml

Convention: 2 per multiply-add of convolutions, matrix products and linear layers. Attention counts 2 * 2 * D per
token pair within a sample for scores and values, and 3 per head and pair for the softmax. Norms, other activations
and additions do not count. Published DiT figures count multiply-adds, which are half of these.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cli
from config import Config, UserError, load_config
from grid import Grid
from models import architecture, describe
from models.blocks import block_ratios
from models.router import ROUTERS
from models.types import Architecture

# Dense half-precision peak of one GPU in FLOP/s, from the makers' data sheets.
HALF_PRECISION_PEAKS = {
    "A100": 312e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L4": 121e12,
    "L40S": 362e12,
    "A10": 125e12,
    "A40": 150e12,
    "RTX A6000": 155e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "RTX 5090": 210e12,
    "MI250X": 383e12,
    "MI300X": 1307e12,
}

# The part of the configuration of the published Stable Diffusion autoencoders that FLOPs follow from.
STABLE_DIFFUSION: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "out_channels": 3,
}


class TokenCounts(NamedTuple):
    """Kept tokens per image, as numbers or as arrays or tensors of them."""

    mean: Any
    mean_square: Any  # attention grows with the square


def total_flops(network: Architecture, kept: TokenCounts) -> Any:
    """FLOPs per image and forward pass of the whole network, the autoencoder aside."""
    return sum(forward_flops(network, kept).values())


def forward_flops(network: Architecture, kept: TokenCounts) -> dict[str, Any]:
    """FLOPs per image and forward pass by component; their sum is the whole network, the autoencoder aside.

    A static DiT computes all its tokens: `kept` does not matter there.
    """
    if network.is_static:
        return static_dit_flops(network)
    d = network.width
    e = network.conv_width
    length = network.tokens
    ratios = block_ratios(network)
    return {
        "embeddings": _conv(length, network.latent_channels, e, 3) + _timestep(d),
        "encoder": _stack(length, [e] * network.encoder_blocks + [d], d),
        "router": ROUTERS[network.router].flops(length, d),
        "residual_proj": 2 * length * d * d if network.has_residual else 0,
        "blocks": sum(_block(d, kept.mean, ratio) for ratio in ratios),
        "attention": len(ratios) * _attention(d, network.heads, kept.mean_square),
        "dechunk": 2 * length * sum(network.latent_grid) * (d + 1) if network.smoothing_sigma else 0,
        "decoder": _stack(length, [d] + [e] * network.decoder_blocks, d),
        "final_layer": _final_layer(length, e, network.out_channels, d),
    }


def static_dit_flops(network: Architecture) -> dict[str, float]:
    """FLOPs per image and forward pass of a static DiT (arXiv 2212.09748), by component.

    Published multiply-adds = (this - softmax) / 2 + one per element of each LayerNorm.
    """
    d = network.width
    patch = network.patch or 1
    tokens = network.tokens
    ratios = block_ratios(network)
    return {
        "embeddings": _conv(tokens, network.latent_channels, d, patch) + _timestep(d),
        "blocks": sum(_block(d, tokens, ratio) for ratio in ratios),
        "attention": len(ratios) * _attention(d, network.heads, tokens**2),
        "final_layer": _final_layer(tokens, d, network.out_channels * patch**2, d),
    }


def decoder_flops(vae: Mapping[str, Any], grid: Grid) -> dict[str, float]:
    """FLOPs to decode one latent of this grid, from the configuration of a diffusers AutoencoderKL.

    Its decoder is an optional 1x1 convolution, a 3x3 convolution, two residual blocks around an attention over all
    cells, `layers_per_block` + 1 residual blocks per resolution with nearest-neighbour upsampling and a 3x3
    convolution between, and a last 3x3 convolution.
    """
    widths = list(vae["block_out_channels"])[::-1]
    layers = vae["layers_per_block"] + 1
    latent = vae["latent_channels"]
    cells = grid.cells
    top = widths[0]

    # From the latent to the widest blocks, at the latent's resolution
    quantised = _conv(cells, latent, latent, 1) if vae.get("use_post_quant_conv", True) else 0
    parts = {
        "input": quantised + _conv(cells, latent, top, 3),
        "middle": 2 * _residual_block(cells, top, top),
    }
    if vae.get("mid_block_add_attention", True):
        parts["middle"] += 2 * cells * 4 * top**2 + _attention(top, 1, cells**2)

    # Residual blocks and upsampling, resolution by resolution
    parts["blocks"] = 0
    parts["upsampling"] = 0
    before = top
    for level, width in enumerate(widths):
        parts["blocks"] += _residual_block(cells, before, width)
        parts["blocks"] += (layers - 1) * _residual_block(cells, width, width)
        if level < len(widths) - 1:
            cells *= 4
            parts["upsampling"] += _conv(cells, width, width, 3)
        before = width
    parts["output"] = _conv(cells, widths[-1], vae["out_channels"], 3)
    return parts


def peak_flops(device: str) -> float | None:
    """Half-precision peak of a GPU by the name that its driver reports; None if it is unknown.

    Of the known names whose words all occur in the driver's, the longest decides: "H100 PCIe" before "H100".
    """
    words = set(device.replace("-", " ").split())
    known = [name for name in HALF_PRECISION_PEAKS if set(name.split()) <= words]
    return HALF_PRECISION_PEAKS[max(known, key=len)] if known else None


# --------------------------------------------------------------------------------------------- formulas of parts


def _conv(cells: int, width_in: int, width_out: int, kernel: int) -> float:
    """A convolution with a square kernel that keeps the grid."""
    return 2 * cells * width_in * width_out * kernel**2


def _timestep(d: int) -> float:
    """The MLP on 256 sinusoidal features."""
    return 2 * (256 * d + d * d)


def _stack(cells: int, widths: list[int], d: int) -> float:
    """Convolution blocks: two 3x3 convolutions, the conditioning, and a 1x1 skip where the width changes."""
    total = 0.0
    for width_in, width_out in zip(widths, widths[1:]):
        inner = min(width_in, width_out)
        total += _conv(cells, width_in, inner, 3)
        total += 2 * d * inner
        total += _conv(cells, inner, width_out, 3)
        if width_in != width_out:
            total += _conv(cells, width_in, width_out, 1)
    return total


def _block(d: int, tokens: Any, mlp_ratio: float) -> Any:
    """qkv, output projection and MLP per kept token; the modulation once per image."""
    hidden = int(d * mlp_ratio)
    per_token = 4 * d * d + 2 * d * hidden
    return 2 * tokens * per_token + 2 * d * 6 * d


def _attention(d: int, heads: int, pairs: Any) -> Any:
    """Scores, softmax and values for this number of token pairs."""
    return pairs * (4 * d + 3 * heads)


def _final_layer(cells: int, width: int, out: int, d: int) -> float:
    """The linear layer per token; the modulation once per image."""
    return 2 * cells * width * out + 2 * d * 2 * width


def _residual_block(cells: int, width_in: int, width_out: int) -> float:
    """Of the autoencoder: two 3x3 convolutions, and a 1x1 skip where the width changes."""
    skip = _conv(cells, width_in, width_out, 1) if width_in != width_out else 0
    return _conv(cells, width_in, width_out, 3) + _conv(cells, width_out, width_out, 3) + skip


# ---------------------------------------------------------------------------------------------------- the table


def table(config: Config, fractions: Sequence[float], boundary_share: float, steps: int) -> str:
    """GFLOP of one forward pass by component (rows) at several dropped fractions (columns).

    Args:
        boundary_share: share of the tokens that the router keeps without a budget, the same in every image.
        steps: network evaluations per image.
    """
    network = architecture(config)
    counts = []
    columns = []
    for fraction in fractions:
        count = max(2, round(boundary_share * config.tokens * (1 - fraction)))
        counts.append(count)
        columns.append(forward_flops(network, TokenCounts(count, count**2)))
    totals = [sum(column.values()) for column in columns]

    rows = [
        ("dropped", [f"{fraction:g}" for fraction in fractions]),
        ("kept tokens", [str(count) for count in counts]),
    ]
    for name in columns[0]:
        rows.append((name, [f"{column[name] / 1e9:.3f}" for column in columns]))
    rows.append(("GFLOP per forward pass", [f"{total / 1e9:.3f}" for total in totals]))
    rows.append((f"TFLOP per image, {steps} steps", [f"{total * steps / 1e12:.3f}" for total in totals]))
    rows.append(("the same with guidance", [f"{2 * total * steps / 1e12:.3f}" for total in totals]))

    lines = []
    for name, values in rows:
        cells = "".join(f"{value:>12}" for value in values)
        lines.append(f"{name:<28}{cells}")
    return "\n".join(lines)


def decoder_config(vae: str) -> Mapping[str, Any]:
    """Configuration of an autoencoder by its name, or of a local diffusers folder."""
    is_full_name = vae.startswith("stabilityai/sd-vae-ft-") and not Path(vae).is_dir()
    if vae in ("ema", "mse") or is_full_name:
        return STABLE_DIFFUSION
    try:
        return json.loads((Path(vae) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"data.vae: '{vae}' is neither ema, mse nor a diffusers folder; make one, or name another"
        ) from None


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_config_arguments(parser)
    parser.add_argument("--budgets", type=float, nargs="+", help="dropped fractions (default: 0 0.2 0.4 0.6)")
    parser.add_argument(
        "--kept",
        type=float,
        help="share of the tokens that the router keeps without a budget (default: 1 / N)",
    )
    parser.add_argument("--num-sampling-steps", type=int, default=250, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    for fraction in args.budgets or []:
        if not 0 <= fraction < 1:
            raise UserError(f"--budgets {fraction}: must be in [0, 1)")
    if args.kept is not None and not 0 < args.kept <= 1:
        raise UserError(f"--kept {args.kept}: must be in (0, 1]")
    cli.check_at_least(args, 1, "num_sampling_steps")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    config = load_config(args.config, args.set)
    if config.is_static and (args.budgets or args.kept):
        raise UserError("--budgets, --kept: a static DiT has no router and keeps every token; leave them out")
    if args.dry_run:
        print(describe(config))
        return

    # Without a checkpoint, the router's share is its target
    target = 1.0 if config.is_static else 1 / config.training.downsample_factor
    boundary_share = args.kept or target
    fractions = args.budgets or ([0.0] if config.is_static else [0.0, 0.2, 0.4, 0.6])

    print(
        f"{config.model.name}: {config.tokens} tokens per image, 2 FLOP per multiply-add, GFLOP per forward pass\n"
    )
    print(table(config, fractions, boundary_share, args.num_sampling_steps))
    if config.data.vae.startswith("pixels"):
        return
    decoder = decoder_config(config.data.vae)
    if decoder.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        print(f"\nautoencoder: an {decoder['_class_name']} is counted when it is loaded, by sample.py")
        return
    decoding = sum(decoder_flops(decoder, config.latent_grid).values())
    print(f"\nautoencoder: {decoding / 1e12:.3f} TFLOP more to decode an image")


if __name__ == "__main__":
    cli.run(main)
