"""Pixels <-> moments <-> latents: an autoencoder of any kind of data/codecs.py, with the latent scale folded in.

Everything outside this file sees latents in scaled units only, z = (raw - shift) * scale, of about unit
variance, and asks this class for scale, stride and channel count. Weights stay in float32; encoding uses no
autocast, as in the official extraction.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import UserError, one_line
from data.codecs import CODECS, Codec, PixelCodec, pixel_stride
from grid import Grid

# Files of weights; the variant is None in the usual case.
WEIGHTS_FILE = re.compile(r"diffusion_pytorch_model(\.(?P<variant>[\w-]+))?\.(safetensors|bin)")
HUB_NAMES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
SHORT_NAMES = {full: short for short, full in HUB_NAMES.items()}


class NonFiniteImage(FloatingPointError):
    """A latent whose image has pixels that are not finite; `index`: its place in the batch."""

    def __init__(self, index: int):
        super().__init__(f"image {index} of the batch is not finite")
        self.index = index


class Autoencoder:
    """A pretrained autoencoder; make one with `Autoencoder.load`.

    Attributes:
        name: "ema", "mse", "pixels", or the absolute path of a diffusers folder; `load` accepts it again.
        stride: pixels per latent cell and side.
        channels: channels C of a latent.
        shift: one number per channel.
        scale: one number per channel.
        sha256: hash of the weights; two autoencoders with the same hash, shift and scale are the same.
    """

    def __init__(self, codec: Codec, name: str, device: torch.device | str):
        device = torch.device(device)
        self.codec = codec
        self.name = name
        self.stride = codec.stride
        self.channels = codec.channels
        self.shift = codec.shift
        self.scale = codec.scale
        self.sha256 = hash_weights(codec.model)

        # Each (1, C, 1, 1) float32.
        self.shift_map = torch.tensor(self.shift, dtype=torch.float32, device=device).view(1, -1, 1, 1)
        self.scale_map = torch.tensor(self.scale, dtype=torch.float32, device=device).view(1, -1, 1, 1)

        layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
        codec.model.requires_grad_(False).eval().to(device, memory_format=layout)

    @classmethod
    def load(cls, name_or_path: str, device: torch.device | str, option: str = "--vae") -> "Autoencoder":
        """Load "ema" or "mse" (stabilityai/sd-vae-ft-*, from local cache or hub), a diffusers folder, or "pixels".

        The full names of these two on the hub mean the same, unless folders of these names are there.

        Args:
            option: names the autoencoder in error messages.

        Raises:
            UserError: the name is unknown, or loading fails.
        """
        if stride := pixel_stride(name_or_path):
            return cls(PixelCodec(stride), name_or_path, device)
        if not os.path.isdir(name_or_path):
            name_or_path = SHORT_NAMES.get(name_or_path, name_or_path)
        if name_or_path in HUB_NAMES:
            name = name_or_path
            source = HUB_NAMES[name]
            remedy = f"run `hf download {source}` once with internet access, or give a local diffusers folder"
        elif folder := find_folder(name_or_path):
            name = os.path.abspath(folder)
            source = folder
            remedy = "give a folder that save_pretrained of diffusers wrote"
        else:
            raise UserError(
                f"{option} {name_or_path}: is neither ema, mse nor the folder of a diffusers autoencoder "
                "(with config.json)"
            )

        try:
            codec = read_codec(source)
        except Exception as error:  # the hub client, safetensors and diffusers raise a dozen kinds
            reason = one_line(error, 200)
            raise UserError(f"{option} {name_or_path}: cannot load {source} ({reason}); {remedy}") from None
        return cls(codec, name, device)

    def describe(self) -> dict[str, Any]:
        """Plain data that identifies this autoencoder in manifests and checkpoints."""
        return {
            "name": self.name,
            "stride": self.stride,
            "channels": self.channels,
            "shift": self.shift,
            "scale": self.scale,
            "sha256": self.sha256,
        }

    def latent_shape(self, image: Grid) -> tuple[int, int, int]:
        """(C, h, w) of the latents of such images. Raises UserError if the stride does not divide their sides."""
        if not image.is_multiple_of(self.stride):
            nearest = Grid.of([max(1, round(side / self.stride)) * self.stride for side in image])
            raise UserError(
                f"image size {image.plain}: is not a multiple of the autoencoder's stride {self.stride}; "
                f"use {nearest.plain}"
            )
        return (self.channels, *image.coarsen(self.stride))

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of each image.

        Args:
            images: (B, 3, H, W) uint8, on any device.

        Returns:
            mean and standard deviation, each (B, C, H / stride, W / stride) float32, in scaled latent units.
        """
        pixels = images.to(self.shift_map.device).float() / 127.5 - 1
        raw_mean, raw_std = self.codec.encode(pixels)
        mean = (raw_mean.float() - self.shift_map) * self.scale_map
        return mean, raw_std.float() * self.scale_map

    @torch.no_grad()
    def decode(self, latents: Tensor, bf16: bool = False) -> Tensor:
        """Images of latents.

        Args:
            latents: (B, C, h, w) in scaled units, on any device.
            bf16: compute in bfloat16.

        Returns:
            (B, 3, h * stride, w * stride) uint8.

        Raises:
            NonFiniteImage: NaN would become black, and infinity white.
        """
        pixels = self.decode_pixels(latents, bf16)
        finite = pixels.isfinite().flatten(1).all(1)
        if not finite.all():
            raise NonFiniteImage(int(finite.logical_not().nonzero()[0]))
        return to_levels(pixels)

    @torch.no_grad()
    def decode_pixels(self, latents: Tensor, bf16: bool = False) -> Tensor:
        """As `decode`, but (B, 3, h * stride, w * stride) float32 of about -1 to 1, finite or not."""
        raw = latents.to(self.shift_map.device).float() / self.scale_map + self.shift_map
        with torch.autocast(raw.device.type, torch.bfloat16, enabled=bf16):
            return self.codec.decode(raw).float()


def to_levels(pixels: Tensor) -> Tensor:
    """Pixels of -1 to 1 -> uint8."""
    # Adding 128 and not 127.5 turns the truncation into rounding, as in ADM and DiT.
    levels = (127.5 * pixels + 128).clamp(0, 255)
    return levels.to(torch.uint8)


def find_folder(path: str) -> str | None:
    """The folder of an autoencoder: this one, or the folder vae/ of a pipeline. None if there is neither."""
    for folder in (path, os.path.join(path, "vae")):
        if os.path.isfile(os.path.join(folder, "config.json")):
            return folder
    return None


def read_codec(source: str) -> Codec:
    """The autoencoder of a hub name or a local folder, in float32. Raises whatever diffusers raises."""
    import diffusers  # here, because this import takes seconds

    # A cached copy needs no network, and many processes do not ask the hub at once.
    local_only = True
    try:
        config = diffusers.AutoencoderKL.load_config(source, local_files_only=local_only)
    except OSError:
        local_only = False
        config = diffusers.AutoencoderKL.load_config(source)
    kind = config.get("_class_name")
    if kind not in CODECS:
        raise ValueError(f"its config.json describes none of {', '.join(CODECS)}")
    model = getattr(diffusers, kind).from_pretrained(
        source, torch_dtype=torch.float32, local_files_only=local_only, variant=find_variant(source)
    )
    return CODECS[kind](model)


def find_variant(source: str) -> str | None:
    """ "fp16" for a folder that holds weights of the name diffusion_pytorch_model.fp16.safetensors only."""
    variants = set()
    for file in Path(source).glob("diffusion_pytorch_model*"):
        found = WEIGHTS_FILE.fullmatch(file.name)
        if found:
            variants.add(found["variant"])
    return None if None in variants or not variants else min(variants)


def hash_weights(model: torch.nn.Module) -> str:
    """SHA-256 of names, shapes and values of all weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(np.ascontiguousarray(value.float().cpu().numpy()).data)
    return digest.hexdigest()


def is_same_autoencoder(one: dict, other: dict) -> bool:
    """Whether two autoencoders, wherever they are, give the same latents and images."""
    return all(one[key] == other[key] for key in ("sha256", "shift", "scale"))
