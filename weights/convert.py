"""Foreign weights -> ours, and ours between `.pt` and `.safetensors`; nothing in a file is ever executed.

    python -m weights.convert DiT-XL-2-256x256.pt DiT-XL-2.safetensors       official DiT
    python -m weights.convert DiT-XL-2-256/ DiT-XL-2.safetensors             diffusers DiTTransformer2DModel
    python -m weights.convert official/0400000.pt DC-DiT.safetensors         official DC-DiT
    python -m weights.convert results/B-N4/checkpoints/0400000.pt B-N4.safetensors
    python -m weights.convert B-N4.safetensors B-N4.pt                       and back

What it writes is what `--ckpt` of the samplers and `training.init_from` read.
"""

import argparse
import json
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

import cli
from config import Config, UserError, config_from_dict, load_config, to_dict
from data.files import write_file
from models import build_model
from weights.checkpoint import FORMAT, PLAIN_DATA, damage, load_checkpoint, save_weights
from weights.foreign import DIFFUSERS_DIVISOR, dit_config, from_diffusers, from_official
from weights.untrusted import Refused, read_untrusted

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("source", type=Path, help="checkpoint, weights file, or diffusers folder")
    parser.add_argument("output", type=Path, help="*.safetensors, or *.pt")
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="which of the two (default: %(default)s)"
    )
    parser.add_argument("--config", help="configuration, where the source has none")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change its configuration"
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
    check_fits(state, args.source)
    if args.output.suffix == ".safetensors":
        save_weights(args.output, state)
    else:
        content = {
            "format": FORMAT,
            **{key: state[key] for key in PLAIN_DATA},
            "model": state["ema"],
            "ema": state["ema"],
        }
        write_file(args.output, lambda stream: torch.save(content, stream))
    parameters = sum(tensor.numel() for tensor in state["ema"].values())
    print(
        f"{args.output}: {state['config']['model']['name']}, {parameters:,} numbers, from {kind} {args.source}"
    )


def read_source(args: argparse.Namespace) -> tuple[str, dict]:
    """What the source is, and its content as a checkpoint of ours with the wanted weights under "ema"."""
    if args.source.is_dir() and not (args.source / "model.safetensors").is_file():
        return "diffusers' DiT", from_diffusers_folder(args)
    if args.source.is_dir() or args.source.suffix == ".safetensors":
        return "our weights", configured(load_checkpoint(args.source, "source"), args)
    if zipfile.is_zipfile(args.source) and (reason := damage(args.source)):
        raise UserError(f"source '{args.source}' is damaged ({reason}); give another copy")
    try:
        content = read_untrusted(args.source)
    except (Refused, OSError) as error:
        raise UserError(
            f"source '{args.source}' is not a checkpoint that can be read safely: {error}"
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"source '{args.source}' holds no weights; give a checkpoint of DiT, DC-DiT or this repository"
        )
    if "format" in content:
        state = load_checkpoint(args.source, "source")
        return "our checkpoint", configured({**state, "ema": pick(state, args)}, args)
    return from_official_file(pick(content, args), content.get("config"), args)


def pick(content: dict, args: argparse.Namespace) -> dict[str, Tensor]:
    """The state dict under "ema" or "model", or the content itself where it is one."""
    weights = (
        content if all(isinstance(value, Tensor) for value in content.values()) else content.get(args.weights)
    )
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"source '{args.source}' has no state dict '{args.weights}'; try the other --weights")
    return weights


def from_official_file(
    weights: dict[str, Tensor], config: dict | None, args: argparse.Namespace
) -> tuple[str, dict]:
    """An official state dict, of a DC-DiT (with the configuration beside it) or of a DiT."""
    if "x_embedder.proj.weight" not in weights or "pos_embed" not in weights:
        raise UserError(f"source '{args.source}' holds other weights than those of DiT and DC-DiT")
    ours = from_official(weights)
    if any(name.startswith("hnet.") for name in weights):
        if config is None and not args.config:
            raise UserError(
                f"source '{args.source}': this DC-DiT comes without its configuration; give it as --config"
            )
        return "official DC-DiT", as_checkpoint(ours, configuration(args, config))
    return "official DiT", as_checkpoint(ours, configuration(args, told_by_shapes(ours, args)))


def from_diffusers_folder(args: argparse.Namespace) -> dict:
    """A folder of DiTTransformer2DModel, or of a DiTPipeline that has it in transformer/."""
    folder = args.source / "transformer" if (args.source / "transformer").is_dir() else args.source
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = safetensors.torch.load_file(folder / DIFFUSERS_WEIGHTS)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(
            f"source '{folder}' is no diffusers folder with config.json and {DIFFUSERS_WEIGHTS} ({error})"
        ) from None
    try:
        ours = from_diffusers(weights, (about["sample_size"] // about["patch_size"]) ** 2)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"source '{folder}' is no DiTTransformer2DModel that can be converted: {error}"
        ) from None
    config = told_by_shapes(ours, args, about["num_attention_heads"])
    config["model"]["timestep_divisor"] = DIFFUSERS_DIVISOR
    return as_checkpoint(ours, configuration(args, config))


def told_by_shapes(
    weights: dict[str, Tensor], args: argparse.Namespace, heads: int | None = None
) -> dict | None:
    """The configuration of a DiT; None where --config gives it."""
    if args.config:
        return None
    try:
        return dit_config(weights, heads)
    except (KeyError, ValueError) as error:
        raise UserError(f"source '{args.source}': {error}; give its configuration as --config") from None


def configuration(args: argparse.Namespace, own: dict | None) -> Config:
    """The source's own configuration, or that of --config, with --set applied."""
    return load_config(args.config, args.set) if args.config else config_from_dict(own, args.set)


def configured(state: dict, args: argparse.Namespace) -> dict:
    return {**state, "config": to_dict(configuration(args, state["config"]))}


def as_checkpoint(weights: dict[str, Tensor], config: Config) -> dict:
    return {
        "step": 0,
        "config": to_dict(config),
        "autoencoder": None,
        "features": None,
        "class_names": None,
        "ema": weights,
    }


def check_fits(state: dict, source: Path) -> None:
    """UserError unless the configured network has the tensors that are about to be written."""
    with torch.device("meta"):
        want = {
            name: tuple(x.shape)
            for name, x in build_model(config_from_dict(state["config"])).state_dict().items()
        }
    have = {name: tuple(x.shape) for name, x in state["ema"].items()}
    wrong = [name for name in sorted(want.keys() | have.keys()) if want.get(name) != have.get(name)]
    if wrong:
        raise UserError(
            f"source '{source}': {len(wrong)} tensors do not fit the configuration, first {wrong[0]} "
            f"({have.get(wrong[0])}, wanted {want.get(wrong[0])}); give the right one as --config or --set"
        )


if __name__ == "__main__":
    cli.run(main)
