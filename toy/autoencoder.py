"""Train a small AutoencoderKL (stride 4, 4 latent channels) on an image folder; saved in diffusers format.

    python -m toy.autoencoder --images DIR --output DIR --image-size 64 --steps 1000 --batch-size 8 --seed 0

It serves small images on small machines and trains in about a minute. The saved folder loads with
`AutoencoderKL.from_pretrained`, and its configuration holds the mean and standard deviation of each latent
channel.
"""

import argparse
import json
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
from config import UserError, one_line
from data.files import write_json
from data.images import ImageFolder
from data.loading import read_all
from data.streams import rng
from processes import group

# ---------------------------------------------------------------------------------------------- architecture

# Channels per block; few at full resolution, where they cost most.
CHANNELS = (16, 16, 32)
# Pixels per latent cell and side: two of the three blocks halve the size.
STRIDE = 4
LATENT_CHANNELS = 4
# Groups of each group normalization; with one channel per group, every channel would lose its level.
GROUPS = 8

# -------------------------------------------------------------------------------------------------- training

# The options that decide a model, beside its images, and the file in its folder that keeps them
OPTIONS = ("image_size", "steps", "batch_size", "seed", "all_channels")
SETTINGS_FILE = "training.json"
PEAK_LEARNING_RATE = 4e-3
# Gives the posterior a noise of a few per cent of a channel's spread: the decoder then forgives small errors.
KL_WEIGHT = 5e-5
# This share of the steps sees crops of half the size, which cost a quarter; the last steps see whole images.
CROP_SHARE = 0.75
# --all-channels raises each singular value of the decoder's first layer to this share of their mean.
LEAST_SENSITIVITY = 0.5
# One image in 16 measures the reconstruction and trains nothing.
HELD_OUT = 16
# Training images, evenly spread, that determine the axes, means and deviations of the latents.
STATISTICS_IMAGES = 512
# Images that are encoded at once outside of training.
CHUNK = 64


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
            latent_channels=LATENT_CHANNELS,
            # The statistics of the channels, stored after training, give unit variance
            scaling_factor=1.0,
        )


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def draw_batch(images: Tensor, batch_size: int, size: int, seed: int, step: int) -> Tensor:
    """Random crops of `size` pixels, half of them mirrored: (B, 3, size, size) float32 in [-1, 1]."""
    draw = rng(seed, "autoencoder batch", step)
    positions = images.shape[-1] - size + 1
    batch = []
    for index in draw.integers(len(images), size=batch_size):
        top = draw.integers(positions)
        left = draw.integers(positions)
        crop = images[index, :, top : top + size, left : left + size]
        if draw.random() < 0.5:
            crop = crop.flip(-1)
        batch.append(crop)
    return to_signed(torch.stack(batch))


def draw_noise(batch_size: int, size: int, seed: int, step: int) -> Tensor:
    """Noise of the posterior for crops of `size` pixels, (B, 4, size / 4, size / 4)."""
    draw = rng(seed, "autoencoder noise", step)
    side = size // STRIDE
    noise = draw.standard_normal((batch_size, LATENT_CHANNELS, side, side), dtype=np.float32)
    return torch.from_numpy(noise)


def autoencoder_loss(model: AutoencoderKL, x: Tensor, noise: Tensor) -> Tensor:
    """Reconstruction error of a drawn latent (L1 + L2) plus the KL divergence per latent number."""
    posterior = model.encode(x).latent_dist
    reconstruction = model.decode(posterior.mean + posterior.std * noise).sample
    kl = posterior.kl().mean() / noise[0].numel()
    return F.l1_loss(reconstruction, x) + F.mse_loss(reconstruction, x) + KL_WEIGHT * kl


def train(
    model: AutoencoderKL, images: Tensor, steps: int, batch_size: int, seed: int, first_step: int = 0
) -> None:
    """AdamW with one warm-up and decay of the learning rate; crops first, whole images at the end.

    `first_step` is the number of steps of an earlier call, whose batches are not drawn again.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    # A warm-up of exactly one step would divide by zero
    warm_up = max(0.1, 2 / (steps + 1))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, steps + 1, pct_start=warm_up
    )
    image_size = images.shape[-1]
    crop_size = max(image_size // (2 * STRIDE), 1) * STRIDE
    progress = tqdm(range(steps), desc="autoencoder", unit="step")
    for step in progress:
        size = crop_size if step < CROP_SHARE * steps else image_size
        x = draw_batch(images, batch_size, size, seed, first_step + step).to(model.device)
        noise = draw_noise(batch_size, size, seed, first_step + step).to(model.device)

        loss = autoencoder_loss(model, x, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")


@torch.no_grad()
def posterior_means(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Raw latents (N, 4, H / 4, W / 4) of uint8 images."""
    means = []
    for chunk in images.split(CHUNK):
        x = to_signed(chunk).to(model.device)
        means.append(model.encode(x).latent_dist.mean)
    return torch.cat(means)


@torch.no_grad()
def decorrelate_latents(model: AutoencoderKL, images: Tensor) -> None:
    """Turn the latent channels to their principal axes, with the convolutions before and after the latent.

    Reconstructions stay the same. Without the turn, an error along an axis of little variance, although small
    beside the spread of every channel, would show in the picture.
    """
    # Principal axes of the latents, (4, 4), one per column
    z = posterior_means(model, images)
    covariance = torch.cov(z.transpose(0, 1).flatten(1))
    axes = torch.linalg.eigh(covariance.cpu()).eigenvectors.to(z)

    # The encoder's last layer gives mean and log variance. The turned log variance is an average, weighted
    # with the squared entries of the rotation.
    turn = torch.block_diag(axes.T, axes.T.square())
    last = model.quant_conv
    last.weight.copy_(torch.einsum("ij,jkhw->ikhw", turn, last.weight))
    last.bias.copy_(turn @ last.bias)

    # The decoder's first layer turns back
    first = model.post_quant_conv
    first.weight.copy_(torch.einsum("ijhw,jk->ikhw", first.weight, axes))


def store_latent_statistics(model: AutoencoderKL, images: Tensor) -> None:
    """Put mean and standard deviation of the latent channels into the configuration, for loaders."""
    z = posterior_means(model, images)
    mean = z.mean(dim=(0, 2, 3))
    std = z.std(dim=(0, 2, 3))
    model.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


@torch.no_grad()
def wake_channels(model: AutoencoderKL, images: Tensor) -> None:
    """Give all latent channels unit variance, and the decoder a use for the channels that it ignores.

    A channel that starts as noise may stay unused: the decoder ignores it, and so the encoder learns nothing to put
    there. White latents would show it to the diffusion model at full size all the same.
    """
    decorrelate_latents(model, images)
    store_latent_statistics(model, images)
    weight = model.quant_conv.weight
    mean = torch.tensor(model.config["latents_mean"]).to(weight)
    std = torch.tensor(model.config["latents_std"]).to(weight)

    # The encoder's last layer gives mean and log variance
    last = model.quant_conv
    last.weight[:LATENT_CHANNELS] /= std[:, None, None, None]
    last.bias[:LATENT_CHANNELS] = (last.bias[:LATENT_CHANNELS] - mean) / std
    last.bias[LATENT_CHANNELS:] -= 2 * std.log()

    # The decoder's first layer undoes this, and then looks at every direction
    first = model.post_quant_conv
    matrix = first.weight[:, :, 0, 0]
    first.bias += matrix @ mean
    left, values, right = torch.linalg.svd(matrix * std)
    values = values.clamp(min=LEAST_SENSITIVITY * values.mean().item())
    first.weight.copy_((left * values @ right)[:, :, None, None])


@torch.no_grad()
def reconstruction_psnr(model: AutoencoderKL, images: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the decoded posterior means, over all pixels of uint8 images."""
    sum_of_squares = 0.0
    for chunk in images.split(CHUNK):
        x = to_signed(chunk).to(model.device)
        latents = model.encode(x).latent_dist.mean
        reconstruction = model.decode(latents).sample.clamp(-1, 1)
        sum_of_squares += (reconstruction - x).square().mean().item() * len(chunk)
    mean_square = sum_of_squares / len(images)
    peak_to_peak = 2.0
    return 10 * float(np.log10(peak_to_peak**2 / mean_square))


def settings_of(args: argparse.Namespace) -> dict[str, int]:
    """The options that decide the model, beside the images."""
    return {option: getattr(args, option) for option in OPTIONS}


def check_settings(output: Path, settings: dict[str, int]) -> None:
    """Raise a UserError if a finished model was trained with other options, as far as its folder says."""
    try:
        known = json.loads((output / SETTINGS_FILE).read_text(encoding="utf-8"))
        changes = [option for option in settings if known[option] != settings[option]]
    except (OSError, ValueError, LookupError, TypeError):
        return
    if changes:
        there = ", ".join(f"{cli.option_name(option)} {known[option]}" for option in changes)
        raise UserError(
            f"--output {output}: holds an autoencoder of {there}; give another folder, or remove it"
        )


def save(model: AutoencoderKL, output: Path, settings: dict[str, int]) -> None:
    """Write the model under another name first: a folder with the final name is complete."""
    unfinished = output.with_name(output.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    write_json(unfinished / SETTINGS_FILE, settings)
    if output.is_dir():
        # `is_complete` has refused a folder that is not empty.
        output.rmdir()
    unfinished.replace(output)


def is_complete(output: Path) -> bool:
    """Whether the folder holds a finished model. Raises UserError if it holds anything else."""
    if (output / "config.json").is_file() and (output / "diffusion_pytorch_model.safetensors").is_file():
        # A power cut may empty files that were just written
        try:
            AutoencoderKL.from_pretrained(output)
        except Exception as error:  # diffusers and safetensors raise many kinds on damaged files
            reason = one_line(error, 80)
            raise UserError(
                f"--output {output}: its autoencoder is damaged ({reason}); remove the folder to train it again"
            ) from None
        return True
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"--output {output}: exists and is not an autoencoder; give another folder or remove it"
        )
    return False


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser("Train a small AutoencoderKL and save it in diffusers format.")
    add = parser.add_argument
    add("--images", required=True, help="folder with one sub-folder of images per class")
    add("--output", type=Path, required=True, help="folder for the model; a complete one is left as it is")
    add("--image-size", type=int, default=64, help="pixels per side (default: %(default)s)")
    add("--steps", type=int, default=1000, help="(default: %(default)s)")
    add("--batch-size", type=int, default=8, help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    channels_help = "half way, turn the decoder's attention to latent channels that it ignores"
    add("--all-channels", action="store_true", help=channels_help)
    args = parser.parse_args(argv)
    if args.image_size < STRIDE or args.image_size % STRIDE:
        raise UserError(f"--image-size {args.image_size}: must be a positive multiple of the stride {STRIDE}")
    cli.check_at_least(args, 1, "steps", "batch_size")
    cli.check_seed(args)
    cli.check_output("--output", args.output)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if is_complete(args.output):
        check_settings(args.output, settings_of(args))
        print(f"{args.output}: holds a finished autoencoder")
        return
    start = time.perf_counter()

    # Images for training, and some that only measure
    source = ImageFolder(args.images, args.image_size, "--images")
    for note in source.notes:
        print(note)
    images, _ = read_all(source)
    if len(images) < HELD_OUT:
        raise UserError(
            f"--images {args.images}: {len(images)} readable images are too few; give at least {HELD_OUT}"
        )
    is_held_out = torch.arange(len(images)) % HELD_OUT == 0
    training_images = images[~is_held_out]
    held_out_images = images[is_held_out]

    # Train
    every = max(len(images) // STATISTICS_IMAGES, 1)
    statistics_images = training_images[::every]
    model = build_autoencoder(args.seed).to(group.default_device())
    first_steps = args.steps // 2 if args.all_channels else 0
    if first_steps:
        train(model, training_images, first_steps, args.batch_size, args.seed)
        wake_channels(model.eval(), statistics_images)
        model.train()
    train(model, training_images, args.steps - first_steps, args.batch_size, args.seed, first_steps)
    model.eval()

    # Make the latents white
    decorrelate_latents(model, statistics_images)
    store_latent_statistics(model, statistics_images)

    save(model, args.output, settings_of(args))
    psnr = reconstruction_psnr(model, held_out_images)
    seconds = time.perf_counter() - start
    print(
        f"{args.output}: reconstruction PSNR {psnr:.1f} dB on {len(held_out_images)} held-out images, "
        f"{seconds:.0f} s"
    )


if __name__ == "__main__":
    cli.run(main)
