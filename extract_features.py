"""A folder of images to a feature store: encode every image once with a pretrained autoencoder.

    torchrun --nnodes=1 --nproc_per_node=N extract_features.py --data-path DIR --features-path OUT

Running the same command again, with any number of processes, continues where it stopped or finishes at once. The store does
not depend on the number of processes: each image is stored once, shards and the batches in which images are encoded (an
eighth of --global-batch-size) are always cut alike, and noise and flips are functions of (--global-seed, image). Bitwise, that
is, on one kind of device; on CPUs with one number of threads per process (torchrun sets OMP_NUM_THREADS=1, python does not).

Exit status: 0; 1 where more than --max-bad images were unreadable (the store is complete without them) or writing failed;
2 where the command itself is wrong.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import cli
from config import UserError
from data.autoencoder import Autoencoder
from data.feature_writer import KINDS, FeatureWriter, encode_images, make_settings
from data.features import item_shape, read_json
from data.images import ImageFolder, UnreadableImage
from processes import group
from processes.lock import FolderLock
from processes.watch import ProcessWatch

LAUNCH = 8  # processes of the official launch: an eighth of the global batch is encoded at once, on any number of processes


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--data-path", required=True, help="folder with one sub-folder of images per class")
    parser.add_argument(
        "--features-path", default="features", help="folder of the store (default: %(default)s)"
    )
    parser.add_argument(
        "--image-size", type=int, default=256, help="side of the centre crop in pixels (default: %(default)s)"
    )
    parser.add_argument(
        "--vae", default="ema", help="ema or mse (stabilityai/sd-vae-ft-*) or a local diffusers folder"
    )
    batch_help = "an eighth of it is encoded at once, on any number of processes (default: %(default)s)"
    parser.add_argument("--global-batch-size", type=int, default=256, help=batch_help)
    parser.add_argument(
        "--num-workers",
        type=int,
        default=4,
        help="image-reading processes per process (default: %(default)s)",
    )
    parser.add_argument(
        "--global-seed", type=int, default=0, help="of noise and flips with --store sample or official"
    )
    store_help = "moments: mean and std, latents drawn in training; sample: one frozen latent; official: a file per image"
    parser.add_argument("--store", choices=KINDS, default="moments", help=store_help)
    parser.add_argument("--no-flip", action="store_true", help="leave out mirror images")
    parser.add_argument("--dtype", choices=("float16", "float32"), help="default: float16; official: float32")
    parser.add_argument(
        "--shard-size", type=int, help="images per shard (default: 1024, more above 262,144 images)"
    )
    parser.add_argument(
        "--max-bad", type=int, default=0, help="unreadable images beyond which the exit status is 1"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print what would be done, and stop"
    )
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """UserError for numbers that make no sense; fills in the default of --dtype."""
    low = {
        "image_size": 1,
        "global_batch_size": 1,
        "num_workers": 0,
        "global_seed": 0,
        "max_bad": 0,
        "shard_size": 1,
    }
    for name, least in low.items():
        value = getattr(args, name)
        if value is not None and not least <= value < 2**31:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least} and below 2**31")
    args.dtype = args.dtype or ("float32" if args.store == "official" else "float16")
    if args.store == "official" and args.dtype != "float32":
        raise UserError(
            f"--dtype {args.dtype}: the official layout is float32; leave --dtype out or choose another --store"
        )


class ImageBatch(NamedTuple):
    indices: list[int]  # source indices of the readable images
    images: Tensor  # (len(indices), 3, H, W) uint8
    unreadable: list[list]  # [source index, path, reason]


class Readable(torch.utils.data.Dataset):
    """The images of a folder, with the reason in place of an unreadable one."""

    def __init__(self, images: ImageFolder):
        self.images = images

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | None, str]:
        try:
            return index, self.images[index][0], ""
        except UnreadableImage as error:
            return index, None, error.reason

    def collate(self, items: list[tuple[int, np.ndarray | None, str]]) -> ImageBatch:
        good = [(index, image) for index, image, _ in items if image is not None]
        unreadable = [
            [index, self.images.paths[index], reason] for index, image, reason in items if image is None
        ]
        size = self.images.image_size
        pixels = np.stack([image for _, image in good]) if good else np.empty((0, size, size, 3), np.uint8)
        return ImageBatch(
            [index for index, _ in good], torch.from_numpy(pixels).permute(0, 3, 1, 2), unreadable
        )


def plan(writer: FeatureWriter, lock: FolderLock, processes: group.Processes) -> list[int] | None:
    """Shards that this process has to write; None where the store is complete. Every process raises the same UserError."""
    found = [writer.settings["source_hash"]] * processes.world
    if processes.world > 1:
        dist.all_gather_object(found, found[0])
    if len(set(found)) > 1:
        raise UserError(
            "--data-path: the processes see different files; use a folder that all machines share and nobody changes"
        )

    def prepare() -> list[int] | None:
        try:
            writer.check()  # before the lock, which makes the folder
            lock.acquire()
            return writer.prepare()
        except OSError as error:
            where = f"--features-path {writer.folder}"
            raise UserError(f"{where}: cannot be written ({error.strerror}); choose another folder") from None

    missing = group.on_first(prepare)
    return None if missing is None else missing[processes.rank :: processes.world]


def read_shards(
    images: ImageFolder, shards: Iterable[range], batch_size: int, num_workers: int, pin: bool
) -> Iterable[ImageBatch]:
    """Batches of images, cut inside each shard for itself so that they do not depend on who reads which shard."""
    batches = [
        list(shard[start : start + batch_size])
        for shard in shards
        for start in range(0, len(shard), batch_size)
    ]
    dataset = Readable(images)
    workers = max(0, min(num_workers, os.cpu_count() or 1, len(batches) - 1))
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=dataset.collate, pin_memory=pin
    )


def extract(
    writer: FeatureWriter,
    shards: list[int],
    autoencoder: Autoencoder,
    batches: Iterable[ImageBatch],
    bar: tqdm,
) -> None:
    """Encode the batches, which are those of `shards` in order, and write the shards."""
    batches = iter(batches)
    for shard in shards:
        sources = writer.sources(shard)
        features = np.empty((len(sources), *item_shape(writer.settings)), writer.settings["dtype"])
        count, unreadable = 0, []
        while count + len(unreadable) < len(sources):
            batch = next(batches)
            if batch.indices:
                encoded = encode_images(autoencoder, batch.images, batch.indices, writer.settings)
                features[count : count + len(encoded)] = encoded
                count += len(encoded)
            unreadable += batch.unreadable
            bar.update(len(batch.indices) + len(batch.unreadable))
        writer.write(shard, features[:count], unreadable)


def describe_plan(settings: dict, args: argparse.Namespace, world: int) -> str:
    shape, count = item_shape(settings), settings["source_count"]
    gigabytes = count * int(np.prod(shape)) * np.dtype(settings["dtype"]).itemsize / 1e9
    return (
        f"{count:,} images of {len(settings['class_names'])} classes in {args.data_path}\n"
        f"{settings['kind']} store {args.features_path}: {count:,} x {shape} {settings['dtype']}, {gigabytes:.2f} GB, "
        f"shards of {settings['shard_size']} images\n"
        f"number of processes {world}, each encoding {encode_size(args)} images at once with {settings['autoencoder']['name']}"
    )


def encode_size(args: argparse.Namespace) -> int:
    return max(1, args.global_batch_size // LAUNCH)


def report(manifest: dict, args: argparse.Namespace) -> None:
    """Say what is in a complete store; exit status 1 where too many images were unreadable."""
    print(f"{args.features_path}: {manifest['count']:,} images, {len(manifest['unreadable'])} unreadable")
    for _, path, reason in manifest["unreadable"]:
        print(f"unreadable: {ascii(path)} {ascii(reason)[1:-1]}", file=sys.stderr)
    if len(manifest["unreadable"]) > args.max_bad:
        sys.exit(
            f"more than --max-bad {args.max_bad} images were unreadable; the store is complete without them"
        )


def run_extraction(
    args,
    images: ImageFolder,
    autoencoder: Autoencoder,
    writer: FeatureWriter,
    lock: FolderLock,
    processes: group.Processes,
) -> None:
    """Write this process's share of the missing shards; the first process then completes the store."""
    shards = plan(writer, lock, processes)
    if shards is None:
        if processes.rank == 0:
            print(f"{args.features_path}: already complete, nothing to do")
        return
    sources = [writer.sources(shard) for shard in shards]
    batches = read_shards(
        images, sources, encode_size(args), args.num_workers, pin=processes.device.type == "cuda"
    )
    caption = f"process 1 of {processes.world}" if processes.world > 1 else ""
    try:
        with tqdm(
            total=sum(map(len, sources)), unit="image", desc=caption, disable=processes.rank > 0
        ) as bar:
            extract(writer, shards, autoencoder, batches, bar)
        if processes.rank == 0:
            while (
                processes.world > 1 and writer.missing()
            ):  # not a barrier: that would time out on slow processes
                time.sleep(0.5)
            writer.finish()
    except OSError as error:
        sys.exit(
            f"error: writing to {args.features_path} failed ({error}); finished shards are kept: run the same command again"
        )


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    processes = group.start_processes()
    check_arguments(args)
    images = ImageFolder(args.data_path, args.image_size)
    autoencoder = Autoencoder.load(args.vae, processes.device)
    choices = {
        "flip": not args.no_flip,
        "dtype": args.dtype,
        "shard_size": args.shard_size,
        "seed": args.global_seed,
    }
    writer = FeatureWriter(
        args.features_path, make_settings(args.store, images, autoencoder, **choices), images.labels
    )
    if processes.rank == 0:
        print(describe_plan(writer.settings, args, processes.world))
    if args.dry_run:
        writer.check()
        return
    watch = ProcessWatch(processes.rank, processes.world)
    with FolderLock(args.features_path, "--features-path") as lock:
        run_extraction(args, images, autoencoder, writer, lock, processes)
        watch.close()
    if processes.rank == 0:
        report(read_json(writer.manifest_path), args)


if __name__ == "__main__":
    cli.run(main)
