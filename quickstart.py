"""The whole pipeline on the embedded data set, in minutes on two CPU cores: images to samples and a picture of the chunking.

    bash scripts/quickstart.sh

runs this file in a virtual environment. Each part is the script of the real workflow, called with configs/shapes.yaml. Running
it again goes on where it was, or finishes at once.
"""

import time
from pathlib import Path

import numpy as np
import torch

import cli
import extract_features
import sample
import train
from data.files import write_file
from processes import group
from sampling.generate import load_trained
from toy import autoencoder, shapes
from toy.routing_stats import RoutingStats, measure_routing
from weights.checkpoint import list_checkpoints

CONFIG = "configs/shapes.yaml"
IMAGE_SIZE = 48  # pixels, as in CONFIG
TRAIN_IMAGES, HELD_OUT_IMAGES = 2048, 64


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart"), help="folder for everything (default: %(default)s)"
    )
    out = parser.parse_args(argv).output
    if (out / "table.txt").is_file():
        print(
            f"{(out / 'table.txt').read_text(encoding='utf-8')}\n{out} is complete; remove it to start anew"
        )
        return
    seconds = {}
    for name, part in PARTS.items():
        print(f"\n=== {name}", flush=True)
        started = time.perf_counter()
        result = part(out)
        seconds[name] = time.perf_counter() - started
    table = format_table(result, seconds)
    write_file(out / "table.txt", lambda stream: stream.write(f"{table}\n".encode()))
    print(
        f"\n{table}\n\n{out}/sample.png and {out}/chunking_viz.png show the samples and what the router kept."
    )


def write_images(out: Path) -> None:
    shapes.main(
        ["--output", str(out / "images"), "--image-size", str(IMAGE_SIZE), "--num-images", str(TRAIN_IMAGES)]
    )


def train_autoencoder(out: Path) -> None:
    autoencoder.main(
        [
            "--images",
            str(out / "images"),
            "--output",
            str(out / "autoencoder"),
            "--image-size",
            str(IMAGE_SIZE),
        ]
    )


def extract(out: Path) -> None:
    paths = [
        "--data-path",
        str(out / "images"),
        "--features-path",
        str(out / "features"),
        "--vae",
        str(out / "autoencoder"),
    ]
    extract_features.main([*paths, "--image-size", str(IMAGE_SIZE), "--num-workers", "0"])


def train_model(out: Path) -> None:
    paths = [f"data.feature_path={out / 'features'}", f"data.vae={out / 'autoencoder'}"]
    train.main(["--config", CONFIG, "--output", str(out / "run"), "--set", paths[0], "--set", paths[1]])


def draw_samples(out: Path) -> None:
    sample.main(
        ["--ckpt", newest(out), "--output", str(out), "--cfg-scale", "2", "--num-sampling-steps", "100"]
    )


def measure(out: Path) -> RoutingStats:
    """On images that no training has seen."""
    images, masks, labels = zip(
        *(shapes.render(TRAIN_IMAGES + k, IMAGE_SIZE) for k in range(HELD_OUT_IMAGES))
    )
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    trained = load_trained(newest(out), group.default_device())
    return measure_routing(trained, pixels, torch.from_numpy(np.stack(masks)), list(labels))


def newest(out: Path) -> str:
    return str(list_checkpoints(out / "run" / "checkpoints")[-1])


PARTS = {
    "images": write_images,
    "autoencoder": train_autoencoder,
    "features": extract,
    "training": train_model,
    "samples": draw_samples,
    "measurement": measure,
}


def format_table(stats: RoutingStats, seconds: dict[str, float]) -> str:
    lines = [
        f"kept tokens, {HELD_OUT_IMAGES} held-out images     share    ratio",
        f"on objects                         {stats.on_objects:6.1%}",
        f"on background                      {stats.on_background:6.1%}   {stats.on_objects / stats.on_background:5.2f}",
        f"at t < 300 (clean)                 {stats.clean:6.1%}",
        f"at t > 700 (noisy)                 {stats.noisy:6.1%}   {stats.clean / stats.noisy:5.2f}",
        f"overall                            {stats.overall:6.1%}",
        "",
        *(f"{name:<34} {value:6.1f} s" for name, value in seconds.items()),
        f"{'together':<34} {sum(seconds.values()):6.1f} s",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
