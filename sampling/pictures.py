"""Sample grids as PNG files."""

from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torchvision.utils import make_grid

from config import UserError
from data.files import write_file
from sampling.sample_folder import SETTINGS

# Who wrote a picture, in its entry "Software"; figures have matplotlib's
SOFTWARE = "DC-DiT"


def save_png(image: Tensor, path: Path, entries: PngInfo | None = None) -> None:
    """Write (3, H, W) uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    write_file(path, lambda stream: picture.save(stream, format="PNG", pnginfo=entries), durable=False)


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images (B, 3, H, W) uint8 as one picture, row by row."""
    grid = make_grid(images, nrow=min(columns, len(images)), padding=2, pad_value=255)
    entries = PngInfo()
    entries.add_text("Software", SOFTWARE)
    save_png(grid.to(torch.uint8), path, entries)


def check_picture(option: str, path: Path) -> None:
    """UserError if writing this picture would replace something else than a figure or a grid of samples."""
    if not path.exists():
        return
    if path.suffix in (".pdf", ".svg") and b"matplotlib" in path.read_bytes().lower():
        return
    try:
        with Image.open(path) as image:
            software = str(image.info.get("Software"))
    except Exception:  # Pillow raises nearly every built-in error on files of another kind
        software = ""
    if not software.startswith((SOFTWARE, "Matplotlib")):
        raise UserError(f"{option} '{path}': exists and is no figure of this program; give another file")


def check_is_no_sample_folder(option: str, folder: Path) -> None:
    """UserError for the folder of sample_ddp.py, whose pictures are evaluated and whose summary is its own."""
    if (folder / SETTINGS).is_file():
        raise UserError(f"{option} '{folder}': holds the samples of sample_ddp.py; give another folder")
