"""A folder of images to a feature store: encode every image once with a pretrained autoencoder.

    torchrun --nnodes=1 --nproc_per_node=N extract_features.py --data-path DIR --features-path OUT

Run the same command again to continue an interrupted extraction, with any number of processes. The store does
not depend on the number of processes: each image is stored once, shards and batches are always cut alike (a
batch is an eighth of --global-batch-size), and noise and flips are functions of (--global-seed, image). It is
bitwise the same on one kind of device; on CPUs, with one number of threads per process (torchrun sets
OMP_NUM_THREADS=1, python does not).

Exit status: 0; 1 if more than --max-bad images were unreadable (the store is complete without them), if all
were, or if writing failed; 2 if the command itself is wrong.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import cli
from config import UserError
from data.autoencoder import Autoencoder
from data.feature_writer import FeatureWriter, StoreOptions, StoreSettings, encode_images, stored_shard_size
from data.folders import class_table
from data.images import ImageFolder, SkippedImage
from data.loading import ImageBatch, read_shards
from data.source_files import FileState, SourceChanges
from data.store_files import DTYPES, STORE_KINDS, read_json
from processes import group
from processes.lock import FolderLock
from processes.watch import ProcessWatch

# The official launch has 8 processes. Whatever their number, an eighth of the batch is encoded at once.
OFFICIAL_PROCESSES = 8
# Options of the official script, which does not use them either.
UNUSED_OPTIONS = ("--results-dir", "--model", "--num-classes", "--epochs", "--log-every", "--ckpt-every")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add(
        "--data-path",
        required=True,
        help="folder with one sub-folder of images per class, or one class of images",
    )
    add("--features-path", default="features", help="folder of the store (default: %(default)s)")
    cli.add_image_size_argument(parser, "the centre crop in pixels (default: 256)", default=[256])
    add("--vae", default="ema", help="ema or mse (stabilityai/sd-vae-ft-*) or a local diffusers folder")
    batch_help = "an eighth of it is encoded at once, on any number of processes (default: %(default)s)"
    add("--global-batch-size", type=int, default=256, help=batch_help)
    add("--num-workers", type=int, default=4, help="image readers per process (default: %(default)s)")
    add("--global-seed", type=int, default=0, help="seed of noise and flips with --store sample")
    store_help = "moments: mean and std, latents are drawn in training; sample: one frozen latent"
    add("--store", type=store_kind, choices=STORE_KINDS, default="moments", help=store_help)
    add("--no-flip", action="store_true", help="leave out mirror images")
    add("--dtype", choices=DTYPES, default="float16", help="(default: %(default)s)")
    add("--shard-size", type=int, help="images per shard (default: 1024, more above 262,144 images)")
    add("--max-bad", type=int, default=0, help="unreadable images beyond which the exit status is 1")
    add("--dry-run", action="store_true", help="check everything, print what would be done, and stop")
    for option in UNUSED_OPTIONS:
        add(option, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.image_size = cli.image_size(args)
    cli.check_at_least(args, 1, "global_batch_size")
    cli.check_at_least(args, 0, "num_workers", "max_bad")
    cli.check_seed(args, "global_seed")
    if args.shard_size is not None:
        cli.check_at_least(args, 1, "shard_size")
    cli.check_output("--features-path", args.features_path)
    store = Path(args.features_path).resolve()
    if Path(args.data_path).resolve() in store.parents:
        raise UserError(
            f"--features-path {args.features_path}: lies in --data-path {args.data_path}, where it would count as "
            "a class; choose a folder outside"
        )
    return args


def unused_options(args: argparse.Namespace) -> list[str]:
    """The options given that have no effect."""
    given = vars(args)
    return [option for option in UNUSED_OPTIONS if given[option[2:].replace("-", "_")] is not None]


def store_kind(text: str) -> str:
    if text == "official":
        raise argparse.ArgumentTypeError(
            "training reads the official layout, but it is not written; use moments or sample"
        )
    return text


def prepare(writer: FeatureWriter, lock: FolderLock, processes: group.Processes) -> list[int] | None:
    """Shards that this process has to write; None if the store is complete. Collective."""
    # Shards are shared out by index, so all processes must see the same list of images
    hashes = [writer.settings.source_hash] * processes.world
    if processes.world > 1:
        dist.all_gather_object(hashes, writer.settings.source_hash)
    if len(set(hashes)) > 1:
        raise UserError(
            "--data-path: the processes see different files; "
            "use a folder that all machines share and nobody changes"
        )

    def prepare_folder() -> list[int] | None:
        # Taking the lock makes the folder: first check that nothing stands against it
        writer.check()
        lock.acquire()
        changes = report_changes(writer)
        missing = writer.prepare(changes)
        if missing:
            print(f"{writer.folder}: {describe_work(writer, missing, changes)}")
        return missing

    missing = group.on_first(prepare_folder)
    return None if missing is None else missing[processes.rank :: processes.world]


def report_changes(writer: FeatureWriter) -> SourceChanges | None:
    """Print what has happened to the images since the extraction began; the result of `find_changes`."""
    changes = writer.find_changes()
    if changes:
        print(f"{writer.folder}: {changes}")
    if writer.list_has_changed():
        print(
            f"{writer.folder}: images were added or removed since the extraction began; "
            "what is encoded of unchanged images is kept"
        )
    return changes


def describe_work(writer: FeatureWriter, missing: list[int], changes: SourceChanges | None) -> str:
    """How many images there are to encode, and why these are more than have changed."""
    to_encode = sum(len(writer.sources(shard)) for shard in missing)
    text = f"{to_encode:,} of {writer.settings.source_count:,} images to encode"
    if not changes:
        return text
    unchanged = to_encode - len(changes.new) - len(changes.changed)
    if unchanged <= 0:
        return text
    size = writer.settings.shard_size
    return (
        f"{text}; {unchanged:,} of them are unchanged, but have moved or share a shard of {size} with others"
    )


def extract(
    writer: FeatureWriter,
    shards: list[int],
    autoencoder: Autoencoder,
    batches: Iterable[ImageBatch],
    show_progress: bool,
) -> None:
    """Encode the batches, which are those of `shards` in order, and write the shards."""
    settings = writer.settings
    waiting = iter(batches)
    total = sum(len(writer.sources(shard)) for shard in shards)
    with tqdm(total=total, unit="image", disable=not show_progress) as bar:
        for shard in shards:
            missing = len(writer.sources(shard))
            features = [np.empty((0, *settings.item_shape), settings.dtype)]
            skipped: list[SkippedImage] = []
            states: list[FileState] = []
            while missing > 0:
                batch = next(waiting)
                if batch.indices:
                    features.append(encode_images(autoencoder, batch.images, batch.indices, settings))
                skipped += batch.skipped
                states += batch.states
                missing -= len(batch.states)
                bar.update(len(batch.states))
            writer.write(shard, np.concatenate(features), skipped, states)


def report(writer: FeatureWriter, max_bad: int) -> None:
    """Print what a complete store holds; exit status 1 if too many images were unreadable."""
    manifest = read_json(writer.manifest_path)
    unreadable = manifest["unreadable"]
    print(f"{writer.folder}: {manifest['count']:,} images, {len(unreadable)} unreadable")
    for _, path, reason in unreadable:
        print(f"unreadable: {ascii(path)} {ascii(reason)[1:-1]}", file=sys.stderr)
    if not manifest["count"]:
        sys.exit(
            f"error: --data-path: none of the {len(unreadable):,} images can be read; the store is empty"
        )
    if len(unreadable) > max_bad:
        sys.exit(f"more than --max-bad {max_bad} images were unreadable; the store is complete without them")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    processes = group.start_processes()
    is_first = processes.rank == 0
    batch_size = max(1, args.global_batch_size // OFFICIAL_PROCESSES)

    unused = unused_options(args)
    if unused:
        group.print_once(f"{', '.join(unused)}: extraction does not use this; it has no effect")

    # What to store
    images = ImageFolder(args.data_path, args.image_size)
    autoencoder = Autoencoder.load(args.vae, processes.device)
    shard_size = args.shard_size or stored_shard_size(args.features_path)
    options = StoreOptions(args.store, not args.no_flip, args.dtype, shard_size, args.global_seed)
    settings = StoreSettings.plan(options, images, autoencoder)
    writer = FeatureWriter(args.features_path, settings, images.listing)
    for note in images.notes:
        group.print_once(note)
    group.print_once(f"classes: {class_table(images.class_names)}")
    group.print_once(f"{args.data_path} to {args.features_path}: {settings}")
    group.print_once(f"{processes.world} processes, each encodes {batch_size} images at once with {args.vae}")
    if args.dry_run:
        writer.check()
        if is_first:
            report_changes(writer)
        return

    # Encode this process's share of the missing shards; the first process completes the store
    watch = ProcessWatch(processes.rank, processes.world)
    with FolderLock(args.features_path, "--features-path") as lock:
        shards = prepare(writer, lock, processes)
        if shards is None:
            group.print_once(f"{args.features_path}: already complete, nothing to do")
        else:
            sources = [writer.sources(shard) for shard in shards]
            pin_memory = processes.device.type == "cuda"
            batches = read_shards(images, sources, batch_size, args.num_workers, pin_memory)
            extract(writer, shards, autoencoder, batches, is_first)
            if is_first:
                writer.finish()
        watch.close()
    if is_first:
        report(writer, args.max_bad)


if __name__ == "__main__":
    cli.run(main)
