"""The shape legend of the package.

B batch, S latent side, L = S * S tokens in raster order (index = row * S + column), C latent channels, E width of the
convolutions, D model width, T = kept tokens of the whole batch. A static DiT has L = (S / P)^2 patches for tokens.
"""

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """What the router decided for every token."""

    prob: Tensor  # (B, L) boundary probability p, float32 unless fp32_scaffold is off; 1 at the first and last token
    natural: Tensor  # (B, L) bool, p > 0.5: the network's own decision
    keep: Tensor  # (B, L) bool, what is kept: a subset of natural under tail dropping, any K tokens under a token budget


class Packing(NamedTuple):
    """Where each kept token comes from: samples one after another, tokens in raster order, no padding."""

    index: Tensor  # (T,) int64, row of the flattened (B * L) tokens
    sample: Tensor  # (T,) int64, which sample a token belongs to
    cu_seqlens: Tensor  # (B + 1,) int32, first token of each sample; the last entry is T
    pieces: Tensor  # (B * PIECES + 1,) int32, the same with every sample cut up, so that its sum is taken in parallel
    lengths: Tensor  # (B,) int64, kept-token counts, on the host
    limit: int  # no sample has more tokens: L


class DenoiserOutput(NamedTuple):
    """What a denoiser returns."""

    prediction: Tensor  # (B, C or 2C, S, S): epsilon, then the variance logits
    routing: Routing  # of a static DiT: every token is kept
