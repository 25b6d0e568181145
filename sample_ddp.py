"""Sample many images for evaluation, on any number of processes.

    torchrun --nnodes=1 --nproc_per_node=8 sample_ddp.py --ckpt 0400000.pt --output-dir samples --cfg-scale 1.5

writes samples/NNNNNN.png, samples/summary.json (what the images cost) and samples.npz for the ADM evaluation suite. The same
command again goes on where it was.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

import cli
from config import UserError
from data.files import write_file
from models import describe
from processes import group
from processes.lock import FolderLock
from processes.watch import ProcessWatch
from sampling.accounting import read_records, report, save_record, save_summary, summarise
from sampling.arguments import (
    add_cuda_graph_argument,
    add_sampling_arguments,
    load_trained_from,
    sampling_options,
    use_cuda_graph,
)
from sampling.budgets import Budget
from sampling.generate import (
    SampledBatch,
    SamplingOptions,
    TrainedModel,
    describe_choice,
    draw_labels,
    generate,
    replace_cost_limits,
)
from sampling.npz import write_npz
from sampling.pictures import save_png

NOTE, RECORDS = "settings.json", "records"
WRITERS = 4  # threads per process that compress and write PNG files while the next batch is sampled


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
        "--num-fid-samples", type=int, default=50000, help="how many images (default: %(default)s)"
    )
    parser.add_argument(
        "--labels", choices=("uniform", "balanced"), default="uniform", help="random as in DiT, or in turn"
    )
    args = parser.parse_args(argv)
    for name in ("per_proc_batch_size", "num_fid_samples"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    cli.check_output("--output-dir", args.output_dir)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    processes = group.start_processes()
    options, trained = sampling_options(args, processes.device), load_trained_from(args, processes.device)
    options.check(trained.config)
    trained = use_cuda_graph(args, options, trained)
    index = list(range(args.num_fid_samples))
    labels = draw_labels(options.seed, index, trained.config.data.num_classes, args.labels == "balanced")
    settings = {**dataclasses.asdict(options), "labels": args.labels, "batch": args.per_proc_batch_size}
    settings |= {
        "model": trained.fingerprint,
        "vae": trained.autoencoder.sha256,
        "cfg_channels": trained.config.diffusion.cfg_channels,
    }
    if args.dry_run:
        group.print_once(
            f"{describe(trained.config)}\nsamples       {len(index)} into {args.output_dir}, {settings}"
        )
        return
    watch = ProcessWatch(processes.rank, processes.world)
    with FolderLock(args.output_dir, "--output-dir") as lock:
        todo = group.on_first(
            lambda: prepare_folder(
                args, settings, index, lock, lambda: settle(trained, index, labels, options)
            )
        )
        chosen = read_note(args.output_dir)["chosen"]
        budgets = {name: plain and Budget(**plain) for name, plain in chosen.items()}
        options = dataclasses.replace(options, **budgets)
        sample_missing(trained, args, options, index, labels, todo[processes.rank :: processes.world])
        if processes.world > 1:
            dist.barrier()  # watched, for some may take long
        watch.close()
        if processes.rank == 0:
            npz = args.output_dir.resolve().with_suffix(args.output_dir.resolve().suffix + ".npz")
            write_npz(npz, [png_path(args.output_dir, i) for i in index], labels)
            print(account(trained, args, options, labels))
            print(f"{len(index)} images in {args.output_dir} and {npz}")


def settle(trained: TrainedModel, index: list[int], labels: list[int], options: SamplingOptions) -> dict:
    """The budgets with fractions in place of limits on the cost, as plain data."""
    chosen, prediction = replace_cost_limits(trained, index, labels, options)
    if prediction:
        print(describe_choice(chosen, prediction))
    values = dataclasses.asdict(chosen)
    return {"budget": values["budget"], "uncond": values["uncond"]}


def prepare_folder(
    args: argparse.Namespace, settings: dict, index: list[int], lock: FolderLock, settle: Callable[[], dict]
) -> list[int]:
    """Note the settings and the settled budgets in the folder; return the first sample of each batch that is not complete.

    Refuses a folder that holds samples of other settings, or that another run uses.
    """
    folder, size = args.output_dir, args.per_proc_batch_size
    note, settings = folder / NOTE, json.loads(json.dumps(settings))
    names = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.is_dir() else set()
    if not note.is_file() and names - {
        NOTE + ".tmp"
    }:  # which a run left that was killed while it wrote the note
        raise UserError(
            f"--output-dir '{folder}' holds files that this script did not write; give another folder"
        )
    settled = (
        None if note.is_file() else settle()
    )  # before the folder is made: a budget may turn out to be impossible
    lock.acquire()
    if note.is_file():
        earlier = read_note(folder)
        changed = [key for key in settings if settings[key] != earlier.get(key)]
        if changed:
            raise UserError(
                f"--output-dir '{folder}' holds samples of another {', '.join(changed)}; give another folder"
            )
    else:
        write_file(
            note, lambda stream: stream.write(json.dumps({**settings, "chosen": settled}, indent=1).encode())
        )
    (folder / RECORDS).mkdir(exist_ok=True)
    return [start for start in index[::size] if not is_done(folder, start, index[start : start + size])]


def read_note(folder: Path) -> dict:
    return json.loads((folder / NOTE).read_text(encoding="utf-8"))


def account(trained: TrainedModel, args, options: SamplingOptions, labels: list[int]) -> str:
    """Write the folder's summary.json from the records of all batches; returns it in words."""
    starts = range(0, args.num_fid_samples, args.per_proc_batch_size)
    timesteps, counts, seconds = read_records(
        [record_path(args.output_dir, start) for start in starts], len(labels)
    )
    summary = summarise(
        trained.config,
        trained.autoencoder.model.config,
        timesteps,
        counts,
        labels,
        trained.class_names,
        seconds,
    )
    save_summary({"options": dataclasses.asdict(options), **summary}, args.output_dir / "summary.json")
    return report(summary)


def sample_missing(
    trained: TrainedModel, args, options, index: list[int], labels: list[int], todo: list[int]
) -> None:
    """Sample the batches that begin at `todo`. A batch has the same samples for any number of processes."""
    size = args.per_proc_batch_size
    bar = tqdm(total=len(todo), unit="batch", disable=int(os.environ.get("RANK", 0)) > 0)
    with ThreadPoolExecutor(WRITERS) as writers, bar:
        pending = []
        for start in todo:
            part = slice(start, start + size)
            (batch,) = generate(trained, index[part], labels[part], options, batch_size=size)
            save_record(batch.kept, batch.seconds, record_path(args.output_dir, start))
            finish(pending)  # of the batch before: errors show up here, and at most one batch waits in memory
            pending = [writers.submit(save_png, *job) for job in png_jobs(batch, args.output_dir)]
            bar.update()
        finish(pending)


def is_done(folder: Path, start: int, index: list[int]) -> bool:
    """Whether the batch that begins at `start` has its record and all images."""
    return all(
        is_complete(path) for path in (record_path(folder, start), *(png_path(folder, i) for i in index))
    )


def png_jobs(batch: SampledBatch, folder: Path) -> list[tuple]:
    return [(image, png_path(folder, i)) for image, i in zip(batch.images, batch.index)]


def is_complete(path: Path) -> bool:
    """A power cut may leave the name of a file without its content."""
    return path.exists() and path.stat().st_size > 0


def png_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def record_path(folder: Path, start: int) -> Path:
    return folder / RECORDS / f"{start:06d}.npz"


def finish(pending: list) -> None:
    for job in pending:
        job.result()


if __name__ == "__main__":
    cli.run(main)
