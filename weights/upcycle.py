"""First weights from another model: the same network, or a static DiT that becomes a DC-DiT.

Upcycling (DC-DiT, section on upcycling) keeps what a pretrained DiT knows. Blocks, timestep and label weights
are copied, the positions are resampled to single latent cells, and the scaffold around the blocks is new;
`model.upcycle` says how it starts.
"""

import shlex
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from config import (
    Config,
    UserError,
    config_from_dict,
    differences,
    flatten,
    is_read,
    parse_layout,
    role_of,
    to_dict,
)
from data.names import have_names
from models import build_model
from models.dc_dit import DCDiT
from models.dit import DiT
from models.embeddings import sincos_positions
from processes import group
from weights.checkpoint import (
    Checkpoint,
    forget_unknown_keys,
    load_checkpoint,
    shape_difference,
    tensor_shapes,
)
from weights.ema import young_ema

# Keys in which a DiT must agree with the DC-DiT that it becomes.
SHARED = (
    "model.hnet.d_model",
    "model.hnet.num_heads",
    "model.mlp_ratio",
    "model.timestep_divisor",
    "training.learn_sigma",
    "data.latent_channels",
    "data.image_size",
    "data.latent_stride",
    "diffusion.objective",
    "diffusion.flow_shift",
    "diffusion.prediction",
    "diffusion.noise_schedule",
    "diffusion.diffusion_steps",
)

# Keys that a resume must not change, although weights mean the same with another value.
SAME_MEANING = ("model.min_tokens", "model.hnet.fp32_router_dechunk")

# Keys that shape nothing but the table of labels, which is fitted to the new classes.
LABEL_KEYS = ("data.num_classes", "training.class_dropout_prob")
LABEL_TABLE = "y_embedder.table.weight"

Network = DiT | DCDiT

# For each tensor, where its values come from: "copied", "resampled: how" or "new: how"
Origins = dict[str, str]


def initial_state(config: Config, class_names: Sequence[str] | None = None) -> tuple[Checkpoint, Origins]:
    """The state of a new run that starts from `training.init_from`: step 0, model and EMA.

    Args:
        class_names: of the features, by label, where they are known.

    Raises:
        UserError: the file cannot be read, or the configured model cannot be made from its model.
    """
    path = str(config.training.init_from)
    # Build both networks, the new one from the seed
    loaded = load_checkpoint(path, "training.init_from")
    forget_unknown_keys(loaded, f"training.init_from '{path}'")
    source_config = config_from_dict(loaded["config"])
    torch.manual_seed(config.training.seed)
    model = build_model(config)
    source = build_model(source_config)
    difference = shape_difference(tensor_shapes(source.state_dict()), tensor_shapes(loaded["ema"]))
    if difference:
        raise UserError(f"training.init_from: '{path}' contradicts its own configuration: {difference}")
    problem = young_ema(loaded)
    if problem:
        group.print_once(
            f"warning: training.init_from '{path}': {problem}; to start from the trained weights, write them to a "
            "file with python -m weights.convert --weights model, and give that"
        )
    source.load_state_dict(loaded["ema"])
    labels = match_labels(config, class_names, source_config, loaded["class_names"])
    labels_origin = fit_label_table(source, source_config, model, config, labels)
    # Fill the new one
    if isinstance(source, DiT) and isinstance(model, DCDiT):
        check_shared(config, source_config)
        start = config.model.upcycle
        first_factor = config.training.downsample_factor_start or config.training.downsample_factor
        origins = upcycle(source, model, start.scaffold, start.router, first_factor)
    else:
        check_same_network(config, source_config, source, model)
        model.load_state_dict(source.state_dict())
        origins = dict.fromkeys(model.state_dict(), "copied")
    origins[LABEL_TABLE] = labels_origin
    weights = model.state_dict()
    return {"step": 0, "model": weights, "ema": weights}, origins


def check_shared(config: Config, dit: Config) -> None:
    """Raise a UserError unless the DiT's configuration agrees with that of the DC-DiT where it must."""
    changed = differences(to_dict(config), to_dict(dit))
    different = [key for key in changed if key.startswith(SHARED)]
    blocks = parse_layout(config.model.hnet.arch_layout).main_blocks
    if blocks != parse_layout(dit.model.hnet.arch_layout).main_blocks:
        different.append("model.hnet.arch_layout")
    own = config.data.conditions
    for name, kind in dit.data.conditions.items():
        if own.get(name, kind) != kind:
            different.append(f"data.conditions.{name}")
    if different:
        raise UserError(
            f"training.init_from: '{config.training.init_from}' is a DiT with a different "
            f"{', '.join(different)}; make them equal"
        )
    dropped = [name for name in dit.data.conditions if name not in own]
    if dropped:
        group.print_once(f"training.init_from: the conditions {', '.join(dropped)} of the DiT are left out")


def check_same_network(config: Config, source_config: Config, source: nn.Module, model: nn.Module) -> None:
    """Raise a UserError unless both networks have the same tensors and compute the same with them."""
    path = config.training.init_from
    difference = shape_difference(tensor_shapes(model.state_dict()), tensor_shapes(source.state_dict()))
    if difference:
        raise UserError(
            f"training.init_from: '{path}' holds another network than the configuration describes: "
            f"{difference}; give a model with its shapes, or a static DiT of its width and blocks"
        )
    check_same_meaning(config, source_config, f"training.init_from: '{path}'")


def check_same_meaning(config: Config, source: Config, name: str) -> None:
    """Raise a UserError if the configured network computes something else from the tensors of a source.

    What only training changes, such as the noise schedule, is a warning.

    Args:
        source: configuration of the model with these tensors.
        name: of the model, for messages.
    """
    # The same number of positions may lie on another grid
    if config.latent_grid != source.latent_grid:
        raise UserError(
            f"{name} has latents of {source.latent_grid} cells, but data.image_size makes {config.latent_grid}; "
            "give a model of the same size"
        )
    # The same shapes may stand for another network, such as one with other heads
    for key in process_changes(config, source):
        value = flatten(to_dict(source))[key]
        if key.startswith("model."):
            wanted = shlex.quote(f"{key}={value}")
            raise UserError(f"{name} was trained with another {key}; add --set {wanted}")
        group.print_once(f"warning: {name} was trained with {key} {value}, which is another here")


def process_changes(config: Config, other: Config) -> list[str]:
    """Keys that differ, are read, and change what weights of the same shapes mean."""
    keys = []
    for key in differences(to_dict(config), to_dict(other)):
        is_change = role_of(key) == "process" and key not in SAME_MEANING
        if is_change and (is_read(config, key) or is_read(other, key)):
            keys.append(key)
    return keys


class MatchedLabels(NamedTuple):
    """Which classes the source and the new model share."""

    source_of: dict[int, int]  # label in the new model -> label in the source
    by_name: bool  # otherwise by number


def match_labels(
    config: Config, names: Sequence[str] | None, source_config: Config, source_names: Sequence[str] | None
) -> MatchedLabels:
    """Find the classes that both models have: by name where both know names, otherwise by number.

    Without names nothing says which classes correspond, unless both models have the same number of them.
    """
    classes = config.data.num_classes
    source_classes = source_config.data.num_classes
    same_number = classes == source_classes
    if names is None or source_names is None or not have_names(names, source_names):
        labels = range(classes) if same_number else range(0)
        return MatchedLabels({label: label for label in labels}, by_name=False)

    # By name
    labels_there = {name: label for label, name in enumerate(source_names[:source_classes])}
    source_of = {}
    for label, name in enumerate(names[:classes]):
        if name in labels_there:
            source_of[label] = labels_there[name]
    # Labels that have no name on either side are those of a larger data set
    if same_number:
        for label in range(max(len(names), len(source_names)), classes):
            source_of[label] = label
    return MatchedLabels(source_of, by_name=True)


@torch.no_grad()
def fit_label_table(
    source: Network, source_config: Config, model: Network, config: Config, labels: MatchedLabels
) -> str:
    """Give the source a table of labels for the classes of the new model. Returns where its values come from.

    The rows of classes that the source lacks start as in the new model. The row of the null label, the last
    one, is kept if both have it.
    """
    old = source.y_embedder.table.weight  # (labels, D)
    new = model.y_embedder.table.weight
    classes = config.data.num_classes
    source_of = labels.source_of
    is_same_table = old.shape == new.shape and source_of == {label: label for label in range(classes)}
    if old.shape[1:] != new.shape[1:] or is_same_table:
        return "copied"

    # Copy the rows of the shared classes
    rows = new.detach().clone()
    for label, source_label in source_of.items():
        rows[label] = old[source_label]
    parts = []
    if labels.by_name:
        parts.append(f"by class name {len(source_of)} rows copied, {classes - len(source_of)} initialised")
    elif source_of:
        parts.append("classes copied")
    # Copy the row of the null label
    if len(new) > classes and len(old) > source_config.data.num_classes:
        rows[classes] = old[-1]
        parts.append("null label copied")
    source.y_embedder.table = nn.Embedding.from_pretrained(rows, freeze=False)
    kept = ", ".join(parts) or "nothing copied"
    return f"new labels ({tuple(old.shape)} there, {tuple(new.shape)} here; {kept})"


# -------------------------------------------------------------------------------------------------- upcycling


class UpcycledWeights:
    """The tensors of a DC-DiT, by name, and where the values of each come from."""

    def __init__(self, model: DCDiT):
        self.grid = model.grid  # of the latent
        self.tensors = model.state_dict()
        self.origins: Origins = dict.fromkeys(self.tensors, "new")

    def write(self, name: str, value: Tensor | float, origin: str) -> None:
        """Write a value into a tensor of the model."""
        tensor = self.tensors[name]
        tensor.copy_(torch.as_tensor(value).expand_as(tensor))
        self.origins[name] = origin


@torch.no_grad()
def upcycle(source: DiT, model: DCDiT, scaffold: str, router: str, downsample_factor: float) -> Origins:
    """Put a DiT's weights into a freshly built DC-DiT of the same width and blocks.

    Args:
        scaffold: "dit" (stem, encoder, decoder and head start from the DiT's layers) or "fresh".
        router: "balanced" (it keeps 1 token in N from the first step on) or "fresh".
        downsample_factor: N at the first step.

    Returns:
        The origin of each tensor of the DC-DiT.
    """
    dit = source.state_dict()
    target = UpcycledWeights(model)
    # Copy what both networks have
    for name, tensor in dit.items():
        is_shared = name.startswith(("blocks.", "t_embedder.", "y_embedder.", "conditioner."))
        if is_shared and name in target.tensors:
            target.write(name, tensor, "copied")
    # Start what is new
    resample_positions(dit, target, at_first_cell=scaffold == "dit")
    if scaffold == "dit":
        start_stem(dit, target)
        start_head(dit, target)
    if router == "balanced":
        for name in model.router.balance(downsample_factor):
            target.origins[f"router.{name}"] = "new: keeps 1 in N at the start"
    return target.origins


def resample_positions(dit: dict[str, Tensor], target: UpcycledWeights, at_first_cell: bool) -> None:
    """Give each latent cell a position on the grid of the DiT's patches.

    Args:
        at_first_cell: a patch has its position at its first cell, otherwise at its centre. Patches larger
            than 2 always have it at their centre, because `embed_in_3x3` shrinks them.
    """
    patch = dit["x_embedder.weight"].shape[-1]
    width = target.tensors["pos_embed"].shape[1]
    offset = 0.0 if at_first_cell and patch <= 2 else (1 - patch) / 2
    positions = sincos_positions(width, target.grid, 1 / patch, offset)
    target.write("pos_embed", positions, f"resampled: {patch} cells per step of the DiT's grid")


def start_stem(dit: dict[str, Tensor], target: UpcycledWeights) -> None:
    """Make the encoder's output at a cell the DiT's embedding of the patch that starts there, up to length.

    The convolution blocks start as the identity, and the last one widens by an exact factorisation. RMSNorm
    sets the length of the embedding to its length for white noise.
    """
    kernel = embed_in_3x3(dit["x_embedder.weight"])  # (D, C, 3, 3)
    bias = dit["x_embedder.bias"]
    start_as_skips("encoder", target)

    # Put the patch kernel into the stem, in two factors if the encoder is narrower than the transformer
    narrow = len(target.tensors["x_embedder.weight"])
    stem = kernel
    stem_bias = bias
    if narrow < len(kernel):
        stem, widen = factorise(kernel, narrow)
        stem_bias = torch.zeros(narrow)
        write_widening_skip(target, widen, bias)
    target.write("x_embedder.weight", stem, "resampled: patch kernel in a 3 x 3 one")
    target.write("x_embedder.bias", stem_bias, "resampled: patch kernel in a 3 x 3 one")

    # Set the length that RMSNorm gives to every embedding
    length = (kernel.square().sum((1, 2, 3)) + bias.square()).mean().sqrt()
    target.write("encoder.norm.weight", length, "new: length of the DiT's embedding of noise")


def embed_in_3x3(kernel: Tensor) -> Tensor:
    """A patch kernel (D, C, P, P) as a 3 x 3 one: up to P = 2 it starts at the centre, larger ones shrink."""
    patch = kernel.shape[-1]
    if patch > 2:
        shrunk = nn.functional.adaptive_avg_pool2d(kernel, 3)
        return shrunk * (patch * patch / 9)  # about the same answer to a constant
    embedded = kernel.new_zeros(*kernel.shape[:2], 3, 3)
    embedded[:, :, 1 : 1 + patch, 1 : 1 + patch] = kernel
    return embedded


def factorise(kernel: Tensor, narrow: int) -> tuple[Tensor, Tensor]:
    """Split a kernel (D, C, 3, 3) into two in sequence: (narrow, C, 3, 3), then (D, narrow, 1, 1)."""
    # Keep the largest singular values, and give each factor their square roots
    u, s, v = torch.linalg.svd(kernel.flatten(1), full_matrices=False)
    rank = min(narrow, len(s))
    first = kernel.new_zeros(narrow, *kernel.shape[1:])
    first[:rank] = (s[:rank, None].sqrt() * v[:rank]).view(rank, *kernel.shape[1:])
    second = kernel.new_zeros(len(kernel), narrow, 1, 1)
    second[:, :rank, 0, 0] = u[:, :rank] * s[:rank].sqrt()
    return first, second


def start_head(dit: dict[str, Tensor], target: UpcycledWeights) -> None:
    """Make the first output the DiT's, averaged over each patch, if decoder and transformer are equally wide.

    A convolution cannot know its place in the patch, so differences within a patch are left to the residual
    path.
    """
    width, _, patch, _ = dit["x_embedder.weight"].shape
    if target.tensors["final_layer.linear.weight"].shape[1] != width:
        return
    start_as_skips("decoder", target)
    # The linear layer predicts all cells of a patch, one after another
    for kind in ("weight", "bias"):
        linear = dit[f"final_layer.linear.{kind}"].unflatten(0, (patch * patch, -1)).mean(0)
        target.write(f"final_layer.linear.{kind}", linear, "resampled: mean over the patch")
        modulation = f"final_layer.adaLN_modulation.1.{kind}"
        target.write(modulation, dit[modulation], "copied")


def start_as_skips(stack: str, target: UpcycledWeights) -> None:
    """Let the blocks of a convolution stack start as their skip connections."""
    for name in target.tensors:
        if name.startswith(f"{stack}.blocks.") and ".conv2." in name:
            target.write(name, 0.0, "new: zero")


def write_widening_skip(target: UpcycledWeights, weight: Tensor, bias: Tensor) -> None:
    """Write the skip projection of the encoder's last block, the only one that changes the width."""
    for name in target.tensors:
        if name.startswith("encoder.blocks.") and ".skip_proj." in name:
            value = weight if name.endswith(".weight") else bias
            target.write(name, value, "resampled: widens the stem")
