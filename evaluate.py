"""FID, sFID, KID, Inception Score, precision and recall.

    python evaluate.py samples/B-N4.npz VIRTUAL_imagenet256_labeled.npz
    python evaluate.py --make-reference IMAGES OUT.npz --image-size 256

Under torchrun the processes share the work.
"""

import argparse
import json
from pathlib import Path

import cli
from config import UserError
from data.files import write_json
from evaluation import comparison
from evaluation.extractors import load_extractor, precise_name
from evaluation.feature_cache import extract
from evaluation.image_sets import FolderImages, open_source
from evaluation.reference import is_reference_of, write_reference
from processes import group


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("samples", nargs="?", metavar="SAMPLES", help="ADM .npz, OUT.npz or folder of images")
    add("reference", nargs="?", metavar="REFERENCE", help="the same")
    add("--make-reference", nargs=2, metavar=("IMAGES", "OUT.npz"), help="write a data set's reference batch")
    cli.add_image_size_argument(parser, "ADM's crop in pixels, with --make-reference")
    add("--features", default="inception", help="or a TorchScript file or timm folder (default: %(default)s)")
    add("--inception-weights", metavar="FILE", help="torch-fidelity's weights (default: download them)")
    cli.add_measuring_tf32_argument(parser)
    add("--cache", type=Path, default=Path.home() / ".cache/dc-dit", help="folder for features (%(default)s)")
    add("--output", type=Path, help="JSON file for the metrics (default: beside SAMPLES)")
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    cli.check_output("--cache", args.cache)
    if args.make_reference:
        output = args.make_reference[1]
        if args.samples or args.output:
            raise UserError("--make-reference: takes IMAGES and OUT.npz alone; leave the other paths out")
        if args.image_size is None:
            raise UserError("--image-size: --make-reference needs pixels, e.g. 256")
        args.image_size = cli.image_size(args)
        if Path(output).suffix != ".npz":
            raise UserError(f"--make-reference '{output}': the output must end in .npz")
    elif args.reference is None:
        raise UserError("SAMPLES and REFERENCE are needed; see --help")
    elif args.image_size:
        raise UserError("--image-size: belongs to --make-reference; comparisons take images as they are")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    make_reference(args) if args.make_reference else evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    """Compare, print and save."""
    # Check both sides before any work
    sources = [open_source(args.samples, "SAMPLES"), open_source(args.reference, "REFERENCE")]
    cli.check_output_file("--output", args.output or default_output(args.samples))
    comparison.check_sizes(sources[0].size, sources[1].size)
    processes = group.start_processes()
    for source in sources:
        for note in source.notes:
            group.print_once(note)
    extractor = load_extractor(args.features, args.inception_weights, processes.device, args.tf32)
    for source in sources:
        comparison.check_source(source, extractor)
    question = {"samples": args.samples, "reference": args.reference, "features": precise_name(extractor)}
    if args.output and args.output.exists() and not answers(args.output, question):
        raise UserError(
            f"--output '{args.output}': holds something else than this comparison; give another file"
        )

    # Compare
    samples = comparison.measure_source(sources[0], extractor, args.cache, processes)
    reference = comparison.measure_source(sources[1], extractor, args.cache, processes)
    if processes.rank > 0:
        return
    values = comparison.compare(samples, reference, extractor)

    # Write
    counts = {"num_samples": samples.count, "num_reference": reference.count}
    output = args.output or free_output(default_output(args.samples), question)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {**values, **counts, **question})

    # Print
    notes = [comparison.compression_warning(*sources), comparison.class_note(samples, extractor)]
    for side in (samples, reference):
        notes.append(comparison.rank_warning(side.name, side.count, side.width))
    for warning in notes:
        if warning:
            print(warning)
    for name, value in values.items():
        # KID of good samples is some 0.001
        digits = 6 if name.startswith("kid") else 4
        print(f"{comparison.METRIC_NAMES[name]:<18}{value:12.{digits}f}")
    known = reference.count or "an unknown number of"
    print(f"{samples.count} samples, reference of {known} images; {output}")


def default_output(samples: str) -> Path:
    """The file beside the samples."""
    path = Path(samples).resolve()
    return path.with_name(path.name.removesuffix(".npz") + ".evaluation.json")


def free_output(path: Path, question: dict[str, str]) -> Path:
    """The path, or one with a number, so that no result of another reference or other features is lost.

    Args:
        path: ends in ".json". question: what the result is of; the same again is replaced.
    """
    candidate = path
    number = 2
    while candidate.exists() and not answers(candidate, question):
        candidate = path.with_name(f"{path.stem}-{number}.json")
        number += 1
    return candidate


def answers(path: Path, question: dict[str, str]) -> bool:
    """Whether a file holds an earlier result of the same comparison."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return all(result[key] == value for key, value in question.items())
    except (OSError, ValueError, LookupError, TypeError):
        return False


def make_reference(args: argparse.Namespace) -> None:
    """Write the images and the statistics of a data set into one file."""
    folder, output = (Path(path) for path in args.make_reference)
    cli.check_output_file("--make-reference", output)
    images = FolderImages(folder, args.image_size)
    processes = group.start_processes()
    for note in images.notes:
        group.print_once(note)
    extractor = load_extractor(args.features, args.inception_weights, processes.device, args.tf32)
    if output.exists() and not is_reference_of(output, images, extractor):
        raise UserError(
            f"--make-reference '{output}': exists and is no reference of these images and features; "
            "give another file, or remove it"
        )
    chunks = extract(images, extractor, args.cache, processes)
    if processes.rank == 0:
        output.parent.mkdir(parents=True, exist_ok=True)
        kept = write_reference(output, images, chunks, extractor)
        print(f"statistics of {len(images)} images and {kept} of the images in {output}")


if __name__ == "__main__":
    cli.run(main)
