"""Keep mask -> packed tokens and back. No padding exists anywhere between the two."""

import torch
from torch import Tensor

from models.types import Packing

PIECES = 16  # of a sample: its tokens' sum on a GPU is that of so many sums, else one thread would go through all of them


def plan_packing(keep: Tensor, lengths: int | list[int] | None = None) -> Packing:
    """Turn a keep mask (B, L) bool into a Packing; every sample must keep a token.

    Reading the B lengths is the only host synchronisation of a forward pass, and where they are given (a token budget: one
    number, or one per sample) there is none: with T known, the indices come from a running count and a scatter.
    """
    batch, tokens = keep.shape
    counts = keep.sum(1)
    if lengths is None:
        lengths = counts.tolist()
    elif isinstance(lengths, int):
        lengths = [lengths] * batch
    total = sum(lengths)
    flat = keep.flatten()
    slot = torch.where(
        flat, flat.cumsum(0) - 1, total
    )  # tokens that are not kept share the spare slot at the end
    source = torch.arange(batch * tokens, device=keep.device)
    index = source.new_empty(total + 1).scatter_(0, slot, source)[:total]
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=keep.device)
    cu_seqlens[1:] = counts.cumsum(0)
    return Packing(index, index // tokens, cu_seqlens, cut_up(cu_seqlens), torch.tensor(lengths), tokens)


def full_packing(batch: int, tokens: int, device: torch.device) -> Packing:
    """The Packing of samples that keep every token."""
    index = torch.arange(batch * tokens, device=device)
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens
    return Packing(
        index, index // tokens, cu_seqlens, cut_up(cu_seqlens), torch.full((batch,), tokens), tokens
    )


def cut_up(cu_seqlens: Tensor) -> Tensor:
    """First token of each piece of each sample: (B + 1,) -> (B * PIECES + 1,). A piece may be empty."""
    share = torch.arange(PIECES, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    start = cu_seqlens[:-1, None] + cu_seqlens.diff()[:, None] * share // PIECES
    return torch.cat([start.flatten(), cu_seqlens[-1:]])


def pack(x: Tensor, packing: Packing) -> Tensor:
    """(B, L, D) -> (T, D)."""
    return x.flatten(0, 1).index_select(0, packing.index)


def unpack(tokens: Tensor, packing: Packing, length: int) -> Tensor:
    """(T, D) -> (B, L, D) with zeros at the tokens that were not kept."""
    batch = len(packing.lengths)
    grid = tokens.new_zeros(batch * length, tokens.shape[1]).index_copy_(0, packing.index, tokens)
    return grid.view(batch, length, -1)
