"""Convert foreign weights, and this repository's own between `.pt` and `.safetensors`. Executes nothing.

    python -m weights.convert DiT-XL-2-256x256.pt DiT-XL-2.safetensors       official DiT
    python -m weights.convert DiT-XL-2-256/ DiT-XL-2.safetensors             diffusers DiTTransformer2DModel
    python -m weights.convert official/0400000.pt DC-DiT.safetensors         official DC-DiT
    python -m weights.convert results/B-N4/checkpoints/0400000.pt B-N4.safetensors
    python -m weights.convert B-N4.safetensors B-N4.pt                       and back

The samplers (`--ckpt`) and `training.init_from` read the result.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import cli
from config import Config, UserError, config_from_dict, load_config, one_line, printable, to_dict
from data.files import write_file
from grid import Grid
from weights.checkpoint import (
    FORMAT,
    WEIGHTS,
    Checkpoint,
    chosen_weights,
    find_damage,
    has_metadata,
    is_checkpoint_name,
    load_checkpoint,
    network_shapes,
    plain_data,
    save_weights,
    shape_difference,
    tensor_shapes,
)
from weights.foreign import DIFFUSERS_DIVISOR, dit_config, from_diffusers, from_official
from weights.untrusted import Refused, is_archive, read_untrusted
from weights.unwrap import (
    DIFFUSERS_KIND,
    Foreign,
    find_weights,
    precision_problem,
    read_foreign,
    read_shards,
    strip_wrappers,
)

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
DIFFUSERS_INDEX = "diffusion_pytorch_model*.index.json"
DIFFUSERS_VARIANTS = ("diffusion_pytorch_model.*.safetensors", "diffusion_pytorch_model*.bin")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("source", type=Path, help="checkpoint, weights file, or diffusers folder")
    parser.add_argument("output", type=Path, help="*.safetensors, or *.pt")
    parser.add_argument(
        "--weights",
        help="which weights of a checkpoint to convert: ema, model, or a name of training.averages "
        "(default: ema, where there is one)",
    )
    parser.add_argument("--config", help="configuration, if the source has none")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="change a key of the configuration; repeatable",
    )
    args = parser.parse_args(argv)
    if args.output.suffix not in (".safetensors", ".pt"):
        raise UserError(f"output '{args.output}': must end in .safetensors or .pt")
    if not args.source.exists():
        raise UserError(
            f"source '{args.source}' does not exist; give a checkpoint, a weights file or a diffusers folder"
        )
    cli.check_output("output", args.output.parent)
    check_replaces_nothing(args.source, args.output)
    return args


def check_replaces_nothing(source: Path, output: Path) -> None:
    """Raise a UserError if the output would replace the source, a checkpoint of a run, or a foreign file."""
    problem = ""
    if output.is_dir():
        problem = "is a folder"
    elif output.exists():
        sources = [file for file in (source, source / WEIGHTS) if file.exists()]
        if any(output.samefile(file) for file in sources):
            problem = "is the source"
        elif not is_converted(output):
            problem = "exists, and was not written by weights.convert"
    elif output.parent.name == "checkpoints" and is_checkpoint_name(output):
        problem = "has the name of a run's checkpoint"
    if problem:
        raise UserError(f"output '{output}' {problem}; give another name")


def is_converted(path: Path) -> bool:
    """Whether this is a weights file of this repository, or a checkpoint without an optimizer."""
    if path.suffix == ".safetensors":
        return has_metadata(path)
    try:
        return "optimizer" not in load_checkpoint(path)
    except UserError:
        return False


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    kind, state = read_source(args)
    check_shapes(state, args.source)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.output.suffix == ".safetensors":
        save_weights(args.output, state)
    else:
        save_pt(args.output, state)
    name = state["config"]["model"]["name"]
    parameters = sum(tensor.numel() for tensor in state["ema"].values())
    print(f"{args.output}: {name}, {parameters:,} numbers, from {kind} {args.source}")


def save_pt(path: Path, state: Checkpoint) -> None:
    """Write a checkpoint without an optimizer, with the EMA weights as "model" too."""
    content = {"format": FORMAT, **plain_data(state), "model": state["ema"], "ema": state["ema"]}
    write_file(path, lambda stream: torch.save(content, stream))


# ---------------------------------------------------------------------------------------------------- sources


def read_source(args: argparse.Namespace) -> tuple[str, Checkpoint]:
    """What the source is, and a checkpoint with the chosen weights as "ema"."""
    source = args.source
    if is_own(source):
        state = load_checkpoint(source, "source")
        choose_own_weights(state, args)
        return "weights of this repository", with_config(state, args)
    if source.is_dir():
        return DIFFUSERS_KIND, read_diffusers(args, source)

    # A file of another trainer
    foreign = read_foreign_file(source)
    if foreign.kind is None:
        raise UserError(f"source '{source}' holds other weights than those of DiT and DC-DiT")
    if foreign.kind == DIFFUSERS_KIND:
        return DIFFUSERS_KIND, read_diffusers(args, source.parent)
    weights = choose_weights(foreign, args)
    problem = precision_problem(weights)
    if problem:
        raise UserError(f"source '{source}': {printable(problem)}")
    return foreign.kind, read_renamed(from_official(weights), foreign, args)


def is_own(source: Path) -> bool:
    """Whether a file or folder was written by this repository."""
    if source.is_dir():
        return (source / WEIGHTS).is_file()
    if source.suffix == ".safetensors":
        return has_metadata(source)
    if not is_archive(source):
        return False
    # Only plain data and tensors are read, and tensors stay on the disk
    content = read_torch_file(source)
    return isinstance(content, dict) and "format" in content


def read_torch_file(source: Path) -> object:
    """The content of a torch.save file of unknown origin, or a UserError."""
    problem = find_damage(source) if is_archive(source) else None
    if problem:
        raise UserError(f"source '{source}' is damaged ({problem}); give another copy")
    try:
        return read_untrusted(source)
    except (Refused, OSError) as error:
        raise UserError(f"source '{source}' is not a checkpoint that can be read safely: {error}") from None


def read_foreign_file(source: Path) -> Foreign:
    """The networks in a file of unknown origin, or a UserError."""
    try:
        if source.suffix == ".safetensors":
            return read_foreign(source)
        return find_weights(read_torch_file(source))
    except (Refused, OSError) as error:
        raise UserError(f"source '{source}' cannot be read ({error}); give another") from None


def choose_own_weights(state: Checkpoint, args: argparse.Namespace) -> None:
    """Make the weights that --weights names the "ema" of a checkpoint."""
    which = args.weights or "ema"
    state["ema"] = chosen_weights(state, which, f"source '{args.source}'")
    if which != "ema":
        state["weights"] = which


def choose_weights(foreign: Foreign, args: argparse.Namespace) -> dict[str, Tensor]:
    """The EMA, or what --weights names; without --weights the trained weights where there is no EMA."""
    weights = {"ema": foreign.ema, "model": foreign.model}
    names = [args.weights] if args.weights else ["ema", "model"]
    for name in names:
        found = weights.get(name)
        if found is not None:
            return found
    raise UserError(f"source '{args.source}' has no weights '{args.weights}'; try the other --weights")


def read_renamed(weights: dict[str, Tensor], foreign: Foreign, args: argparse.Namespace) -> Checkpoint:
    """A checkpoint of weights that have our names, with the configuration that they or their file tell."""
    if "DC-DiT" not in str(foreign.kind):
        return make_checkpoint(weights, dit_config_of(weights, args))
    if foreign.config is None and not args.config:
        raise UserError(
            f"source '{args.source}': this DC-DiT comes without its configuration; give it as --config"
        )
    return make_checkpoint(weights, configure(args, foreign.config))


def read_diffusers(args: argparse.Namespace, folder: Path) -> Checkpoint:
    """Read the folder of a DiTTransformer2DModel, or of a DiTPipeline, which has one in transformer/."""
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = strip_wrappers(read_shards(diffusers_files(folder)))
    except (OSError, ValueError) as error:
        raise UserError(
            f"source '{folder}' is no diffusers folder with config.json and {DIFFUSERS_WEIGHTS} "
            f"({one_line(error)})"
        ) from None
    problem = precision_problem(weights)
    if problem:
        raise UserError(f"source '{folder}': {printable(problem)}")
    try:
        patches = Grid.of(about["sample_size"]).coarsen(about["patch_size"])
        heads = about["num_attention_heads"]
        converted = from_diffusers(weights, patches)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"source '{folder}' is no DiTTransformer2DModel that can be converted ({one_line(error)})"
        ) from None
    return make_checkpoint(converted, dit_config_of(converted, args, heads, DIFFUSERS_DIVISOR))


def diffusers_files(folder: Path) -> list[Path]:
    """The weights in a diffusers folder: one file, several with an index, a variant in half precision, or a pickle.

    Raises:
        ValueError: the index is damaged.
        OSError: the index cannot be read.
    """
    if (folder / DIFFUSERS_WEIGHTS).exists():
        return [folder / DIFFUSERS_WEIGHTS]
    for index in sorted(folder.glob(DIFFUSERS_INDEX)):
        return indexed_files(index)
    for name in DIFFUSERS_VARIANTS:
        files = sorted(folder.glob(name))
        if files:
            return files[:1]
    return [folder / DIFFUSERS_WEIGHTS]


def indexed_files(index: Path) -> list[Path]:
    """The files that an index of diffusers names, which lie beside it."""
    content = json.loads(index.read_text(encoding="utf-8"))
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        raise ValueError(f"{index.name} has no weight_map")
    names = sorted({str(name) for name in files.values()})
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{index.name} names a file that is not in its folder")
    return [index.parent / name for name in names]


# --------------------------------------------------------------------------------------------- configurations


def dit_config_of(
    weights: dict[str, Tensor], args: argparse.Namespace, heads: int | None = None, divisor: int | None = None
) -> Config:
    """The configuration of a DiT: from --config, otherwise from the shapes of its tensors.

    Args:
        heads: attention heads; None: as in the published size with this width.
        divisor: `model.timestep_divisor`; None: as in the published DiT.
    """
    if args.config:
        return configure(args, None)
    try:
        config = dit_config(weights, heads)
    except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"source '{args.source}': {error}; give its configuration as --config") from None
    if divisor is not None:
        config["model"]["timestep_divisor"] = divisor
    return configure(args, config)


def configure(args: argparse.Namespace, found: dict | None) -> Config:
    """The configuration from --config, otherwise the one `found` in the source; --set applies to either."""
    if args.config or found is None:
        return load_config(args.config, args.set)
    try:
        return config_from_dict(found, args.set)
    except UserError as error:
        raise UserError(f"{error}; change the source's configuration with --set or --config") from None


def with_config(state: Checkpoint, args: argparse.Namespace) -> Checkpoint:
    """A checkpoint of this repository with --config and --set applied."""
    state["config"] = to_dict(configure(args, state["config"]))
    return state


def make_checkpoint(weights: dict[str, Tensor], config: Config) -> Checkpoint:
    """A checkpoint of foreign weights."""
    return {
        "step": 0,
        "config": to_dict(config),
        "autoencoder": None,
        "features": None,
        "class_names": None,
        "weights": None,
        "ema": weights,
    }


def check_shapes(state: Checkpoint, source: Path) -> None:
    """Raise a UserError if the weights have other names or shapes than the configured network."""
    expected = network_shapes(config_from_dict(state["config"]))
    difference = shape_difference(expected, tensor_shapes(state["ema"]))
    if difference:
        raise UserError(
            f"source '{source}' does not fit the configuration: {difference}; give the right one as --config "
            "or --set"
        )


if __name__ == "__main__":
    cli.run(main)
