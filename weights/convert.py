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
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import cli
from config import Config, UserError, config_from_dict, load_config, to_dict
from data.files import write_file
from weights.checkpoint import (
    FORMAT,
    WEIGHTS,
    Checkpoint,
    find_damage,
    is_state_dict,
    load_checkpoint,
    network_shapes,
    plain_data,
    save_weights,
    tensor_shapes,
)
from weights.foreign import DIFFUSERS_DIVISOR, dit_config, from_diffusers, from_official
from weights.untrusted import Refused, read_untrusted

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("source", type=Path, help="checkpoint, weights file, or diffusers folder")
    parser.add_argument("output", type=Path, help="*.safetensors, or *.pt")
    parser.add_argument(
        "--weights",
        choices=("ema", "model"),
        default="ema",
        help="which weights of a checkpoint to convert (default: %(default)s)",
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
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    kind, state = read_source(args)
    check_shapes(state, args.source)
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
    is_weights_folder = (source / WEIGHTS).is_file()
    if source.is_dir() and not is_weights_folder:
        return "diffusers' DiT", read_diffusers(args)
    if is_weights_folder or source.suffix == ".safetensors":
        state = load_checkpoint(source, "source")
        return "weights of this repository", with_config(state, args)

    # A torch.save file: of this repository if it names a format, otherwise an official one
    content = read_torch_file(source)
    if "format" in content:
        state = load_checkpoint(source, "source")
        state["ema"] = choose_weights(state, args)
        return "checkpoint of this repository", with_config(state, args)
    return read_official(choose_weights(content, args), content.get("config"), args)


def read_torch_file(source: Path) -> dict:
    """Read a dictionary from a torch.save file of unknown origin, or raise a UserError."""
    problem = find_damage(source) if zipfile.is_zipfile(source) else None
    if problem:
        raise UserError(f"source '{source}' is damaged ({problem}); give another copy")
    try:
        content = read_untrusted(source)
    except (Refused, OSError) as error:
        raise UserError(f"source '{source}' is not a checkpoint that can be read safely: {error}") from None
    if not isinstance(content, dict):
        raise UserError(
            f"source '{source}' holds no weights; give a checkpoint of DiT, DC-DiT or this repository"
        )
    return content


def choose_weights(content: Any, args: argparse.Namespace) -> dict[str, Tensor]:
    """The state dict "ema" or "model", as --weights says. A file may also be a state dict itself."""
    weights = content if is_state_dict(content) else content.get(args.weights)
    if not is_state_dict(weights):
        raise UserError(f"source '{args.source}' has no state dict '{args.weights}'; try the other --weights")
    return weights


def read_official(
    weights: dict[str, Tensor], config: dict | None, args: argparse.Namespace
) -> tuple[str, Checkpoint]:
    """Rename an official state dict, of a DC-DiT (with the configuration from the same file) or of a DiT."""
    if "x_embedder.proj.weight" not in weights or "pos_embed" not in weights:
        raise UserError(f"source '{args.source}' holds other weights than those of DiT and DC-DiT")
    converted = from_official(weights)
    if not any(name.startswith("hnet.") for name in weights):
        return "official DiT", make_checkpoint(converted, dit_config_of(converted, args))
    if config is None and not args.config:
        raise UserError(
            f"source '{args.source}': this DC-DiT comes without its configuration; give it as --config"
        )
    return "official DC-DiT", make_checkpoint(converted, configure(args, config))


def read_diffusers(args: argparse.Namespace) -> Checkpoint:
    """Read the folder of a DiTTransformer2DModel, or of a DiTPipeline, which has one in transformer/."""
    folder = args.source
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = safetensors.torch.load_file(folder / DIFFUSERS_WEIGHTS)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(
            f"source '{folder}' is no diffusers folder with config.json and {DIFFUSERS_WEIGHTS} ({error})"
        ) from None
    try:
        tokens = (about["sample_size"] // about["patch_size"]) ** 2
        converted = from_diffusers(weights, tokens)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"source '{folder}' is no DiTTransformer2DModel that can be converted: {error}"
        ) from None
    config = dit_config_of(converted, args, about["num_attention_heads"], DIFFUSERS_DIVISOR)
    return make_checkpoint(converted, config)


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
    except (KeyError, ValueError) as error:
        raise UserError(f"source '{args.source}': {error}; give its configuration as --config") from None
    if divisor is not None:
        config["model"]["timestep_divisor"] = divisor
    return configure(args, config)


def configure(args: argparse.Namespace, found: dict | None) -> Config:
    """The configuration from --config, otherwise the one `found` in the source; --set applies to either."""
    if args.config or found is None:
        return load_config(args.config, args.set)
    return config_from_dict(found, args.set)


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
        "ema": weights,
    }


def check_shapes(state: Checkpoint, source: Path) -> None:
    """Raise a UserError if the weights have other names or shapes than the configured network."""
    expected = network_shapes(config_from_dict(state["config"]))
    found = tensor_shapes(state["ema"])
    wrong = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if wrong:
        first = wrong[0]
        raise UserError(
            f"source '{source}': {len(wrong)} tensors do not fit the configuration, first {first} "
            f"({found.get(first)}, expected {expected.get(first)}); give the right one as --config or --set"
        )


if __name__ == "__main__":
    cli.run(main)
