"""Finds the weights in files of other trainers, under any container, key prefix and precision.

`read_foreign(path)` reads a file of unknown origin. `conversion_hint(path)` is what a user is told who gives such
a file where one of this repository is needed.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

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


def strip_prefixes(weights: Weights) -> Weights:
    """Remove the parts of names that wrappers add at any depth, then those that begin all names.

    Raises:
        ValueError: two tensors would have one name.
    """
    stripped = {}
    for name, tensor in weights.items():
        parts = [part for part in name.split(".") if part not in WRAPPERS]
        stripped[".".join(parts)] = tensor
    if len(stripped) < len(weights):
        raise ValueError("two of its tensors differ in the prefix of their names only")
    # A trainer may hold the network in an attribute: all names begin with `net.`
    while len({name.split(".")[0] for name in stripped}) == 1 and all("." in name for name in stripped):
        stripped = {name.split(".", 1)[1]: tensor for name, tensor in stripped.items()}
    return stripped


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
    """The networks in what a file holds: the content itself, or entries of it.

    An entry with "ema" in its name is an EMA.

    Raises:
        Refused: two tensors of a network differ in the prefix of their names only.
    """
    try:
        if is_state_dict(content):
            weights = strip_prefixes(content)
            return Foreign(weights, weights, None)
        networks = networks_in(content)
    except ValueError as error:
        raise Refused(str(error)) from None
    ema = None
    model = None
    for name, weights in networks.items():
        if "ema" in name.lower():
            ema = ema or weights
        else:
            model = model or weights
    config = content.get("config") if isinstance(content, dict) else None
    return Foreign(ema, model, config if isinstance(config, dict) else None)


def networks_in(content: object) -> dict[str, Weights]:
    """The entries of a dictionary that are networks which can be converted."""
    networks = {}
    entries: Mapping[Any, Any] = content if isinstance(content, dict) else {}
    for name, value in entries.items():
        if is_state_dict(value):
            weights = strip_prefixes(value)
            if kind_of(weights):
                networks[str(name)] = weights
    return networks


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
    output = path.with_suffix(".safetensors")
    if output == path or path.is_dir():
        output = path.with_name(f"{path.stem}-converted.safetensors")
    command = f"python -m weights.convert {shlex.quote(str(path))} {shlex.quote(str(output))}"
    # A DC-DiT has more in its configuration than its tensors show
    if "DC-DiT" in kind and (foreign is None or foreign.config is None):
        command += " --config YAML"
    return f"holds weights that are not converted ({kind}); run `{command}` and give the result"


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
