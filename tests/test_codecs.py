"""Every kind of autoencoder: what it encodes and decodes. tests/test_values.py trains on it."""

import json

import pytest
import torch

from config import UserError
from data.autoencoder import Autoencoder
from data.codecs import KLCodec, counted_decoder_flops
from grid import Grid
from models import flops

STRIDES = {"kl": 4, "dc": 4, "tiny": 4, "pixels": 1, "pixels-4": 4}
CHANNELS = {"kl": 4, "dc": 4, "tiny": 4, "pixels": 3, "pixels-4": 48}


@pytest.fixture(scope="module")
def codecs(tiny_vae, tmp_path_factory) -> dict[str, str]:
    """Kind -> what --vae takes: small random models, saved as diffusers does."""
    from diffusers import AutoencoderDC, AutoencoderTiny

    folder = tmp_path_factory.mktemp("codecs")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dc = AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            scaling_factor=0.5,
        )
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        )
    dc.save_pretrained(folder / "dc")
    tiny.save_pretrained(folder / "tiny")
    folders = {"kl": str(tiny_vae), "dc": str(folder / "dc"), "tiny": str(folder / "tiny")}
    return folders | {name: name for name in ("pixels", "pixels-4")}


@pytest.mark.parametrize("kind", STRIDES)
def test_from_pixels_to_latents_and_back(codecs, kind):
    autoencoder = Autoencoder.load(codecs[kind], "cpu")
    stride, channels = STRIDES[kind], CHANNELS[kind]
    assert (autoencoder.stride, autoencoder.channels) == (stride, channels)
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, std = autoencoder.encode(images)
    assert mean.shape == std.shape == (2, channels, 16 // stride, 16 // stride)
    assert (std > 0).all() if kind == "kl" else (std == 0).all()
    decoded = autoencoder.decode(mean)
    assert decoded.shape == images.shape
    if kind.startswith("pixels"):
        assert torch.equal(decoded, images)
        assert mean.std().item() == pytest.approx(2 / 3**0.5, rel=0.1)  # of uniform pixels
    if kind == "dc":
        # The scale is folded in
        pixels = images.float() / 127.5 - 1
        torch.testing.assert_close(mean, autoencoder.codec.model.encode(pixels).latent * 0.5)


def test_counted_flops_are_the_formula(tiny_vae):
    """Up to the softmax, which PyTorch does not count."""
    codec = Autoencoder.load(str(tiny_vae), "cpu").codec
    assert isinstance(codec, KLCodec)
    formula = sum(flops.decoder_flops(codec.model.config, Grid(8, 8)).values())
    assert counted_decoder_flops(codec, Grid(8, 8)) == pytest.approx(formula, rel=0.01)


def test_names_of_no_codec(tmp_path):
    for name in ("pixels-0", "pixels-", "pixels-x"):
        with pytest.raises(UserError, match="is neither ema, mse"):
            Autoencoder.load(name, "cpu")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(UserError, match="describes none of AutoencoderKL, AutoencoderDC, AutoencoderTiny"):
        Autoencoder.load(str(tmp_path), "cpu")
