"""The small autoencoder: its command saves a diffusers model once, and its latents are white."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from config import UserError
from toy import autoencoder, shapes

ROOT = Path(__file__).parents[1]


def train_by_command(images: Path, output: Path) -> str:
    command = [sys.executable, "-m", "toy.autoencoder", "--images", images, "--output", output]
    command += ["--image-size", "16", "--steps", "4", "--batch-size", "2"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_command_saves_a_diffusers_model_once(tmp_path):
    shapes.write_images(tmp_path / "images", 32, image_size=16)
    assert "PSNR" in train_by_command(tmp_path / "images", tmp_path / "model")
    weights = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    written = weights.stat().st_mtime_ns

    model = AutoencoderKL.from_pretrained(tmp_path / "model")
    assert len(model.config.latents_mean) == len(model.config.latents_std) == 4
    assert model.config.scaling_factor == 1
    x = torch.zeros(1, 3, 16, 16)
    assert model.encode(x).latent_dist.mean.shape == (1, 4, 4, 4)
    assert model(x).sample.shape == x.shape

    assert "finished" in train_by_command(tmp_path / "images", tmp_path / "model")
    assert weights.stat().st_mtime_ns == written
    assert list(tmp_path.glob("*unfinished*")) == []

    # A trial of few steps does not pass for the whole training
    longer = ["--images", str(tmp_path / "images"), "--output", str(tmp_path / "model"), "--image-size", "16"]
    with pytest.raises(
        UserError, match="holds an autoencoder of --steps 4, --batch-size 2; give another folder"
    ):
        autoencoder.main([*longer, "--steps", "6", "--batch-size", "8"])

    # Emptied by a power cut
    weights.write_bytes(b"")
    with pytest.raises(UserError, match="its autoencoder is damaged .*; remove the folder to train it again"):
        autoencoder.main(["--images", str(tmp_path / "images"), "--output", str(tmp_path / "model")])


@pytest.mark.parametrize("steps", [1, 2, 9, 10])
def test_any_number_of_steps_trains(steps):
    images = torch.from_numpy(np.stack([shapes.render(index, 16)[0] for index in range(4)])).permute(
        0, 3, 1, 2
    )
    model = autoencoder.build_autoencoder(seed=0)
    before = model.decoder.conv_out.weight.clone()
    autoencoder.train(model, images, steps, batch_size=2, seed=0)
    assert not torch.equal(model.decoder.conv_out.weight, before)


def test_decorrelated_latents_are_white_and_decode_to_the_same_picture():
    pixels = np.stack([shapes.render(index, 16)[0] for index in range(32)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    model = autoencoder.build_autoencoder(seed=0).eval()
    x = autoencoder.to_signed(images)
    with torch.no_grad():
        before = model(x).sample
        autoencoder.decorrelate_latents(model, images)
        autoencoder.store_latent_statistics(model, images)
        assert torch.allclose(model(x).sample, before, atol=1e-4)
        mean = torch.tensor(model.config["latents_mean"])[:, None, None]
        std = torch.tensor(model.config["latents_std"])[:, None, None]
        z = (autoencoder.posterior_means(model, images) - mean) / std
    covariance = torch.cov(z.transpose(0, 1).flatten(1))
    assert torch.allclose(covariance, torch.eye(4), atol=1e-2)


def singular_values(model: AutoencoderKL) -> torch.Tensor:
    return torch.linalg.svdvals(model.post_quant_conv.weight[:, :, 0, 0].detach())


def test_ignored_channels_are_woken_and_others_decode_to_the_same_picture():
    pixels = np.stack([shapes.render(index, 16)[0] for index in range(32)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    model = autoencoder.build_autoencoder(seed=0).eval()
    x = autoencoder.to_signed(images)
    weight = model.post_quant_conv.weight
    with torch.no_grad():
        # A decoder that ignores a channel
        autoencoder.wake_channels(model, images)
        weight[:, 0] = 0
        assert singular_values(model).min() < 1e-6
        autoencoder.wake_channels(model, images)
        assert singular_values(model).min() > 0.3 * singular_values(model).mean()
        z = autoencoder.posterior_means(model, images)
        assert torch.allclose(z.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3)
        assert torch.allclose(z.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-3)

        # A decoder that uses all of them alike
        weight.copy_(torch.eye(4)[:, :, None, None])
        before = model(x).sample
        autoencoder.wake_channels(model, images)
        assert torch.allclose(model(x).sample, before, atol=1e-4)


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="--output"):
        autoencoder.main(["--images", str(tmp_path), "--output", str(tmp_path)])
