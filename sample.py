"""Sample a few images and draw the chunking.

    python sample.py --ckpt results/000-DC-DiT/checkpoints/0400000.pt --cfg-scale 4.0

writes sample.png, summary.json (what the images cost), chunking_viz.png and chunking_summary.png into --output.
"""

import argparse
import dataclasses
from pathlib import Path

from tqdm import tqdm

import cli
from config import Config
from figures.chunking import Trace, draw_chunking
from figures.cost import draw_kept
from models import describe
from processes import group
from sampling.accounting import report, save_summary, stack_kept, summarise
from sampling.arguments import (
    add_cuda_graph_argument,
    add_sampling_arguments,
    load_trained_from,
    sampling_options,
    use_cuda_graph,
)
from sampling.generate import (
    SampledBatch,
    SamplingOptions,
    TrainedModel,
    check_labels,
    describe_choice,
    generate,
    replace_cost_limits,
)
from sampling.pictures import save_grid

IMAGENET_CLASSES = [207, 360, 387, 974, 88, 979, 417, 279]  # those of the DiT paper's figures


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_config_arguments(parser)
    add_sampling_arguments(parser, cfg_scale=4.0, seed=1)
    add_cuda_graph_argument(parser)
    parser.add_argument("--classes", type=int, nargs="+", help="one image per label (default: eight of them)")
    parser.add_argument(
        "--output", type=Path, default=Path("."), help="folder for the pictures (default: this one)"
    )
    parser.add_argument("--no-visualize", action="store_true", help="write sample.png and summary.json only")
    args = parser.parse_args(argv)
    cli.check_output("--output", args.output)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = group.default_device()
    options, trained = sampling_options(args, device), load_trained_from(args, device)
    options.check(trained.config)
    trained = use_cuda_graph(args, options, trained)
    labels = args.classes or default_labels(trained.config)
    check_labels(labels, trained.config)
    if args.dry_run:
        print(f"{describe(trained.config)}\nsamples       {len(labels)} of classes {labels}, {options}")
        return
    index = list(range(len(labels)))
    options, prediction = replace_cost_limits(trained, index, labels, options)
    if prediction:
        print(describe_choice(options, prediction))
    trace = Trace(options.num_sampling_steps)
    with tqdm(total=options.num_sampling_steps, unit="step") as bar:

        def observe(step, routing):
            bar.update()
            trace.record(step, routing)

        (batch,) = generate(trained, index, labels, options, batch_size=len(labels), observe=observe)
    summary = account(trained, batch, options)
    save_grid(batch.images, args.output / "sample.png", columns=4)
    save_summary(summary, args.output / "summary.json")
    if not args.no_visualize:
        draw_chunking(trace, trained.autoencoder, args.output / "chunking_viz.png")
        draw_kept(summary, args.output / "chunking_summary.png")
    print(report(summary))
    print(f"written to {args.output.resolve()}")


def account(trained: TrainedModel, batch: SampledBatch, options: SamplingOptions) -> dict:
    timesteps = [step.t for step in batch.kept]
    decoder, counts = trained.autoencoder.model.config, stack_kept(batch.kept)
    summary = summarise(
        trained.config, decoder, timesteps, counts, batch.labels, trained.class_names, batch.seconds
    )
    return {"options": dataclasses.asdict(options), **summary}


def default_labels(config: Config) -> list[int]:
    if config.data.num_classes == 1000:
        return IMAGENET_CLASSES
    return [k % config.data.num_classes for k in range(8)]


if __name__ == "__main__":
    cli.run(main)
