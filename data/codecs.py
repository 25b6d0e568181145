"""Kinds of autoencoders: what each one's encoder, decoder, shift and scale are called. `CODECS` names them all.

data/autoencoder.py wraps one, and everything else sees scaled latents only. To add a kind, write a class with the
attributes and methods of `Codec`, and name it in `CODECS`.
"""

import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from grid import Grid

PIXELS = "pixels"


class Codec(Protocol):
    """An autoencoder in raw units. Pixels are (B, 3, H, W) of -1 to 1, latents (B, C, H / stride, W / stride)."""

    stride: int
    channels: int
    shift: list[float]  # a number per channel; (latent - shift) * scale has about unit variance
    scale: list[float]
    model: Any  # a torch module

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels."""
        ...


class KLCodec:
    """AutoencoderKL, of Stable Diffusion and many others."""

    def __init__(self, model: Any):
        self.model = model
        # Every down block but the last one halves the resolution.
        self.stride: int = 2 ** (len(model.config.down_block_types) - 1)
        self.channels: int = model.config.latent_channels
        self.shift, self.scale = shift_and_scale(model.config, self.channels)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.model.encode(pixels).latent_dist
        return posterior.mean, posterior.std

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents).sample


class NoiselessCodec:
    """An autoencoder of diffusers whose encoder gives latents, not a distribution of them."""

    output: str  # what diffusers calls them

    def __init__(self, model: Any):
        self.model = model
        self.stride = 2 ** (len(model.config.encoder_block_out_channels) - 1)
        self.channels: int = model.config.latent_channels
        self.shift, self.scale = shift_and_scale(model.config, self.channels)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        latents = getattr(self.model.encode(pixels), self.output)
        return latents, torch.zeros_like(latents)

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents).sample


class DCCodec(NoiselessCodec):
    """AutoencoderDC (arXiv 2410.10733): stride 32 or more, 32 channels or more."""

    output = "latent"


class TinyCodec(NoiselessCodec):
    """AutoencoderTiny (TAESD): the latents of Stable Diffusion, already scaled, for a fraction of the cost."""

    output = "latents"


class PixelCodec:
    """No autoencoder: a latent cell holds the pixels of a square patch, at stride 1 the pixel itself."""

    # Pixels with a standard deviation of 0.5, half of their range, get unit variance
    SCALE = 2.0

    def __init__(self, stride: int):
        self.model = nn.Module()
        self.stride = stride
        self.channels = 3 * stride**2
        self.shift = [0.0] * self.channels
        self.scale = [self.SCALE] * self.channels

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        latents = nn.functional.pixel_unshuffle(pixels, self.stride)
        return latents, torch.zeros_like(latents)

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(latents, self.stride)


# Classes of diffusers, as their config.json names them
CODECS: dict[str, type[KLCodec] | type[NoiselessCodec]] = {
    "AutoencoderKL": KLCodec,
    "AutoencoderDC": DCCodec,
    "AutoencoderTiny": TinyCodec,
}


def pixel_stride(name: str) -> int | None:
    """The stride of "pixels" (1) or "pixels-4"; None for any other name."""
    if name == PIXELS:
        return 1
    stride = name.removeprefix(f"{PIXELS}-")
    return int(stride) if name != stride and stride.isdigit() and int(stride) > 0 else None


def shift_and_scale(config: Any, channels: int) -> tuple[list[float], list[float]]:
    """Shift and scale of each channel, from the configuration of a diffusers autoencoder.

    Two conventions exist: one shift_factor and scaling_factor for all channels, or per-channel latents_mean
    and latents_std, which replace the shift and divide the scaling factor.
    """
    shift = config.get("latents_mean")
    if shift is None:
        shift = [config.get("shift_factor") or 0.0] * channels
    deviations = config.get("latents_std")
    if deviations is None:
        deviations = [1.0] * channels
    scale = [config.scaling_factor / deviation for deviation in deviations]
    return [float(value) for value in shift], scale


def counted_decoder_flops(codec: Codec, grid: Grid) -> float:
    """FLOPs to decode a latent of this grid, as PyTorch counts them: products and convolutions."""
    on_meta = copy.copy(codec)
    on_meta.model = copy.deepcopy(codec.model).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        on_meta.decode(torch.empty(1, codec.channels, *grid, device="meta"))
    return float(counter.get_total_flops())
