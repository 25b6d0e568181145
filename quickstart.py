"""The whole workflow on drawn shapes, in minutes on two CPU cores: from images to samples.

    bash scripts/quickstart.sh

runs this file in a virtual environment. Each part calls a script of the real workflow, with
configs/shapes.yaml. Run it again to resume where it stopped; once everything is there, it only prints the
results.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import cli
import extract_features
import sample
import train
from data.files import write_text
from figures import kept_tokens
from processes import group
from processes.threads import leave_busy_cores
from sampling.generate import load_trained
from toy import autoencoder, shapes
from toy.routing_stats import RoutingStats, measure_routing
from weights.checkpoint import list_checkpoints

CONFIG = "configs/shapes.yaml"
# Pixels, as in CONFIG.
IMAGE_SIZE = 64
# The same network, trained for longer on larger images; it comes with the repository
SHIPPED = Path("assets/shapes")
TRAIN_IMAGES = 2048
HELD_OUT_IMAGES = 64


def run_workflow(out: Path) -> str:
    """Run every part and return the table of results."""
    images = out / "images"
    vae = out / "autoencoder"
    features = out / "features"
    run = out / "run"
    seconds: dict[str, float] = {}

    with timed("images", seconds):
        shapes.main(command_line(output=images, image_size=IMAGE_SIZE, num_images=TRAIN_IMAGES))

    with timed("autoencoder", seconds):
        autoencoder.main(command_line(images=images, output=vae, image_size=IMAGE_SIZE))

    with timed("features", seconds):
        options = command_line(
            data_path=images, features_path=features, vae=vae, image_size=IMAGE_SIZE, num_workers=0
        )
        extract_features.main(options)

    with timed("training", seconds):
        paths = ["--set", f"data.feature_path={features}", "--set", f"data.vae={vae}"]
        train.main([*command_line(config=CONFIG, output=run), *paths])
    checkpoint = list_checkpoints(run / "checkpoints")[-1]

    with timed("samples", seconds):
        options = command_line(
            ckpt=checkpoint, output=out, cfg_scale=2, num_sampling_steps=25, sampler="dpm++"
        )
        sample.main([*options, "--lite-cfg", *command_line(uncond_tail_dropping_fraction=0.8)])
        models = [str(checkpoint), str(SHIPPED)]
        kept_tokens.main([*models, *command_line(output=out / "kept_tokens.png", num_sampling_steps=25)])

    with timed("measurement", seconds):
        stats = measure_on_held_out_images(checkpoint)

    return format_table(stats, seconds)


@contextlib.contextmanager
def timed(part: str, seconds: dict[str, float]) -> Iterator[None]:
    """Print the name of a part and record how long it takes."""
    print(f"\n=== {part}", flush=True)
    leave_busy_cores()
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


def command_line(**options: str | float | Path) -> list[str]:
    """Options of a command line: image_size=64 becomes --image-size 64."""
    words = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def measure_on_held_out_images(checkpoint: Path) -> RoutingStats:
    """Routing on images that neither the autoencoder nor the model has seen."""
    images = []
    masks = []
    labels = []
    for index in range(TRAIN_IMAGES, TRAIN_IMAGES + HELD_OUT_IMAGES):
        image, mask, label = shapes.render(index, IMAGE_SIZE)
        images.append(image)
        masks.append(mask)
        labels.append(label)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    trained = load_trained(str(checkpoint), group.default_device())
    return measure_routing(trained, pixels, torch.from_numpy(np.stack(masks)), labels)


def format_table(stats: RoutingStats, seconds: dict[str, float]) -> str:
    object_ratio = stats.on_objects / stats.on_background
    clean_ratio = stats.clean / stats.noisy
    lines = [
        f"kept tokens, {HELD_OUT_IMAGES} held-out images     share    ratio",
        f"on objects                         {stats.on_objects:6.1%}",
        f"on background                      {stats.on_background:6.1%}   {object_ratio:5.2f}",
        f"at t < 300 (clean)                 {stats.clean:6.1%}",
        f"at t > 700 (noisy)                 {stats.noisy:6.1%}   {clean_ratio:5.2f}",
        f"overall                            {stats.overall:6.1%}",
        "",
    ]
    for part, value in seconds.items():
        lines.append(f"{part:<34} {value:6.1f} s")
    lines.append(f"{'together':<34} {sum(seconds.values()):6.1f} s")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    output_help = "folder for everything (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help=output_help)
    out = parser.parse_args(argv).output
    table_path = out / "table.txt"
    if table_path.is_file():
        table = table_path.read_text(encoding="utf-8")
        print(f"{table}\n{out} is complete; remove it to start again")
        return
    table = run_workflow(out)
    write_text(table_path, f"{table}\n")
    print(
        f"\n{table}\n\n{out}/sample.png and {out}/chunk_maps.png show the samples and what the router kept.\n"
        f"{out}/kept_tokens.png: above samples of this model, below those of {SHIPPED}, which trained longer."
    )


if __name__ == "__main__":
    cli.run(main)
