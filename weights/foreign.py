"""Foreign state dicts -> names and layouts of this repository, and a configuration from their shapes."""

import math
import re

import torch
from torch import Tensor

from grid import Grid
from models.embeddings import sincos_positions

# Official name -> name here; the first match wins. DC-DiT's main network sits two levels deep there.
_OFFICIAL = (
    (r"^x_embedder\.proj\.", "x_embedder."),
    (r"^y_embedder\.embedding_table\.", "y_embedder.table."),
    (r"^hnet\.(encoder|decoder)\.layers\.", r"\1.blocks."),
    (r"^hnet\.(encoder|decoder)\.rmsnorm\.", r"\1.norm."),
    (r"^hnet\.main_network\.main_network\.layers\.", "blocks."),
    (r"^hnet\.main_network\.main_network\.rmsnorm\.", "norm."),
    (r"^hnet\.routing_module\.", "router."),
    (r"^hnet\.residual_proj\.", "residual_proj."),
)

# Name in diffusers' DiTTransformer2DModel -> name here; q, k and v become one tensor.
_DIFFUSERS = (
    (r"^pos_embed\.proj\.", "x_embedder."),
    (r"^transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"^transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"^transformer_blocks\.0\.norm1\.emb\.class_embedder\.embedding_table\.", "y_embedder.table."),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
    (r"^transformer_blocks\.(\d+)\.attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
    (r"^proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out_2\.", "final_layer.linear."),
)
_DIFFUSERS_EMBEDDING = re.compile(r"transformer_blocks\.(\d+)\.norm1\.emb\.")
_DIFFUSERS_QKV = re.compile(r"transformer_blocks\.(\d+)\.attn1\.to_([qkv])\.(weight|bias)")

DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # attention heads of the published sizes, by width
DIFFUSERS_DIVISOR = 127  # diffusers spaces 128 frequencies over 127 steps, the published DiT over 128


def official_name(name: str) -> str:
    """The name here of a tensor in an official DC-DiT or DiT state dict."""
    return _rename(name, _OFFICIAL)


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the official state dict of a DC-DiT (one chunking stage) or DiT; load it with strict=True."""
    converted = {official_name(name): tensor for name, tensor in state.items()}
    if converted["pos_embed"].ndim == 3:  # not if the weights have our names
        converted["pos_embed"] = converted["pos_embed"].flatten(0, 1)  # (1, L, D) -> (L, D)
    return converted


def from_diffusers(state: dict[str, Tensor], patches: Grid) -> dict[str, Tensor]:
    """Rename the state dict of a DiTTransformer2DModel, and join its query, key and value weights.

    Args:
        patches: rows and columns of an image's patches, for the positions, which diffusers does not store.

    Raises:
        ValueError: the blocks have different embeddings; a DiT has one for all blocks.
    """
    converted: dict[str, Tensor] = {}
    qkv: dict[str, dict[str, Tensor]] = {}  # name here -> tensor by letter
    for name, tensor in state.items():
        # diffusers stores the timestep and label embedding once per block: keep that of block 0
        embedding = _DIFFUSERS_EMBEDDING.match(name)
        if embedding and embedding[1] != "0":
            first = name.replace(f"blocks.{embedding[1]}.", "blocks.0.", 1)
            if not torch.equal(tensor, state[first]):
                raise ValueError(
                    f"'{name}' differs from that of block 0, but a DiT has one embedding for all blocks"
                )
            continue
        # Collect query, key and value
        attention = _DIFFUSERS_QKV.fullmatch(name)
        if attention:
            block, letter, kind = attention.groups()
            qkv.setdefault(f"blocks.{block}.attn.qkv.{kind}", {})[letter] = tensor
            continue
        converted[_rename(name, _DIFFUSERS)] = tensor
    for name, parts in qkv.items():
        converted[name] = torch.cat([parts["q"], parts["k"], parts["v"]])
    if "pos_embed" not in converted:
        width = len(converted["x_embedder.weight"])
        converted["pos_embed"] = sincos_positions(width, patches)
    return converted


def _rename(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in patterns:
        renamed, hits = re.subn(pattern, replacement, name)
        if hits:
            return renamed
    return name


def dit_config(state: dict[str, Tensor], heads: int | None = None) -> dict:
    """The configuration of a DiT, as nested plain data, from the shapes of its tensors.

    Args:
        state: under the names of this repository.
        heads: attention heads, which the shapes do not tell. None: as in the published size with this width.

    Raises:
        ValueError: no published size has this width, or the images are not square.
    """
    width, channels, patch, _ = state["x_embedder.weight"].shape
    heads = heads or DIT_HEADS.get(width)
    if heads is None:
        raise ValueError(f"no published DiT is {width} wide, so its attention heads are unknown")
    # Read the sizes off the tensors
    blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    hidden = len(state["blocks.0.mlp.fc1.weight"])
    out_channels = len(state["final_layer.linear.weight"]) // patch**2
    positions = len(state["pos_embed"])
    side = math.isqrt(positions)
    if side**2 != positions:
        raise ValueError(f"its {positions} positions are those of no square, so its image size is unknown")
    labels = len(state["y_embedder.table.weight"])  # the classes, and the null label
    hnet = {
        "arch_layout": ["c2", [f"D{blocks}"], "c2"],
        "d_model": [width] * 2,
        "num_heads": [heads] * 2,
    }
    return {
        "model": {
            "name": f"DiT-{blocks}x{width}-{patch}",
            "patch_size": patch,
            "mlp_ratio": hidden / width,
            "hnet": hnet,
        },
        "training": {"learn_sigma": out_channels == 2 * channels},
        "data": {
            "image_size": side * patch * 8,
            "latent_stride": 8,
            "latent_channels": channels,
            "num_classes": labels - 1,
        },
    }
