"""Sample many images for evaluation, on any number of processes.

    torchrun --nproc_per_node=8 sample_ddp.py --ckpt 0400000.pt --output-dir samples --cfg-scale 1.5

writes samples/NNNNNN.png, samples/summary.json (what the images cost) and samples.npz for the ADM evaluation
suite. The same command resumes an interrupted run.
"""

import argparse
import dataclasses
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

import cli
from models import describe
from processes import group
from processes.lock import FolderLock
from processes.watch import ProcessWatch
from sampling.accounting import read_records, report, save_record, save_summary
from sampling.arguments import add_cuda_graph_argument, add_sampling_arguments, read_arguments
from sampling.conditions import check_rows
from sampling.generate import describe_choice, draw_labels, generate, replace_cost_limits, summarise_run
from sampling.load import TrainedModel
from sampling.npz import write_npz
from sampling.options import SamplingOptions
from sampling.pictures import save_png
from sampling.sample_folder import SampleFolder

# Threads per process that compress and write PNG files while the next batch is sampled
WRITERS = 4


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_config_arguments(parser)
    add_sampling_arguments(parser, cfg_scale=1.5, seed=0)
    add_cuda_graph_argument(parser)
    parser.add_argument(
        "--output-dir", type=Path, default=Path("samples"), help="folder for the PNG files (default: samples)"
    )
    parser.add_argument("--per-proc-batch-size", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument(
        "--num-fid-samples", type=int, default=50000, help="number of images (default: %(default)s)"
    )
    parser.add_argument(
        "--labels", choices=("uniform", "balanced"), default="uniform", help="random as in DiT, or in turn"
    )
    args = parser.parse_args(argv)
    cli.check_at_least(args, 1, "per_proc_batch_size", "num_fid_samples")
    cli.check_output("--output-dir", args.output_dir)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    processes = group.start_processes()
    options, trained = read_arguments(args, processes.device)
    indices = list(range(args.num_fid_samples))
    check_rows(options.conditions or {}, trained.config, len(indices))
    labels = draw_labels(options.seed, indices, trained.config.data.num_classes, args.labels == "balanced")
    settings = settings_of(args, options, trained)
    if args.dry_run:
        samples = f"samples       {len(indices)} into {args.output_dir}, {settings}"
        group.print_once(f"{describe(trained.config)}\n{samples}")
        return

    def choose_budgets() -> SamplingOptions:
        chosen, prediction = replace_cost_limits(trained, indices, labels, options)
        if prediction:
            print(describe_choice(chosen, prediction))
        return chosen

    folder = SampleFolder(args.output_dir, len(indices), args.per_proc_batch_size)
    watch = ProcessWatch(processes.rank, processes.world)
    with FolderLock(args.output_dir, "--output-dir") as lock:
        # Find what is missing, and sample it
        missing = group.on_first(lambda: folder.prepare(settings, lock, choose_budgets))
        budget, uncond = folder.chosen_budgets()
        options = dataclasses.replace(options, budget=budget, uncond=uncond)
        sample_missing(trained, options, labels, folder, missing[processes.rank :: processes.world])
        if processes.world > 1:
            dist.barrier()  # under the watch: the other processes may take long
        watch.close()
        if processes.rank > 0:
            return

        # Collect the images, and account for their cost
        # Samples at scale 0 have no class
        known_labels = labels if options.cfg_scale else None
        write_npz(folder.npz, [folder.png(i) for i in indices], known_labels, trained.class_names)
        record = read_records([folder.record(start) for start in folder.starts], labels)
        summary = summarise_run(trained, options, record)
        save_summary(summary, folder.summary)
        print(report(summary))
        print(f"{len(indices)} images in {args.output_dir} and {folder.npz}")
        others = folder.count_other_images()
        if others:
            print(
                f"note: {args.output_dir} holds {others} more images of an earlier, larger --num-fid-samples; "
                f"{folder.npz.name} and {folder.summary.name} are about the first {len(indices)} only"
            )


def settings_of(args: argparse.Namespace, options: SamplingOptions, trained: TrainedModel) -> dict:
    """What decides the samples: a run with other settings must not be resumed."""
    return {
        **options.plain(),
        "labels": args.labels,
        "batch": args.per_proc_batch_size,
        "model": trained.fingerprint,
        "vae": trained.autoencoder.sha256,
        "tf32": trained.config.allows_tf32(options.bf16),
        "cfg_channels": trained.config.diffusion.cfg_channels,
    }


def sample_missing(
    trained: TrainedModel,
    options: SamplingOptions,
    labels: list[int],
    folder: SampleFolder,
    starts: list[int],
) -> None:
    """Sample this process's missing batches. A batch has the same samples for any number of processes."""
    not_first = dist.is_initialized() and dist.get_rank() > 0
    with ThreadPoolExecutor(WRITERS) as writers, tqdm(starts, unit="batch", disable=not_first) as bar:
        writing: list[Future] = []
        for start in bar:
            indices = folder.batch(start)
            own_labels = [labels[i] for i in indices]
            (batch,) = generate(trained, indices, own_labels, options, folder.batch_size)
            save_record(batch.kept, batch.seconds, batch.peak_memory, folder.record(start))
            # Errors of the batch before show up here, and at most one batch waits in memory
            wait_for(writing)
            writing = [
                writers.submit(save_png, image, folder.png(i)) for image, i in zip(batch.images, indices)
            ]
        wait_for(writing)


def wait_for(writing: list[Future]) -> None:
    """Wait until all files are written; raises what writing one of them raised."""
    for job in writing:
        job.result()


if __name__ == "__main__":
    cli.run(main)
