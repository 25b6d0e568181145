"""Finds the weights in files of other trainers, under any container, key prefix and precision.

`read_foreign(path)` reads a file of unknown origin. `conversion_hint(path)` is what a user is told who gives such
a file where one of this repository is needed.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeGuard

import safetensors
import torch
from torch import Tensor

from schema import one_line, printable
from weights.untrusted import Refused, read_untrusted

Weights = dict[str, Tensor]

# Parts of a tensor's name that DistributedDataParallel, torch.compile and FSDP put before or into it
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# Number formats whose values are the weights; quantised ones have scales somewhere else
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

MAX_DEPTH = 8  # of dictionaries, and of prefixes, around a network

DIFFUSERS_KIND = "diffusers' DiT"
DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is the older name


class Foreign(NamedTuple):
    """What a file of unknown origin holds."""

    ema: Weights | None
    model: Weights | None
    config: dict | None  # the configuration of an official DC-DiT

    @property
    def kind(self) -> str | None:
        """Whose network it is; None if it is none that can be converted."""
        weights = self.ema if self.ema is not None else self.model
        return None if weights is None else kind_of(weights)


# ------------------------------------------------------------------------------------------------ state dicts


def is_state_dict(value: object) -> TypeGuard[Weights]:
    """Whether this is a dictionary from names to tensors."""
    if not isinstance(value, dict):
        return False
    return all(isinstance(name, str) and isinstance(entry, Tensor) for name, entry in value.items())


def kind_of(weights: Mapping[str, Tensor]) -> str | None:
    """Whose names a state dict has; None if it is no DiT or DC-DiT."""
    if any(name.startswith("transformer_blocks.") for name in weights):
        return DIFFUSERS_KIND
    if "pos_embed" not in weights:
        return None
    if "x_embedder.proj.weight" in weights:
        is_chunked = any(name.startswith("hnet.") for name in weights)
        return "official DC-DiT" if is_chunked else "official DiT"
    if "x_embedder.weight" in weights:
        is_chunked = any(name.startswith("router.") for name in weights)
        return "DC-DiT with the names of this repository" if is_chunked else "DiT with our names"
    return None


def strip_wrappers(weights: Mapping[str, Tensor]) -> Weights:
    """Remove the parts of names that wrappers add at any depth, and the counters that an EMA keeps beside.

    Raises:
        ValueError: two tensors would have one name.
    """
    stripped: Weights = {}
    for name, tensor in weights.items():
        # A counter of updates, such as `n_averaged` of PyTorch's AveragedModel
        if not tensor.ndim and not tensor.is_floating_point():
            continue
        parts = [part for part in name.split(".") if part not in WRAPPERS]
        short_name = ".".join(parts)
        if short_name in stripped:
            raise ValueError("two of its tensors differ in the prefix of their names only")
        stripped[short_name] = tensor
    return stripped


def networks_in_tensors(weights: Mapping[str, Tensor], depth: int = 0) -> dict[str, Weights]:
    """The networks in a state dict, by the prefix that the names of each have.

    The prefix is empty for the state dict of a network alone. A trainer may hold the network in an attribute,
    so that all names begin with `net.`, or beside its EMA: `online_model.` and `ema_model.`.
    """
    stripped = strip_wrappers(weights)
    if kind_of(stripped):
        return {"": stripped}
    # Look among the names that share their first part
    parts: dict[str, Weights] = {}
    for name, tensor in stripped.items():
        first, _, rest = name.partition(".")
        if rest:
            parts.setdefault(first, {})[rest] = tensor
    networks = {}
    if depth < MAX_DEPTH:
        for part, inner_weights in parts.items():
            for prefix, network in networks_in_tensors(inner_weights, depth + 1).items():
                networks[join(part, prefix)] = network
    return networks


def join(outer: str, inner: str) -> str:
    """Two parts of a dotted name, of which the second may be empty."""
    return f"{outer}.{inner}" if inner else outer


def precision_problem(weights: Mapping[str, Tensor]) -> str | None:
    """Which tensor has numbers that are no plain floating point numbers; None if all have."""
    for name, tensor in weights.items():
        if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
            kind = str(tensor.dtype).removeprefix("torch.")
            return f"{name!r} is {kind}; quantised weights cannot be used, only float32, float16 and bfloat16"
    return None


# ------------------------------------------------------------------------------------------------------ files


def read_foreign(path: Path) -> Foreign:
    """Read a safetensors or torch.save file of unknown origin. Executes nothing.

    Raises:
        Refused: it cannot be read, or not safely.
        OSError: the file cannot be read.
    """
    if path.suffix == ".safetensors":
        return find_weights(read_safetensors(path))
    return find_weights(read_untrusted(path))


def read_shards(paths: Sequence[Path]) -> Weights:
    """All tensors of the files into which a state dict is split.

    Raises:
        Refused: a file cannot be read, or not safely, or is no state dict.
        OSError: a file cannot be read.
    """
    weights: Weights = {}
    for path in paths:
        content = read_safetensors(path) if path.suffix == ".safetensors" else read_untrusted(path)
        if not is_state_dict(content):
            raise Refused(f"{path.name} holds more than tensors")
        weights.update(content)
    return weights


def read_safetensors(path: Path) -> Weights:
    """All tensors of a safetensors file, or Refused."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # a number format that this version does not know can raise any kind
        raise Refused(one_line(error)) from None


def find_weights(content: object) -> Foreign:
    """The networks in what a file holds: the content itself, or entries of it at any depth.

    Raises:
        Refused: two tensors of a network differ in the prefix of their names only, or it is a SiT.
    """
    # Tensors of a SiT have the names and shapes of a DiT's
    options = content.get("args") if isinstance(content, dict) else None
    if isinstance(options, dict) and "path_type" in options:
        raise Refused("it holds a SiT, whose times and velocities are not those of this repository's flows")
    try:
        networks = networks_in(content)
    except ValueError as error:
        raise Refused(str(error)) from None
    if is_state_dict(content) and len(networks) == 1:
        (weights,) = networks.values()
        return Foreign(weights, weights, None)
    ema = None
    model = None
    for name, weights in networks.items():
        if is_ema(name):
            ema = ema or weights
        else:
            model = model or weights
    config = content.get("config") if isinstance(content, dict) else None
    return Foreign(ema, model, config if isinstance(config, dict) else None)


def networks_in(content: object, depth: int = 0) -> dict[str, Weights]:
    """The networks in nested dictionaries, by where they stand, such as "checkpoint.ema"."""
    if not isinstance(content, dict) or depth > MAX_DEPTH:
        return {}
    tensors = {}
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name] = value
    networks = networks_in_tensors(tensors)
    for name, value in content.items():
        for inner, weights in networks_in(value, depth + 1).items():
            networks[join(str(name), inner)] = weights
    return networks


def is_ema(name: str) -> bool:
    """Whether the network at this place is an EMA: "ema" is part of the name.

    The library ema-pytorch keeps the trained weights in its object, too, as `online_model`.
    """
    return "ema" in name.lower() and "online" not in name.split(".")[-1]


# ------------------------------------------------------------------------------------------- what to tell users


def conversion_hint(path: Path) -> str | None:
    """What a file or folder is, and the command that converts it; None if it cannot be converted.

    For example "holds an official DiT that is not converted; run `python -m weights.convert A.pt A.safetensors`".
    """
    kind = diffusers_kind(path) if path.is_dir() else None
    foreign = None
    if path.is_file():
        try:
            foreign = read_foreign(path)
        except (Refused, OSError):
            return None
        kind = foreign.kind
        problem = precision_problem(foreign.ema or foreign.model or {})
        if kind and problem:
            return f"holds weights that cannot be used: {printable(problem)}"
    if kind is None:
        return None
    output = free_output(path)
    command = f"python -m weights.convert {shlex.quote(str(path))} {shlex.quote(str(output))}"
    # A DC-DiT has more in its configuration than its tensors show
    if "DC-DiT" in kind and (foreign is None or foreign.config is None):
        command += " --config YAML"
    return f"holds weights that are not converted ({kind}); run `{command}` and give the result"


def free_output(path: Path) -> Path:
    """A name for the converted weights of a file or folder that no file beside it has."""
    if path.name in ("", ".."):  # of the current folder, or the one above
        path = path.resolve()
    output = path.with_suffix(".safetensors")
    if path.is_dir() or output.exists():
        output = path.with_name(f"{path.stem}-converted.safetensors")
    number = 2
    while output.exists():
        output = path.with_name(f"{path.stem}-converted-{number}.safetensors")
        number += 1
    return output


def diffusers_kind(folder: Path) -> str | None:
    """Whether a folder holds a DiTTransformer2DModel or a pipeline with one."""
    for file in (folder / "config.json", folder / "transformer" / "config.json"):
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(about, dict) and about.get("_class_name") in DIFFUSERS_CLASSES:
            return DIFFUSERS_KIND
    return None
