"""Train a small classifier on an image folder: a feature extractor for data on which Inception means little.

    python -m toy.classifier --images quickstart/images --output quickstart/classifier.pt --image-size 64

It trains in a minute on a CPU and writes a TorchScript file for `evaluate.py --features`. Its features are
the channel means of every stage; its logits give the class accuracy of conditional samples. The file holds the
names of the classes too.
"""

import argparse
import io
import json
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import cli
from config import UserError
from data.files import write_file
from data.images import ImageFolder
from data.loading import read_all
from data.streams import rng
from evaluation.extractors import CLASS_NAMES_FILE, TorchScriptModel

# Channels per stage; their sum is the number of features.
WIDTHS = (16, 32, 64)
# One image in 8 measures the accuracy and trains nothing.
HELD_OUT = 8
BATCH = 64
LEARNING_RATE = 3e-3


class Classifier(nn.Module):
    """Convolutions of stride 2 and their channel means; images (B, 3, H, W) uint8 have 16 pixels or more."""

    def __init__(self, classes: int):
        super().__init__()
        self.stages = nn.ModuleList()
        previous = 3
        for width in WIDTHS:
            self.stages.append(build_stage(previous, width))
            previous = width
        self.head = nn.Linear(previous, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 112) and logits (B, classes)."""
        x = images.float() / 127.5 - 1
        means = []
        for stage in self.stages:
            x = stage(x)
            means.append(x.mean((2, 3)))
        return torch.cat(means, 1), self.head(means[-1])


def build_stage(channels: int, width: int) -> nn.Sequential:
    """Halves the resolution: (B, channels, H, W) -> (B, width, H / 2, W / 2)."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, 2, 1),
        nn.BatchNorm2d(width),
        nn.SiLU(),
        nn.Conv2d(width, width, 3, 1, 1),
        nn.SiLU(),
    )


def train(model: Classifier, images: Tensor, labels: Tensor, steps: int, seed: int) -> None:
    """Adam with a learning rate that falls to zero, on batches of which half is mirrored."""
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for step in tqdm(range(steps), desc="classifier", unit="step"):
        # Draw a batch
        draw = rng(seed, "classifier batch", step)
        index = torch.from_numpy(draw.integers(len(images), size=BATCH))
        is_mirrored = torch.from_numpy(draw.random(BATCH) < 0.5)
        batch = images[index]
        batch = torch.where(is_mirrored[:, None, None, None], batch.flip(-1), batch)

        # Update
        _, logits = model(batch)
        loss = F.cross_entropy(logits, labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    model.eval()


@torch.inference_mode()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose most probable class is right."""
    right = 0
    for chunk, chunk_labels in zip(images.split(BATCH), labels.split(BATCH)):
        _, logits = model(chunk)
        right += (logits.argmax(1) == chunk_labels).sum().item()
    return right / len(images)


def save(model: Classifier, class_names: list[str], image_size: int, path: Path) -> None:
    """Write TorchScript, with the names of the classes as an extra file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    example = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # PyTorch prefers other formats by now.
        warnings.simplefilter("ignore", FutureWarning)
        extra = {CLASS_NAMES_FILE: json.dumps(class_names)}
        torch.jit.save(torch.jit.trace(model, example), buffer, _extra_files=extra)
    write_file(path, lambda stream: stream.write(buffer.getvalue()))


def check_replaces_nothing(output: Path, class_names: list[str]) -> None:
    """UserError if the output would replace anything but a classifier of the same classes."""
    if not output.exists():
        return
    try:
        earlier = TorchScriptModel(output, torch.device("cpu")).class_names
    except UserError:
        earlier = None
    if earlier != class_names:
        raise UserError(
            f"--output '{output}': exists and is no classifier of these classes; give another file"
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--images", required=True, help="folder with one sub-folder of images per class")
    add("--output", type=Path, required=True, help="TorchScript file")
    add("--image-size", type=int, default=48, help="pixels per side (default: %(default)s)")
    add("--steps", type=int, default=300, help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    cli.check_at_least(args, 16, "image_size")
    cli.check_at_least(args, 1, "steps")
    cli.check_seed(args)
    cli.check_output_file("--output", args.output)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    start = time.perf_counter()

    # Images for training, and some that only measure
    source = ImageFolder(args.images, args.image_size, "--images")
    for note in source.notes:
        print(note)
    check_replaces_nothing(args.output, source.class_names)
    images, labels = read_all(source)
    classes = len(source.class_names)
    if len(images) < 2 * HELD_OUT or classes < 2:
        raise UserError(f"--images {args.images}: give at least {2 * HELD_OUT} images of two classes")
    order = rng(args.seed, "classifier held out").permutation(len(images))
    is_held_out = torch.from_numpy(order % HELD_OUT == 0)

    # Train and measure
    torch.manual_seed(args.seed)
    model = Classifier(classes)
    train(model, images[~is_held_out], labels[~is_held_out], args.steps, args.seed)
    share_right = accuracy(model, images[is_held_out], labels[is_held_out])

    save(model, source.class_names, args.image_size, args.output)
    seconds = time.perf_counter() - start
    print(
        f"{args.output}: {share_right:.1%} of {int(is_held_out.sum())} held-out images right, "
        f"{sum(WIDTHS)} features, {seconds:.0f} s"
    )


if __name__ == "__main__":
    cli.run(main)
