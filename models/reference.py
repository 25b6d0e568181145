"""The readable twin of a DCDiT, stage by stage, on its weights; the oracle of tests and benchmarks.

It computes what the paper describes in the way that comes to mind first: token-contiguous tensors with a
permutation around every convolution, a double argsort for the budget, padded chunks, modulators expanded to
one row per token, padded attention with a mask, a dense (B, M, M) Gaussian and a dense (B, L, M) search. M is
the number of kept tokens of the sample that keeps most; the other letters are those of models/types.py.

    prediction = reference.forward(model, x_t, t, labels).prediction

Sources: DC-DiT (arXiv 2603.06351, section 3), DiT (arXiv 2212.09748, section 3.2), H-Net (arXiv 2507.07955), whose
equations 2 to 9 DC-DiT carries over from sequences to the plane.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grid import Grid
from models.attention import Attention, attend_flash, attend_varlen, pick_kernel
from models.blocks import DiTBlock
from models.conv import ConvBlock, ConvStack
from models.dc_dit import DCDiT
from models.packing import plan_packing
from models.router import LearnedRouter, Router
from models.types import DenoiserOutput, Packing, Routing


def forward(
    model: DCDiT,
    x_t: Tensor,
    t: Tensor,
    labels: Tensor,
    drop: Tensor | None = None,
    replace_routing: Callable[[Routing], Routing] | None = None,
    hidden: tuple[int, ...] = (),
    conditions: dict[str, Tensor] | None = None,
) -> DenoiserOutput:
    """What `model(x_t, t, labels, drop, hidden=hidden, conditions=conditions)` computes.

    Args:
        replace_routing: exchanges the router's decision; benchmarks use it to fix the kept tokens.
    """
    c = model.t_embedder(t) + model.y_embedder(labels)  # (B, D)
    c = model.conditioner(c, conditions)

    # Encoder; then router and residual projection, which are in float32 under autocast too
    x = to_tokens(model.x_embedder(x_t))  # (B, L, E)
    features = conv_stack(model.encoder, x, c, model.grid)  # (B, L, D)
    with torch.autocast(x_t.device.type, enabled=False):
        features = features.float()
        routing = router(model.router, features, drop, model.grid)
        if replace_routing is not None:
            routing = replace_routing(routing)
        residual = features.new_zeros(1) if model.residual_proj is None else model.residual_proj(features)

    # The transformer on the kept tokens
    chunks = plan(routing)
    u = pack(features + model.pos_embed, chunks)  # (T, D)
    outputs = {}
    for index, module in enumerate(model.blocks):
        assert isinstance(module, DiTBlock)
        u = block(module, u, c, chunks)
        if index in hidden:
            outputs[index] = u
    u = rms_norm(u, model.norm.weight)

    # Dechunk, decoder and head
    with torch.autocast(x_t.device.type, enabled=False):
        plugged = dechunk(u.float(), routing, chunks, model.dechunk.smoothing.sigma, model.grid)
        h = plugged + residual  # (B, L, D), H-Net, equation 3
    h = conv_stack(model.decoder, h, c, model.grid)  # (B, L, E)
    shift, scale = model.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=2)
    prediction = model.final_layer.linear(modulate(h, shift, scale))  # (B, L, 2C)
    return DenoiserOutput(to_grid(prediction, model.grid), routing, plan_packing(routing.keep), outputs)


# ------------------------------------------------------------------------------------------- encoder and decoder


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, S, S) -> (B, L, C), contiguous."""
    return x.flatten(2).transpose(1, 2).contiguous()


def to_grid(x: Tensor, grid: Grid) -> Tensor:
    """(B, L, C) -> (B, C, S, S), contiguous."""
    return x.transpose(1, 2).reshape(len(x), -1, *grid)


def conv_stack(stack: ConvStack, x: Tensor, c: Tensor, grid: Grid) -> Tensor:
    """(B, L, in) -> (B, L, out)."""
    for module in stack.blocks:
        assert isinstance(module, ConvBlock)
        x = conv_block(module, x, c, grid)
    return rms_norm(x, stack.norm.weight)


def conv_block(module: ConvBlock, x: Tensor, c: Tensor, grid: Grid) -> Tensor:
    """Residual block with additive conditioning: (B, L, in) -> (B, L, out)."""
    x = to_grid(x, grid)
    h = conv(module.conv1, F.silu(group_norm(module.norm1, x)))
    h = h + module.cond_proj(c)[:, :, None, None]
    h = conv(module.conv2, F.silu(group_norm(module.norm2, h)))
    skip = x if isinstance(module.skip_proj, nn.Identity) else conv(module.skip_proj, x)
    return to_tokens(h + skip)


def conv(module: nn.Module, x: Tensor) -> Tensor:
    """(B, in, S, S) -> (B, out, S, S)."""
    assert isinstance(module, nn.Conv2d)
    side = module.kernel_size[0]
    return F.conv2d(x, module.weight, module.bias, padding=side // 2)


def group_norm(module: nn.Module, x: Tensor) -> Tensor:
    """(B, C, S, S) -> (B, C, S, S)."""
    assert isinstance(module, nn.GroupNorm)
    return F.group_norm(x, module.num_groups, module.weight, module.bias)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 1e-5) * weight over the last dimension, in float32."""
    full = x.float()
    mean_square = full.square().mean(-1, keepdim=True)
    normed = full * torch.rsqrt(mean_square + 1e-5)
    return (normed * weight).to(x.dtype)


# ----------------------------------------------------------------------------------------------------- chunking


def router(module: Router, features: Tensor, drop: Tensor | None, grid: Grid) -> Routing:
    """Boundary probabilities and decisions: (B, L, D) -> Routing (the role of H-Net, equation 4).

    z = proj(x), surprise = z - context_predictor(z), p = sigmoid(score(surprise)); a token is a boundary if p
    > 1/2. Routers other than the paper's are called as they are.
    """
    if not isinstance(module, LearnedRouter):
        return module(to_grid(features, grid), drop)
    z = conv(module.proj, to_grid(features, grid))
    surprise = z - conv(module.context_predictor, z)
    first_conv, norm, _, last_conv = module.residual_scorer
    score = conv(first_conv, surprise)
    score = conv(last_conv, F.silu(group_norm(norm, score)))

    # The first and last token are boundaries, so that no sample is empty
    prob = score.flatten(1).sigmoid().clone()  # (B, L)
    prob[:, 0] = 1.0
    prob[:, -1] = 1.0
    boundary = torch.stack([1 - prob, prob], dim=-1).argmax(-1) == 1
    keep = boundary if drop is None else tail_drop(prob, boundary, drop)
    if module.min_tokens is not None:
        # The ends have a probability of 1, so they are among the most probable
        most_probable = prob.argsort(dim=1, descending=True)[:, : module.min_tokens]
        keep = keep.scatter(1, most_probable, True)
    return Routing(prob, boundary, keep)


def tail_drop(prob: Tensor, boundary: Tensor, drop: Tensor) -> Tensor:
    """Drop the least probable share `drop` (B,) of each sample's boundary tokens (DC-DiT, elastic inference)."""
    key = prob.detach().masked_fill(~boundary, float("inf"))
    key[:, 0] = 2.0
    key[:, -1] = 2.0
    rank = key.argsort(dim=1, stable=True).argsort(dim=1)
    count = boundary.sum(1)
    dropped = (count.float() * drop).long()
    dropped = torch.minimum(dropped, count - 2)  # the two ends stay
    return boundary & (rank >= dropped[:, None])


@dataclass
class Chunks:
    """Kept tokens of a batch as padded rows."""

    index: Tensor  # (B, M) raster indices; behind the kept ones follow those of other tokens
    valid: Tensor  # (B, M) bool
    counts: Tensor  # (B,)

    @functools.cached_property
    def packing(self) -> Packing:
        """For kernels for packed tokens: planned once in a forward pass, if such a kernel is used."""
        return plan_packing(self.valid)


def plan(routing: Routing) -> Chunks:
    """Kept tokens first, in raster order (H-Net, equation 2)."""
    counts = routing.keep.sum(1)
    longest = int(counts.max())
    place = torch.arange(routing.keep.shape[1], device=counts.device)
    # Tokens that are not kept sort behind all others
    key = torch.where(routing.keep, place, place + len(place))
    order = key.argsort(1)
    valid = place[:longest] < counts[:, None]
    return Chunks(order[:, :longest], valid, counts)


def pack(x: Tensor, chunks: Chunks) -> Tensor:
    """(B, L, D) -> (T, D), through the padded (B, M, D)."""
    index = chunks.index[:, :, None].expand(-1, -1, x.shape[2])
    padded = x.gather(1, index)
    return padded[chunks.valid]


def unpack(tokens: Tensor, chunks: Chunks) -> Tensor:
    """(T, D) -> (B, M, D), zeros in the padding."""
    padded = tokens.new_zeros(*chunks.valid.shape, tokens.shape[1])
    padded[chunks.valid] = tokens
    return padded


# -------------------------------------------------------------------------------------------------- transformer


def block(module: DiTBlock, x: Tensor, c: Tensor, chunks: Chunks) -> Tensor:
    """adaLN-Zero block (DiT, section 3.2): (T, D) -> (T, D), with modulators (T, 6D)."""
    rows = module.adaLN_modulation(c).repeat_interleave(chunks.counts, dim=0)
    shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = rows.chunk(6, dim=1)
    x = x + gate_attn * attention(module.attn, modulate(x, shift_attn, scale_attn), chunks)
    if module.mlp is None:
        return x
    hidden = F.gelu(module.mlp.fc1(modulate(x, shift_mlp, scale_mlp)), approximate="tanh")
    return x + gate_mlp * module.mlp.fc2(hidden)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def attention(module: Attention, x: Tensor, chunks: Chunks) -> Tensor:
    """(T, D) -> (T, D), padded with a mask over keys; where a kernel for packed tokens works, with that kernel."""
    qkv = module.qkv(x).view(len(x), 3, module.heads, -1)  # (T, 3, heads, D / heads)
    kernel = pick_kernel(qkv, module.has_flash)
    if kernel != "sdpa":
        attend = attend_flash if kernel == "flash" else attend_varlen
        return module.proj(attend(qkv, chunks.packing).flatten(1))

    padded = unpack(qkv.flatten(1), chunks)  # (B, M, 3D)
    split = padded.unflatten(2, (3, module.heads, -1))  # (B, M, 3, heads, D / heads)
    q, k, v = split.permute(2, 0, 3, 1, 4)  # (B, heads, M, D / heads) each
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=chunks.valid[:, None, None])
    merged = attended.transpose(1, 2).flatten(2)  # (B, M, D)
    return module.proj(merged[chunks.valid])


# ------------------------------------------------------------------------------------------------------ dechunk


def dechunk(tokens: Tensor, routing: Routing, chunks: Chunks, sigma: float, grid: Grid) -> Tensor:
    """Smooth, plug back, straight through: (T, D) -> (B, L, D) (H-Net, equations 5 to 9, in the plane)."""
    mixed = smooth(tokens, routing, chunks, sigma, grid)  # (B, M, D)

    # Plug-back: every cell takes the value of its nearest kept token (the role of H-Net, equation 8)
    nearest = nearest_kept(chunks, grid)  # (B, L)
    plugged = mixed.gather(1, nearest[:, :, None].expand(-1, -1, mixed.shape[2]))

    # Straight-through confidence: a factor of 1 with the gradient of c = p or 1 - p (H-Net, equations 6, 7 and 9)
    confidence = torch.where(routing.boundary, routing.prob, 1 - routing.prob)
    factor = confidence + (1 - confidence).detach()
    return plugged * factor[:, :, None]


def smooth(tokens: Tensor, routing: Routing, chunks: Chunks, sigma: float, grid: Grid) -> Tensor:
    """v_i = p_i u_i + (1 - p_i) sum_j w_ij u_j: (T, D) -> (B, M, D) (the role of H-Net, equation 5).

    w_ij is exp(-|x_i - x_j|^2 / (2 sigma^2)) p_j, normalised over the kept tokens j of the sample.
    """
    u = unpack(tokens, chunks)
    prob = routing.prob.gather(1, chunks.index).clamp(1e-4, 1 - 1e-4)  # (B, M)
    place = cell_places(grid, tokens.device)[chunks.index]  # (B, M, 2)
    squared_distance = (place[:, :, None] - place[:, None]).square().sum(-1)  # (B, M, M)

    if sigma == 0:
        return u
    # Each token's weighted mean over all kept tokens of its sample, itself included
    kernel = torch.exp(-squared_distance / (2 * sigma**2))
    weight = kernel * prob[:, None] * chunks.valid[:, None]
    total = weight.sum(2, keepdim=True) + 1e-8
    smoothed = (weight / total) @ u

    # The more certain the router, the more of a token's own value
    own_share = prob[:, :, None]
    return own_share * u + (1 - own_share) * smoothed


def nearest_kept(chunks: Chunks, grid: Grid) -> Tensor:
    """Which of its sample's M chunks is nearest to each cell, ties to the lowest raster index: -> (B, L)."""
    cells = cell_places(grid, chunks.index.device)  # (L, 2)
    chosen = cells[chunks.index]  # (B, M, 2)
    squared_distance = (cells[:, None] - chosen[:, None]).square().sum(-1)  # (B, L, M)
    # Padding is no candidate; argmin returns the first of equals
    squared_distance = squared_distance.masked_fill(~chunks.valid[:, None], float("inf"))
    return squared_distance.argmin(2)


def cell_places(grid: Grid, device: torch.device) -> Tensor:
    """Row and column of each cell: (L, 2)."""
    cell = torch.arange(grid.cells, device=device)
    return torch.stack([cell // grid.columns, cell % grid.columns], dim=1).float()
