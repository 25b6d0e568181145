"""Images per second of extraction and evaluation, with random weights in place of published ones."""

import contextlib
import io
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import extract_features
from benchmarks.meters import medians
from benchmarks.report import Row
from benchmarks.workload import Setup
from data.autoencoder import Autoencoder
from evaluation.extractors import load_extractor
from evaluation.feature_cache import run_extractor
from evaluation.metrics import Gaussian, frechet_distance
from models.flops import STABLE_DIFFUSION

PUBLISHED_WIDTHS: tuple[int, ...] = STABLE_DIFFUSION["block_out_channels"]


class NetworkSizes(NamedTuple):
    """Sizes of extraction and evaluation."""

    images: int
    pixels: int  # per side
    batch: int  # encoded at once
    widths: tuple[int, ...]  # of the autoencoder; each level but the last halves the resolution
    features: int = 2048  # of Inception, for the Fréchet distance


def measure_extraction(sizes: NetworkSizes, setup: Setup) -> list[Row]:
    """The autoencoder alone, and the whole of extract_features.py from JPEG files to a store."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images" / "one", sizes)
        save_autoencoder(folder / "vae", sizes.widths)

        # The network alone
        autoencoder = Autoencoder.load(str(folder / "vae"), setup.device)
        images = random_images(sizes.batch, sizes.pixels).to(setup.device)
        encoding = medians({"encode": lambda: autoencoder.encode(images)}, setup.device, setup.seconds / 2)
        latents = autoencoder.encode(images)[0]
        decoding = medians({"decode": lambda: autoencoder.decode(latents)}, setup.device, setup.seconds / 2)

        # The script
        options = {
            "--data-path": folder / "images",
            "--features-path": folder / "features",
            "--vae": folder / "vae",
            "--image-size": sizes.pixels,
            "--global-batch-size": sizes.batch * extract_features.OFFICIAL_PROCESSES,
        }
        argv = [str(part) for option in options.items() for part in option]
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            extract_features.main(argv)
        script = time.perf_counter() - start
    return [
        rate("autoencoder encodes, float32", sizes.batch, encoding["encode"]),
        rate("autoencoder decodes, float32", sizes.batch, decoding["decode"]),
        rate("extract_features.py", sizes.images, script),
    ]


def measure_evaluation(sizes: NetworkSizes, setup: Setup) -> list[Row]:
    """Inception on a batch of images, and one Fréchet distance of its features."""
    with tempfile.TemporaryDirectory() as name:
        weights = Path(name) / "random.pth"
        save_inception(weights)
        extractor = load_extractor("inception", str(weights), setup.device)
    images = random_images(sizes.batch, sizes.pixels)
    times = medians({"features": lambda: run_extractor(extractor, images)}, setup.device, setup.seconds)

    generator = np.random.default_rng(0)
    gaussians = []
    for _ in range(2):
        values = generator.standard_normal((sizes.features + 1, sizes.features))
        gaussians.append(Gaussian(values.mean(0), np.cov(values, rowvar=False), len(values)))
    start = time.perf_counter()
    frechet_distance(*gaussians)
    distance = time.perf_counter() - start
    return [
        rate("Inception features, float32", sizes.batch, times["features"]),
        {"what": f"Fréchet distance of {sizes.features} features, on the host", "images": 0, "seconds": distance,
         "images/s": 0.0},
    ]  # fmt: skip


def rate(what: str, images: int, seconds: float) -> Row:
    """One row."""
    return {"what": what, "images": images, "seconds": seconds, "images/s": images / seconds}


def random_images(count: int, side: int) -> Tensor:
    """(count, 3, side, side) uint8."""
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8)


def write_images(folder: Path, sizes: NetworkSizes) -> None:
    """JPEG files, a little wider than the crop."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(sizes.images):
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((sizes.pixels * 4 // 3, sizes.pixels))
        picture.save(folder / f"{index:05d}.jpg")


def save_autoencoder(folder: Path, widths: tuple[int, ...]) -> None:
    """A diffusers AutoencoderKL with random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    levels = len(widths)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=4,
    ).save_pretrained(folder)


def save_inception(path: Path) -> None:
    """Random weights with the names and shapes of the published file."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ModuleNotFoundError(
            "needs the package torch-fidelity; run `pip install torch-fidelity`"
        ) from None

    class Unloaded(FeatureExtractorInceptionV3):
        """The network before its weights are loaded."""

        def load_state_dict(self, state_dict: dict) -> None:
            pass

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.save(Unloaded("inception", ["2048"], nothing).state_dict(), path)
