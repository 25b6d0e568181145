"""Fixtures shared by the tests: a tiny autoencoder in diffusers format and a tiny folder of images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory) -> Path:
    """Folder of a random AutoencoderKL with stride 4 and 4 latent channels."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae") / "tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            latent_channels=4,
            norm_num_groups=4,
        )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory) -> Path:
    """Folder of 3 classes (a, b, c) with 4, 3 and 3 PNG images of 40 x 52 pixels. Tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0)
    for index in range(10):
        file = folder / "abc"[index % 3] / f"{index}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (40, 52, 3), dtype=np.uint8)).save(file)
    return folder
