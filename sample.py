"""Sample a few images and draw the chunking.

    python sample.py --ckpt results/000-DC-DiT/checkpoints/0400000.pt --cfg-scale 4.0

writes sample.png, summary.json (what the images cost), chunking_viz.png, chunk_maps.png and chunking_summary.png.
"""

import argparse
import contextlib
from contextlib import AbstractContextManager
from pathlib import Path

from torch.profiler import profile, schedule
from tqdm import tqdm

import cli
from config import Config, UserError
from diffusion.samplers import Step
from figures.chunking import Trace, draw_chunk_maps, draw_chunking
from figures.cost import draw_kept
from models import describe
from models.types import Routing
from processes import group
from sampling.accounting import check_summary, report, save_summary
from sampling.arguments import (
    add_class_arguments,
    add_cuda_graph_argument,
    add_sampling_arguments,
    chosen_labels,
    describe_labels,
    print_classes,
    read_arguments,
)
from sampling.conditions import check_rows
from sampling.denoising import network_timesteps
from sampling.generate import describe_choice, generate, replace_cost_limits, summarise_run
from sampling.pictures import check_is_no_sample_folder, check_picture, save_grid

# The classes of the DiT paper's figures
IMAGENET_CLASSES = [207, 360, 387, 974, 88, 979, 417, 279]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_config_arguments(parser)
    add_sampling_arguments(parser, cfg_scale=4.0, seed=1)
    add_cuda_graph_argument(parser)
    add_class_arguments(parser, "one image for each (default: eight classes)")
    parser.add_argument(
        "--output", type=Path, default=Path("."), help="folder for the pictures (default: this one)"
    )
    parser.add_argument("--no-visualize", action="store_true", help="write sample.png and summary.json only")
    parser.add_argument(
        "--count-flops", action="store_true", help="as in the official script; costs are always counted"
    )
    parser.add_argument(
        "--profile", action="store_true", help="write a Chrome trace of one sampling step by torch.profiler"
    )
    parser.add_argument(
        "--profile-trace-path",
        type=Path,
        metavar="FILE",
        help="its file (default with --profile: sampling_trace.json)",
    )
    args = parser.parse_args(argv)
    if args.profile and args.profile_trace_path is None:
        args.profile_trace_path = Path("sampling_trace.json")
    cli.check_output("--output", args.output)
    check_is_no_sample_folder("--output", args.output)
    check_picture("--output", args.output / "sample.png")
    check_summary("--output", args.output / "summary.json")
    if args.profile_trace_path is not None:
        check_trace_file("--profile-trace-path", args.profile_trace_path)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.list_classes:
        print_classes(args)
        return
    options, trained = read_arguments(args, group.default_device())
    labels = chosen_labels(args, trained, options, default_labels(trained.config))
    check_rows(options.conditions or {}, trained.config, len(labels))
    if args.dry_run:
        print(
            f"{describe(trained.config)}\nsamples       {describe_labels(labels, options)}, {options.plain()}"
        )
        return

    # A limit on the cost becomes a fraction to drop
    indices = list(range(len(labels)))
    options, prediction = replace_cost_limits(trained, indices, labels, options)
    if prediction:
        print(describe_choice(options, prediction))

    # Sample all images as one batch
    steps = len(network_timesteps(trained.config, options))
    trace = Trace(steps)
    with tqdm(total=steps, unit="step") as bar, profiler(args.profile_trace_path, steps) as profiled:

        def on_step(step: Step, routing: Routing) -> None:
            bar.update()
            trace.record(step, routing)
            if profiled is not None:
                profiled.step()

        (batch,) = generate(trained, indices, labels, options, len(labels), on_step)

    # Write the images before anything is computed from them, then account for the cost, and draw
    save_grid(batch.images, args.output / "sample.png", columns=4)
    summary = summarise_run(trained, options, batch.record())
    save_summary(summary, args.output / "summary.json")
    if not args.no_visualize:
        tokens = trained.config.token_grid
        draw_chunking(trace, trained.autoencoder, tokens, args.output / "chunking_viz.png")
        images = batch.images.permute(0, 2, 3, 1).cpu().numpy()
        draw_chunk_maps(trace, images, tokens, args.output / "chunk_maps.png")
        draw_kept(summary, args.output / "chunking_summary.png")
    print(report(summary))
    if args.count_flops:
        print("--count-flops: the costs above are always counted")
    if args.profile_trace_path is not None:
        print(f"trace of a sampling step in {args.profile_trace_path.resolve()}")
    print(f"written to {args.output.resolve()}")


def check_trace_file(option: str, path: Path) -> None:
    """UserError for a file that cannot be written, or that holds something else than an earlier trace."""
    cli.check_output_file(option, path)
    if path.exists() and not is_trace(path):
        raise UserError(f"{option} '{path}': exists and is no trace; give another file")


def is_trace(path: Path) -> bool:
    """Whether a file begins as a Chrome trace does."""
    with open(path, "rb") as stream:
        head = stream.read(4096)
    return head.lstrip().startswith(b"{") and (b'"schemaVersion"' in head or b'"traceEvents"' in head)


def profiler(trace_path: Path | None, steps: int) -> AbstractContextManager[profile | None]:
    """Writes a Chrome trace of the second sampling step, or of the only one; None without a file."""
    if trace_path is None:
        return contextlib.nullcontext()
    trace_path.parent.mkdir(parents=True, exist_ok=True)

    def write(recorded: profile) -> None:
        recorded.export_chrome_trace(str(trace_path))

    # The first step warms up
    first = min(1, steps - 1)
    return profile(schedule=schedule(wait=0, warmup=first, active=1, repeat=1), on_trace_ready=write)


def default_labels(config: Config) -> list[int]:
    """Eight labels: those of the paper's figures for ImageNet, otherwise the first ones in turn."""
    if config.data.num_classes == 1000:
        return IMAGENET_CLASSES
    return [k % config.data.num_classes for k in range(8)]


if __name__ == "__main__":
    cli.run(main)
