"""Keep mask -> packed tokens and back. No padding exists anywhere between the two."""

import torch
from torch import Tensor

from models.types import Packing

# Sums over a sample (`per_sample` in models/ops/rows.py) are split into this many pieces; as one piece, a
# single GPU thread would do all the work.
PIECES = 16


def plan_packing(keep: Tensor, lengths: int | list[int] | None = None) -> Packing:
    """Turn a keep mask (B, L) bool into a Packing; every sample must keep a token.

    Args:
        lengths: kept tokens per sample if they are known (a token budget), one number for all or a list. None:
            they are read from the device, which is the only host synchronisation of a forward pass.
    """
    batch, tokens = keep.shape
    counts = keep.sum(1)
    if lengths is None:
        lengths = counts.tolist()
    elif isinstance(lengths, int):
        lengths = [lengths] * batch
    total = sum(lengths)

    # Scatter each kept token's row to its slot; all other tokens share the spare slot at the end.
    # Unlike `nonzero`, this does not wait for the device.
    flat = keep.flatten()
    slot = torch.where(flat, flat.cumsum(0) - 1, total)
    row = torch.arange(batch * tokens, device=keep.device)
    index = row.new_empty(total + 1).scatter_(0, slot, row)[:total]

    # Where each sample starts
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=keep.device)
    cu_seqlens[1:] = counts.cumsum(0)
    return Packing(index, index // tokens, cu_seqlens, cut_pieces(cu_seqlens), torch.tensor(lengths), tokens)


def full_packing(batch: int, tokens: int, device: torch.device) -> Packing:
    """The Packing of samples that keep every token."""
    index = torch.arange(batch * tokens, device=device)
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens
    lengths = torch.full((batch,), tokens)
    return Packing(index, index // tokens, cu_seqlens, cut_pieces(cu_seqlens), lengths, tokens)


def cut_pieces(cu_seqlens: Tensor) -> Tensor:
    """First token of each piece of each sample: (B + 1,) -> (B * PIECES + 1,). A piece may be empty."""
    piece = torch.arange(PIECES, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    first = cu_seqlens[:-1, None]
    length = cu_seqlens.diff()[:, None]
    starts = first + length * piece // PIECES  # (B, PIECES)
    return torch.cat([starts.flatten(), cu_seqlens[-1:]])


def pack(x: Tensor, packing: Packing) -> Tensor:
    """(B, L, D) -> (T, D)."""
    return x.flatten(0, 1).index_select(0, packing.token_index)


def unpack(tokens: Tensor, packing: Packing, length: int) -> Tensor:
    """(T, D) -> (B, L, D) with zeros at the tokens that were not kept."""
    batch = len(packing.lengths)
    width = tokens.shape[1]
    grid = tokens.new_zeros(batch * length, width)
    grid.index_copy_(0, packing.token_index, tokens)
    return grid.view(batch, length, -1)
