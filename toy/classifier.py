"""A small classifier of an image folder as feature extractor, for data sets where Inception means little.

    python -m toy.classifier --images quickstart/images --output quickstart/classifier.pt --image-size 48

trains in a minute on a CPU and writes a TorchScript file for `evaluate.py --features`: its features are channel means of every
stage, and its logits give the class accuracy of conditional samples.
"""

import argparse
import io
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import cli
from config import UserError
from data.files import write_file
from data.images import ImageFolder, UnreadableImage
from data.streams import rng

WIDTHS = (16, 32, 64)  # channels per stage; their sum is the number of features
HELD_OUT = 8  # one image in this many measures the accuracy
BATCH = 64
LEARNING_RATE = 3e-3


class Classifier(nn.Module):
    """Convolutions of stride 2 and their channel means; takes images (B, 3, H, W) uint8 of any size from 16 pixels."""

    def __init__(self, classes: int):
        super().__init__()
        widths = (3, *WIDTHS)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.SiLU(), nn.Conv2d(b, b, 3, 1, 1), nn.SiLU()
            )
            for a, b in zip(widths, widths[1:])
        )
        self.head = nn.Linear(WIDTHS[-1], classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 112) and logits (B, classes)."""
        x, means = images.float() / 127.5 - 1, []
        for stage in self.stages:
            x = stage(x)
            means.append(x.mean((2, 3)))
        return torch.cat(means, 1), self.head(means[-1])


def load_images(folder: str, image_size: int) -> tuple[Tensor, Tensor, int]:
    """Images (N, 3, H, W) uint8, labels (N,) and the number of classes of an image folder."""
    source, images, labels = ImageFolder(folder, image_size), [], []
    for index in tqdm(range(len(source)), desc="reading", unit="img"):
        try:
            pixels, label = source[index]
        except UnreadableImage as error:
            tqdm.write(f"skipped {error}")
            continue
        images.append(pixels)
        labels.append(label)
    if len(images) < 2 * HELD_OUT or len(source.class_names) < 2:
        raise UserError(f"--images {folder}: give at least {2 * HELD_OUT} images of two classes")
    return (
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        torch.tensor(labels),
        len(source.class_names),
    )


def train(model: Classifier, images: Tensor, labels: Tensor, steps: int, seed: int) -> None:
    """Adam on mirrored batches with a learning rate that falls to zero."""
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for step in tqdm(range(steps), desc="classifier", unit="step"):
        draw = rng(seed, "classifier batch", step)
        index, mirrored = draw.integers(len(images), size=BATCH), torch.from_numpy(draw.random(BATCH) < 0.5)
        batch = torch.where(mirrored[:, None, None, None], images[index].flip(-1), images[index])
        loss = F.cross_entropy(model(batch)[1], labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    model.eval()


def save(model: Classifier, image_size: int, path: Path) -> None:
    """Write TorchScript."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch prefers other formats by now
        scripted = torch.jit.trace(model, torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8))
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
    write_file(path, lambda stream: stream.write(buffer.getvalue()))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--images", required=True, help="folder with one sub-folder of images per class")
    parser.add_argument("--output", type=Path, required=True, help="TorchScript file")
    parser.add_argument("--image-size", type=int, default=48, help="pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    for name, least in (("image_size", 16), ("steps", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    cli.check_output_file("--output", args.output)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    started = time.perf_counter()
    images, labels, classes = load_images(args.images, args.image_size)
    held_out = torch.from_numpy(
        rng(args.seed, "classifier held out").permutation(len(images)) % HELD_OUT == 0
    )
    torch.manual_seed(args.seed)
    model = Classifier(classes)
    train(model, images[~held_out], labels[~held_out], args.steps, args.seed)
    with torch.inference_mode():
        guessed = torch.cat([model(part)[1].argmax(1) for part in images[held_out].split(BATCH)])
    accuracy = (guessed == labels[held_out]).double().mean().item()
    save(model, args.image_size, args.output)
    seconds = time.perf_counter() - started
    print(
        f"{args.output}: {accuracy:.1%} of {len(guessed)} held-out images right, {sum(WIDTHS)} features, {seconds:.0f} s"
    )


if __name__ == "__main__":
    cli.run(main)
