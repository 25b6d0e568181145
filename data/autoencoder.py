"""Pixels <-> moments <-> latents: a diffusers AutoencoderKL with the latent scale folded in.

Everything outside this file sees latents in scaled units only, z = (raw - shift) * scale, about unit variance, and asks this
class for scale, stride and channel count. Weights stay in float32; encoding uses no autocast, as in the official extraction.
"""

import hashlib
import os

import numpy as np
import torch
from torch import Tensor

from config import UserError

HUB_NAMES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


class Autoencoder:
    """A pretrained AutoencoderKL; make one with `Autoencoder.load`.

    Attributes:
        shift, scale: of each channel, lists of C numbers.
        name: "ema", "mse" or the absolute path of a diffusers folder: what `load` accepts again.
        stride: pixels per latent cell and side.
        channels: channels C of a latent.
        sha256: hash of the weights; two autoencoders with the same hash, shift and scale are the same.
    """

    def __init__(self, model: torch.nn.Module, name: str, device: torch.device | str):
        config = model.config
        self.name = name
        self.stride = 2 ** (len(config.down_block_types) - 1)  # every down block but the last one halves
        self.channels = config.latent_channels
        self.shift, self.scale = shift_and_scale(config, self.channels)
        self.sha256 = hash_weights(model)
        self.shift_map, self.scale_map = (  # (1, C, 1, 1) float32
            torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)
            for values in (self.shift, self.scale)
        )
        layout = torch.channels_last if torch.device(device).type == "cuda" else torch.preserve_format
        self.model = model.requires_grad_(False).eval().to(device, memory_format=layout)

    @classmethod
    def load(cls, name_or_path: str, device: torch.device | str) -> "Autoencoder":
        """Load "ema" or "mse" (stabilityai/sd-vae-ft-*, from the local cache or the hub) or a local diffusers folder.

        Raises UserError where that fails.
        """
        on_hub = name_or_path in HUB_NAMES
        if not on_hub and not os.path.isfile(os.path.join(name_or_path, "config.json")):
            raise UserError(
                f"--vae {name_or_path}: neither ema, mse nor the folder of a diffusers AutoencoderKL (with config.json)"
            )
        source = HUB_NAMES.get(name_or_path, name_or_path)
        try:
            model = read_model(source)
        except Exception as error:  # the hub client, safetensors and diffusers raise a dozen kinds
            remedy = f"run `hf download {source}` once with internet access, or give a local diffusers folder instead"
            if not on_hub:
                remedy = "give a folder that AutoencoderKL.save_pretrained wrote"
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"--vae {name_or_path}: cannot load {source} ({reason[:200]}); {remedy}"
            ) from None
        return cls(model, name_or_path if on_hub else os.path.abspath(name_or_path), device)

    def describe(self) -> dict:
        """Plain data that identifies this autoencoder in manifests and checkpoints."""
        return {
            "name": self.name,
            "stride": self.stride,
            "channels": self.channels,
            "shift": self.shift,
            "scale": self.scale,
            "sha256": self.sha256,
        }

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, s, s) for square images; UserError where the stride does not divide the size."""
        if image_size < 1 or image_size % self.stride:
            near = max(1, round(image_size / self.stride)) * self.stride
            raise UserError(
                f"image size {image_size}: not a multiple of the autoencoder's stride {self.stride}; use {near}"
            )
        return self.channels, image_size // self.stride, image_size // self.stride

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of each image.

        Args:
            images: (B, 3, H, W) uint8, on any device.

        Returns:
            mean and standard deviation, each (B, C, H / stride, W / stride) float32, in scaled latent units.
        """
        pixels = images.to(self.shift_map.device).float() / 127.5 - 1
        posterior = self.model.encode(pixels).latent_dist
        return (
            posterior.mean.float() - self.shift_map
        ) * self.scale_map, posterior.std.float() * self.scale_map

    @torch.no_grad()
    def decode(self, latents: Tensor, bf16: bool = False) -> Tensor:
        """Latents (B, C, s, s) in scaled units to images (B, 3, s * stride, s * stride) uint8; `bf16` computes in bfloat16."""
        raw = latents.to(self.shift_map.device).float() / self.scale_map + self.shift_map
        with torch.autocast(raw.device.type, torch.bfloat16, enabled=bf16):
            pixels = self.model.decode(raw).sample.float()
        return (
            (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8)
        )  # truncation after + 128: rounds, as in ADM and DiT


def read_model(source: str) -> torch.nn.Module:
    """The AutoencoderKL of a hub name or a local folder, in float32; raises whatever goes wrong."""
    from diffusers import AutoencoderKL  # here, because this import takes seconds

    try:
        local_only = True  # a cached copy needs no network, and many processes do not ask the hub at once
        config = AutoencoderKL.load_config(source, local_files_only=local_only)
    except OSError:
        local_only = False
        config = AutoencoderKL.load_config(source)
    if config.get("_class_name") != "AutoencoderKL":
        raise ValueError("its config.json does not describe an AutoencoderKL")
    return AutoencoderKL.from_pretrained(source, torch_dtype=torch.float32, local_files_only=local_only)


def shift_and_scale(config, channels: int) -> tuple[list[float], list[float]]:
    """Shift and scale of each channel, from a diffusers AutoencoderKL configuration.

    Two conventions exist: one shift_factor and scaling_factor for all channels, and per-channel latents_mean and latents_std
    which replace the shift and divide the scaling factor.
    """
    mean, std = config.get("latents_mean"), config.get("latents_std")
    shift = mean if mean is not None else [config.get("shift_factor") or 0.0] * channels
    scale = [
        config.scaling_factor / deviation for deviation in (std if std is not None else [1.0] * channels)
    ]
    return [float(value) for value in shift], scale


def hash_weights(model: torch.nn.Module) -> str:
    """SHA-256 of names, shapes and values of all weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(np.ascontiguousarray(value.float().cpu().numpy()).data)
    return digest.hexdigest()
