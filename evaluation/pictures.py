"""Sample grids as PNG files."""

import os
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid


def save_png(image: Tensor, path: Path) -> None:
    """Write (3, H, W) uint8 so that the name never shows an incomplete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(partial, format="PNG")
    os.replace(partial, path)


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images (B, 3, H, W) uint8 as one picture, row by row."""
    save_png(make_grid(images, nrow=min(columns, len(images)), padding=2, pad_value=255).to(torch.uint8), path)
