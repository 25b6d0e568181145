"""Sample grids as PNG files."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from data.files import write_file


def save_png(image: Tensor, path: Path) -> None:
    """Write (3, H, W) uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    write_file(path, lambda stream: picture.save(stream, format="PNG"), durable=False)


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images (B, 3, H, W) uint8 as one picture, row by row."""
    grid = make_grid(images, nrow=min(columns, len(images)), padding=2, pad_value=255)
    save_png(grid.to(torch.uint8), path)
