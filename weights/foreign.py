"""Foreign state dicts -> ours: names, layouts, and the configuration that the shapes tell. Tensors and plain data only."""

import re

import torch
from torch import Tensor

from models.embeddings import sincos_positions

# Official name -> ours, first match wins. DC-DiT's main network sits two levels deep there; a DiT has no `hnet`.
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

# diffusers' DiTTransformer2DModel -> ours; q, k and v become one tensor.
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

DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the published sizes, by width
DIFFUSERS_DIVISOR = 127  # diffusers spaces 128 frequencies over 127 steps, the published DiT over 128


def official_name(name: str) -> str:
    """Our name of a tensor of an official DC-DiT or DiT state dict."""
    return _rename(name, _OFFICIAL)


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official DC-DiT (one chunking stage) or DiT state dict under our names; load it with strict=True."""
    converted = {official_name(name): tensor for name, tensor in state.items()}
    converted["pos_embed"] = converted["pos_embed"].flatten(0, 1)  # (1, L, D) there
    return converted


def from_diffusers(state: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """The state dict of a DiTTransformer2DModel under our names.

    Raises:
        ValueError: blocks with embedding tables of their own, of which a DiT has one for all.
    """
    converted, parts = {}, {}
    for name, tensor in state.items():
        block, own_embedding = re.match(r"(?:transformer_blocks\.(\d+)\.)?(norm1\.emb\.)?", name).groups()
        if own_embedding and block != "0":
            if not torch.equal(tensor, state[name.replace(f"blocks.{block}.", "blocks.0.", 1)]):
                raise ValueError(
                    f"'{name}' differs from that of block 0, but a DiT has one embedding for all blocks"
                )
        elif found := re.fullmatch(r"transformer_blocks\.(\d+)\.attn1\.to_([qkv])\.(weight|bias)", name):
            parts.setdefault(f"blocks.{found[1]}.attn.qkv.{found[3]}", {})[found[2]] = tensor
        else:
            converted[_rename(name, _DIFFUSERS)] = tensor
    converted |= {name: torch.cat([part[letter] for letter in "qkv"]) for name, part in parts.items()}
    converted.setdefault(
        "pos_embed", sincos_positions(converted["x_embedder.weight"].shape[0], int(tokens**0.5))
    )
    return converted


def _rename(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in patterns:
        renamed, hits = re.subn(pattern, ours, name)
        if hits:
            return renamed
    return name


def dit_config(state: dict[str, Tensor], heads: int | None = None) -> dict:
    """The configuration of a DiT, as nested plain data, from its tensors under our names.

    Args:
        heads: attention heads, which no shape tells; None: those of the published size of this width.

    Raises:
        ValueError: no published size has this width.
    """
    width, channels, patch, _ = state["x_embedder.weight"].shape
    heads = heads or DIT_HEADS.get(width)
    if heads is None:
        raise ValueError(f"no published DiT is {width} wide, so its attention heads are unknown")
    blocks = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    out = len(state["final_layer.linear.weight"]) // patch**2
    side = int(len(state["pos_embed"]) ** 0.5) * patch
    labels = len(state["y_embedder.table.weight"])
    return {
        "model": {
            "name": f"DiT-{blocks}x{width}-{patch}",
            "patch_size": patch,
            "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / width,
            "hnet": {
                "arch_layout": ["c2", [f"D{blocks}"], "c2"],
                "d_model": [width] * 2,
                "num_heads": [heads] * 2,
            },
        },
        "training": {"learn_sigma": out == 2 * channels},
        "data": {
            "image_size": side * 8,
            "latent_stride": 8,
            "latent_channels": channels,
            "num_classes": labels - 1,
        },
    }
