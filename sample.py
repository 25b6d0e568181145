"""Sample a few images and draw the chunking.

    python sample.py --ckpt results/000-DC-DiT/checkpoints/0400000.pt --cfg-scale 4.0

writes sample.png, chunking_viz.png and chunking_summary.png into --output.
"""

import argparse
import time
from pathlib import Path

import torch
from tqdm import tqdm

import cli
from config import Config
from evaluation import flops
from evaluation.arguments import add_sampling_arguments, load_run_from, sampling_options
from evaluation.chunk_maps import Trace, draw_chunking, draw_summary
from evaluation.generate import Batch, Kept, Run, check_labels, generate
from evaluation.pictures import save_grid

IMAGENET_CLASSES = [207, 360, 387, 974, 88, 979, 417, 279]  # those of the DiT paper's figures


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_config_arguments(parser)
    add_sampling_arguments(parser, cfg_scale=4.0, seed=1)
    parser.add_argument("--classes", type=int, nargs="+", help="one image per label (default: eight of them)")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for the pictures (default: this one)")
    parser.add_argument("--no-visualize", action="store_true", help="write sample.png only")
    args = parser.parse_args(argv)
    cli.check_output("--output", args.output)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    options, device = sampling_options(args), cli.default_device()
    run = load_run_from(args, device)
    options.check(run.config)
    labels = args.classes or default_labels(run.config)
    check_labels(labels, run.config)
    if args.dry_run:
        print(f"{cli.describe(run.config)}\nsamples       {len(labels)} of classes {labels}, {options}")
        return
    trace = Trace(options.num_sampling_steps)
    started = time.perf_counter()
    with tqdm(total=options.num_sampling_steps, unit="step") as bar:

        def observe(step, routing):
            bar.update()
            trace.observe(step, routing)

        (batch,) = generate(run, list(range(len(labels))), labels, options, batch_size=len(labels), observe=observe)
    seconds = time.perf_counter() - started
    save_grid(batch.images, args.output / "sample.png", columns=4)
    if not args.no_visualize:
        draw_chunking(trace, run.autoencoder, args.output / "chunking_viz.png")
        draw_summary([batch.kept], run.config.latent_size**2, args.output / "chunking_summary.png")
    print(report(run, batch, seconds))
    print(f"written to {args.output.resolve()}")


def default_labels(config: Config) -> list[int]:
    if config.data.num_classes == 1000:
        return IMAGENET_CLASSES
    return [k % config.data.num_classes for k in range(8)]


def report(run: Run, batch: Batch, seconds: float) -> str:
    """Kept tokens, cost and time in words."""
    tokens = run.config.latent_size**2
    lines = [f"{len(batch.labels)} images of {seconds / len(batch.labels):.2f} s each (autoencoder included)"]
    for branch in ("conditional", "unconditional"):
        counts = [getattr(step, branch) for step in batch.kept]
        if counts[0] is not None:
            share = torch.stack(counts).float() / tokens
            lines.append(
                f"{branch} branch: {share.mean():.1%} of {tokens} tokens kept (from {share.min():.1%} to {share.max():.1%})"
            )
    lines.append(f"{tflop_per_image(run.config, batch.kept):.4f} TFLOP per image over {len(batch.kept)} steps")
    return "\n".join(lines)


def tflop_per_image(config: Config, kept: list[Kept]) -> float:
    """Mean cost of the denoiser over all steps and branches."""
    total = 0.0
    for step in kept:
        for counts in (step.conditional, step.unconditional):
            if counts is not None:
                counts = counts.cpu().double()
                total += sum(
                    flops.forward_flops(config, flops.Kept(counts.mean().item(), counts.square().mean().item())).values()
                )
    return total / 1e12


if __name__ == "__main__":
    cli.run(main)
