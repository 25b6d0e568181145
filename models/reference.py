"""The textbook version of every stage, on the weights of a DCDiT: the yardstick for speed, and the oracle for numbers.

It computes what the official implementation computes in the way that comes to mind first: token-contiguous tensors with a
permutation around every convolution, a double argsort for the budget, padded chunks, modulators expanded to one row per token,
padded attention with a mask, a dense (B, M, M) Gaussian and a dense (B, L, M) search. M is the longest sample's kept tokens.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import KERNELS, pick_kernel
from models.blocks import DiTBlock
from models.conv import Conv3x3, ConvBlock, ConvStack
from models.dc_dit import DCDiT
from models.packing import plan_packing
from models.router import Router, force_ends
from models.types import DenoiserOutput, Packing, Routing


@dataclass
class Chunks:
    """Kept tokens of a batch as padded rows."""

    index: Tensor  # (B, M) raster indices; behind the kept ones those of other tokens
    valid: Tensor  # (B, M) bool
    counts: Tensor  # (B,)

    @functools.cached_property
    def packing(self) -> Packing:
        """For a kernel for packed tokens: planned once in a forward pass, and where there is such a kernel only."""
        return plan_packing(self.valid)


def forward(
    model: DCDiT, sigma: float, x_t: Tensor, t: Tensor, labels: Tensor, drop: Tensor | None = None, pin=None
) -> DenoiserOutput:
    """What `model(x_t, t, labels, drop)` computes; `sigma`: of its smoothing; `pin`: a function that exchanges the routing."""
    c = model.t_embedder(t) + model.y_embedder(labels)
    x = to_tokens(model.x_embedder(x_t))  # (B, L, E)
    features = conv_stack(model.encoder, x, c)  # (B, L, D)
    with torch.autocast(x_t.device.type, enabled=False):
        features = features.float()
        routing = router(model.router, features, drop)
        routing = pin(routing) if pin else routing
        residual = model.residual_proj(features)
    chunks = plan(routing)
    u = pack(features + model.pos_embed, chunks)  # (T, D)
    for one in model.blocks:
        u = block(one, u, c, chunks)
    u = model.norm(u)
    with torch.autocast(x_t.device.type, enabled=False):
        h = dechunk(u.float(), routing, chunks, sigma) + residual
    h = conv_stack(model.decoder, h, c)
    shift, scale = model.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=2)
    h = model.final_layer.linear(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)
    return DenoiserOutput(to_grid(h), routing)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, S, S) -> (B, L, C), contiguous."""
    return x.flatten(2).transpose(1, 2).contiguous()


def to_grid(x: Tensor) -> Tensor:
    """(B, L, C) -> (B, C, S, S), contiguous."""
    side = int(x.shape[1] ** 0.5)
    return x.transpose(1, 2).reshape(len(x), -1, side, side)


def conv_stack(stack: ConvStack, x: Tensor, c: Tensor) -> Tensor:
    """(B, L, in) -> (B, L, out)."""
    for one in stack.blocks:
        x = conv_block(one, x, c)
    return rms_norm(x, stack.norm.weight)


def conv_block(module: ConvBlock, x: Tensor, c: Tensor) -> Tensor:
    x = to_grid(x)
    h = conv3x3(module.conv1, F.silu(module.norm1(x)))
    h = h + module.cond_proj(c)[:, :, None, None]
    h = conv3x3(module.conv2, F.silu(module.norm2(h)))
    return to_tokens(h + module.skip_proj(x))


def conv3x3(module: Conv3x3, x: Tensor) -> Tensor:
    return F.conv2d(x, module.weight, module.bias, padding=1)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    full = x.float()
    return (full * torch.rsqrt(full.square().mean(-1, keepdim=True) + 1e-5) * weight).to(x.dtype)


def router(module: Router, features: Tensor, drop: Tensor | None) -> Routing:
    """(B, L, D) -> Routing."""
    z = module.proj(to_grid(features))
    first, *others = module.residual_scorer
    score = conv3x3(first, z - conv3x3(module.context_predictor, z))
    for layer in others:
        score = layer(score)
    prob = force_ends(score.flatten(1).sigmoid())
    natural = torch.stack([1 - prob, prob], dim=-1).argmax(-1) == 1
    if drop is None:
        return Routing(prob, natural, natural)
    key = prob.detach().masked_fill(~natural, float("inf"))
    key[:, 0] = key[:, -1] = 2.0
    rank = key.argsort(dim=1, stable=True).argsort(dim=1)
    dropped = torch.minimum((natural.sum(1).float() * drop).long(), natural.sum(1) - 2)
    return Routing(prob, natural, natural & (rank >= dropped[:, None]))


def plan(routing: Routing) -> Chunks:
    """Kept tokens first, in raster order."""
    counts = routing.keep.sum(1)
    place = torch.arange(routing.keep.shape[1], device=counts.device)
    order = torch.where(routing.keep, place, place + len(place)).argsort(1)
    longest = counts.max().item()
    return Chunks(order[:, :longest], place[:longest] < counts[:, None], counts)


def pack(x: Tensor, chunks: Chunks) -> Tensor:
    """(B, L, D) -> (T, D), through the padded (B, M, D)."""
    return x.gather(1, chunks.index[:, :, None].expand(-1, -1, x.shape[2]))[chunks.valid]


def unpack(tokens: Tensor, chunks: Chunks) -> Tensor:
    """(T, D) -> (B, M, D), zeros where nothing was kept."""
    padded = tokens.new_zeros(*chunks.valid.shape, tokens.shape[1])
    padded[chunks.valid] = tokens
    return padded


def block(module: DiTBlock, x: Tensor, c: Tensor, chunks: Chunks) -> Tensor:
    """(T, D) -> (T, D), with modulators (T, 6D)."""
    rows = module.adaLN_modulation(c).repeat_interleave(chunks.counts, dim=0)
    shift1, scale1, gate1, shift2, scale2, gate2 = rows.chunk(6, dim=1)
    x = x + gate1 * attention(module.attn, modulate(x, shift1, scale1), chunks)
    if module.mlp is None:
        return x
    hidden = F.gelu(module.mlp.fc1(modulate(x, shift2, scale2)), approximate="tanh")
    return x + gate2 * module.mlp.fc2(hidden)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def attention(module, x: Tensor, chunks: Chunks) -> Tensor:
    """Padded, with a mask over keys; where there is a kernel for packed tokens, that one, as in the official code."""
    qkv = module.qkv(x).view(len(x), 3, module.heads, -1)
    kernel = pick_kernel(qkv)
    if kernel != "sdpa":
        return module.proj(KERNELS[kernel](qkv, chunks.packing).flatten(1))
    q, k, v = (
        unpack(y.flatten(1), chunks).unflatten(2, (module.heads, -1)).transpose(1, 2) for y in qkv.unbind(1)
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=chunks.valid[:, None, None])
    return module.proj(out.transpose(1, 2).flatten(2)[chunks.valid])


def dechunk(tokens: Tensor, routing: Routing, chunks: Chunks, sigma: float) -> Tensor:
    """(T, D) -> (B, L, D)."""
    length = routing.prob.shape[1]
    side = int(length**0.5)
    cells = torch.arange(length, device=tokens.device)
    grid = torch.stack([cells // side, cells % side], dim=1).float()  # (L, 2)
    place = grid[chunks.index]  # (B, M, 2)
    prob = routing.prob.gather(1, chunks.index).clamp(1e-4, 1 - 1e-4)  # (B, M)
    u = unpack(tokens, chunks)
    squared = (place[:, :, None] - place[:, None]).square().sum(-1)  # (B, M, M)
    weight = torch.exp(-squared / (2 * sigma**2)) * prob[:, None] * chunks.valid[:, None]
    smooth = (weight / (weight.sum(2, keepdim=True) + 1e-8)) @ u
    mixed = prob[:, :, None] * u + (1 - prob[:, :, None]) * smooth
    far = (grid[:, None] - place[:, None]).square().sum(-1)  # (B, L, M)
    nearest = far.masked_fill(~chunks.valid[:, None], float("inf")).argmin(2)  # (B, L)
    plugged = mixed.gather(1, nearest[:, :, None].expand(-1, -1, mixed.shape[2]))
    selected = torch.where(routing.boundary, routing.prob, 1 - routing.prob)
    return plugged * (selected + (1 - selected).detach())[:, :, None]
