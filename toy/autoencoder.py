"""Trains a small AutoencoderKL (stride 4, 4 latent channels) on an image folder and saves it in diffusers format.

    python -m toy.autoencoder --images DIR --output DIR --image-size 64 --steps 1000 --batch-size 8 --seed 0

It serves small images on small machines, in a minute or so. What it leaves loads with `AutoencoderKL.from_pretrained`, and its
configuration holds the mean and standard deviation of each latent channel.
"""

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import cli
from config import UserError
from data.images import ImageFolder, UnreadableImage
from data.streams import rng
from processes import group

STRIDE = 4  # pixels per latent cell and axis: two of the three blocks halve the size
CHANNELS = (16, 16, 32)  # per block; few at full resolution, where they cost most
GROUPS = 8  # of each group normalization; with one channel per group, every channel would lose its level
PEAK_LEARNING_RATE = 4e-3
KL_WEIGHT = (
    5e-5  # posterior noise of a few per cent of a channel's spread: a decoder that forgives small errors
)
CROP_SHARE = (
    0.75  # the first steps see crops of half the size, which cost a quarter; the last ones whole images
)
LATENT_SCALE = 3.5  # std of a latent channel; at 1 a small network errs by more than the mean colour varies at high noise
STATISTICS_IMAGES = (
    512  # training images, evenly spread, behind the axes, means and deviations of the latents
)
HELD_OUT = 16  # one image in so many measures the reconstruction and trains nothing


def build_autoencoder(seed: int) -> AutoencoderKL:
    """AutoencoderKL without attention, its initial weights a function of `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
            up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
            block_out_channels=CHANNELS,
            layers_per_block=1,
            norm_num_groups=GROUPS,
            mid_block_add_attention=False,
            latent_channels=4,
            scaling_factor=LATENT_SCALE,
        )


def load_images(folder: str, image_size: int) -> Tensor:
    """All readable images of the folder, (N, 3, H, W) uint8."""
    images = []
    source = ImageFolder(folder, image_size)
    for index in tqdm(range(len(source)), desc="reading", unit="img"):
        try:
            images.append(torch.from_numpy(source[index][0]))
        except UnreadableImage as error:
            tqdm.write(f"skipped {error}")
    if len(images) < HELD_OUT:
        raise UserError(
            f"--images {folder}: {len(images)} readable images are too few; give at least {HELD_OUT}"
        )
    return torch.stack(images).permute(0, 3, 1, 2).contiguous()


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def draw_batch(images: Tensor, batch_size: int, size: int, seed: int, step: int) -> Tensor:
    """Random crops of `size` pixels, mirrored or not: (B, 3, size, size) float32 in [-1, 1]."""
    draw = rng(seed, "autoencoder batch", step)
    last = images.shape[-1] - size
    batch = []
    for index in draw.integers(len(images), size=batch_size):
        top, left, mirrored = draw.integers(last + 1), draw.integers(last + 1), draw.random() < 0.5
        crop = images[index, :, top : top + size, left : left + size]
        batch.append(crop.flip(-1) if mirrored else crop)
    return to_signed(torch.stack(batch))


def autoencoder_loss(model: AutoencoderKL, x: Tensor, noise: Tensor) -> Tensor:
    """Reconstruction error of a drawn latent (L1 + L2) plus the KL divergence per latent number."""
    posterior = model.encode(x).latent_dist
    y = model.decode(posterior.mean + posterior.std * noise).sample
    kl = posterior.kl().mean() / noise[0].numel()
    return F.l1_loss(y, x) + F.mse_loss(y, x) + KL_WEIGHT * kl


def train(model: AutoencoderKL, images: Tensor, steps: int, batch_size: int, seed: int) -> None:
    """AdamW with one warm-up and decay of the learning rate, on crops first and on whole images at the end."""
    device, image_size = model.device, images.shape[-1]
    optimizer = torch.optim.AdamW(
        model.parameters(), PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, steps + 1, pct_start=0.1)
    crop_size = max(image_size // (2 * STRIDE), 1) * STRIDE
    progress = tqdm(range(steps), desc="autoencoder", unit="step")
    for step in progress:
        size = crop_size if step < CROP_SHARE * steps else image_size
        x = draw_batch(images, batch_size, size, seed, step).to(device)
        noise = rng(seed, "autoencoder noise", step).standard_normal(
            (batch_size, 4, *(size // STRIDE,) * 2), dtype=np.float32
        )
        loss = autoencoder_loss(model, x, torch.from_numpy(noise).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")


@torch.no_grad()
def posterior_means(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Raw latents (N, 4, H / STRIDE, W / STRIDE) of uint8 images."""
    return torch.cat(
        [model.encode(to_signed(part).to(model.device)).latent_dist.mean for part in images.split(64)]
    )


@torch.no_grad()
def decorrelate_latents(model: AutoencoderKL, images: Tensor) -> None:
    """Turn the latent channels to their principal axes, by the 1 x 1 convolutions before and after the latent.

    Reconstructions stay the same. Without it an error along an axis of little variance, small beside the spread of every
    channel, would show in the picture. The posterior's log variance is averaged with the squared weights of the rotation.
    """
    z = posterior_means(model, images)
    axes = torch.linalg.eigh(torch.cov(z.transpose(0, 1).flatten(1)).cpu()).eigenvectors.to(
        z
    )  # (4, 4), one axis per column
    into, out_of = model.quant_conv, model.post_quant_conv
    turn = torch.block_diag(axes.T, axes.T.square())  # of the moments: mean and log variance
    into.weight.copy_(torch.einsum("ij,jkhw->ikhw", turn, into.weight))
    into.bias.copy_(turn @ into.bias)
    out_of.weight.copy_(torch.einsum("ijhw,jk->ikhw", out_of.weight, axes))


@torch.no_grad()
def reconstruction_psnr(model: AutoencoderKL, images: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the decoded posterior means, over all pixels of uint8 images."""
    squares = 0.0
    for part in images.split(64):
        x = to_signed(part).to(model.device)
        y = model.decode(model.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        squares += (y - x).square().mean().item() * len(part)
    return 10 * float(np.log10(4 * len(images) / squares))  # values span [-1, 1], peak to peak 2


def store_latent_statistics(model: AutoencoderKL, images: Tensor) -> None:
    """Put each latent channel's mean and standard deviation into the configuration, with which loaders whiten the latents."""
    z = posterior_means(model, images)
    mean, std = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))
    model.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def save(model: AutoencoderKL, output: Path) -> None:
    """Write the model beside its place first: a folder with the final name is complete."""
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    if output.is_dir():
        output.rmdir()  # an empty one; what is not empty was refused at the start
    unfinished.replace(output)


def is_complete(output: Path) -> bool:
    """True where a finished model lies, False where there is nothing; UserError for anything else."""
    if (output / "config.json").is_file() and (output / "diffusion_pytorch_model.safetensors").is_file():
        return True
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists and is no autoencoder; give another folder or remove it")
    return False


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser("Train a small AutoencoderKL and save it in diffusers format.")
    parser.add_argument("--images", required=True, help="folder with one subfolder of images per class")
    parser.add_argument(
        "--output", required=True, help="folder for the model; a complete one is left as it is"
    )
    parser.add_argument("--image-size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.image_size < STRIDE or args.image_size % STRIDE:
        raise UserError(
            f"--image-size {args.image_size}: must be a positive multiple of the autoencoder's stride {STRIDE}"
        )
    for option in ("steps", "batch_size"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)}: must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: must not be negative")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    output = Path(args.output)
    if is_complete(output):
        print(f"{output}: holds a finished autoencoder")
        return
    start = time.perf_counter()
    images = load_images(args.images, args.image_size)
    held_out = torch.arange(len(images)) % HELD_OUT == 0
    model = build_autoencoder(args.seed).to(group.default_device())
    train(model, images[~held_out], args.steps, args.batch_size, args.seed)
    model.eval()
    sample = images[~held_out][:: max(len(images) // STATISTICS_IMAGES, 1)]
    decorrelate_latents(model, sample)
    store_latent_statistics(model, sample)
    save(model, output)
    psnr, seconds = reconstruction_psnr(model, images[held_out]), time.perf_counter() - start
    print(
        f"{output}: reconstruction PSNR {psnr:.1f} dB on {int(held_out.sum())} held-out images, {seconds:.0f} s"
    )


if __name__ == "__main__":
    cli.run(main)
