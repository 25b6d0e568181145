"""Foreign weights -> ours, once, at the boundary."""

import re

from torch import Tensor

# Official DC-DiT name -> ours, first match wins. The main network sits two levels deep there.
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


def official_name(name: str) -> str:
    """Our name of a tensor of the official DC-DiT state dict."""
    for pattern, ours in _OFFICIAL:
        renamed, hits = re.subn(pattern, ours, name)
        if hits:
            return renamed
    return name


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An official DC-DiT state dict (one chunking stage) under our names; load it with strict=True."""
    converted = {official_name(name): tensor for name, tensor in state.items()}
    converted["pos_embed"] = converted["pos_embed"].flatten(0, 1)  # (1, L, D) there
    return converted
