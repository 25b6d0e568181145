"""FID, sFID, Inception Score, precision and recall, without TensorFlow.

    python evaluate.py samples/B-N4.npz VIRTUAL_imagenet256_labeled.npz
    python evaluate.py --make-reference IMAGES OUT.npz --image-size 256

The first compares samples with a reference; each is an ADM .npz, a folder of images or a file that the second wrote. Under
torchrun the processes share the work.
"""

import argparse
import json
from pathlib import Path

import cli
from config import UserError
from data.files import write_file
from evaluation.extractors import load_extractor
from evaluation.image_sets import FolderImages, open_source
from evaluation.measure import check_sizes, check_source, compare, extract, measure_source, rank_warning
from evaluation.reference import write_reference
from processes import group

LABELS = {
    "fid": "FID",
    "sfid": "sFID",
    "frechet_distance": "Fréchet distance",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "class_accuracy": "class accuracy",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("samples", nargs="?", metavar="SAMPLES", help=".npz or folder of images")
    parser.add_argument("reference", nargs="?", metavar="REFERENCE", help=".npz or folder of images")
    parser.add_argument(
        "--make-reference", nargs=2, metavar=("IMAGES", "OUT.npz"), help="write a data set's reference batch"
    )
    parser.add_argument(
        "--image-size", type=int, help="pixels, with --make-reference: ADM's crop, as in training"
    )
    parser.add_argument(
        "--features",
        default="inception",
        help="or a TorchScript file, or a timm folder (default: %(default)s)",
    )
    parser.add_argument(
        "--inception-weights", metavar="FILE", help="torch-fidelity's weights (default: download them)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path.home() / ".cache" / "dc-dit",
        help="folder for features, by content",
    )
    parser.add_argument("--output", type=Path, help="JSON file for the numbers (default: beside SAMPLES)")
    args = parser.parse_args(argv)
    if args.make_reference:
        if args.samples or args.output:
            raise UserError(
                "--make-reference: takes IMAGES and OUT.npz alone; leave SAMPLES, REFERENCE and --output out"
            )
        if not args.image_size or args.image_size < 1:
            raise UserError(
                f"--image-size {args.image_size}: --make-reference needs the size in pixels, e.g. 256"
            )
        if Path(args.make_reference[1]).suffix != ".npz":
            raise UserError(f"--make-reference '{args.make_reference[1]}': the output must end in .npz")
    elif args.reference is None:
        raise UserError("SAMPLES and REFERENCE are needed; see --help")
    elif args.image_size:
        raise UserError("--image-size: goes with --make-reference; comparisons take images as they are")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.make_reference:
        make_reference(args, Path(args.make_reference[0]), Path(args.make_reference[1]))
    else:
        evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    """Compare, print and save."""
    sources = [open_source(args.samples), open_source(args.reference)]
    output = args.output or beside(Path(args.samples))
    cli.check_output_file("--output", output)
    cli.check_output("--cache", args.cache)
    check_sizes(sources[0].size, sources[1].size)
    processes = group.start_processes()
    extractor = load_extractor(args.features, args.inception_weights, processes.device)
    for source in sources:
        check_source(source, extractor)
    samples, reference = (
        measure_source(s, extractor, args.cache, processes.rank, processes.world) for s in sources
    )
    if processes.rank > 0:
        return
    for side in (samples, reference):
        if warning := rank_warning(side.name, side.count, side.width):
            print(warning)
    found = compare(samples, reference, extractor)
    note = {"samples": str(args.samples), "reference": str(args.reference), "features": extractor.name}
    counts = {"num_samples": samples.count, "num_reference": reference.count}
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(
        output, lambda stream: stream.write(json.dumps({**found, **counts, **note}, indent=1).encode())
    )
    print("\n".join(f"{LABELS[name]:<18}{value:12.4f}" for name, value in found.items()))
    print(
        f"{counts['num_samples']} samples, reference of {counts['num_reference'] or 'an unknown number of'} images; {output}"
    )


def beside(samples: Path) -> Path:
    """samples/B-N4 and samples/B-N4.npz -> samples/B-N4.evaluation.json."""
    samples = samples.resolve()
    return samples.with_name(
        (samples.stem if samples.suffix == ".npz" else samples.name) + ".evaluation.json"
    )


def make_reference(args: argparse.Namespace, folder: Path, output: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"--make-reference '{folder}': is not a folder of images")
    cli.check_output_file("--make-reference", output)
    cli.check_output("--cache", args.cache)
    images = FolderImages(folder, args.image_size)
    processes = group.start_processes()
    extractor = load_extractor(args.features, args.inception_weights, processes.device)
    chunks = extract(images, extractor, args.cache, processes.rank, processes.world)
    if processes.rank == 0:
        output.parent.mkdir(parents=True, exist_ok=True)
        kept = write_reference(output, images, chunks, extractor)
        print(f"statistics of {len(images)} images and {kept} of the images in {output}")


if __name__ == "__main__":
    cli.run(main)
