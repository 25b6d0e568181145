"""The values that travel between the parts of a network, and the legend of their shapes.

B batch, (S, S) rows and columns of the latent, which are equal in square images only, L = rows * columns tokens in
raster order (index = row * columns + column), C latent channels, E width of the convolutions, D model width, T kept
tokens of the whole batch, K tokens that a budget keeps. A static DiT has a token per patch of P x P cells.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch.export
from torch import Tensor

from grid import Grid


@dataclass(frozen=True)
class Architecture:
    """All that a network is built from, a DCDiT or a DiT."""

    latent_grid: Grid  # rows and columns of latent cells
    latent_channels: int  # C
    num_classes: int  # label `num_classes` is the null label, if there is one
    has_null_label: bool  # whether labels were dropped in training, which guidance needs
    main_blocks: str  # a letter per transformer block: D attention and MLP, d attention only
    width: int  # D
    heads: int
    mlp_ratio: float  # hidden width of an MLP / D
    learn_sigma: bool  # predict variance logits beside epsilon or velocity
    timestep_divisor: int  # frequency k of the timestep is 10000^(-k / divisor)
    attention: str  # "auto" or a kernel of models/attention.py
    init: str  # "adaln_zero" or "released", see `init_weights` in models/dc_dit.py
    gradient_checkpointing: bool  # recompute the transformer blocks in the backward pass
    patch: int | None  # P of a static DiT; None: a DC-DiT

    conditions: tuple[tuple[str, str], ...]  # beside the class: name and kind, see models/embeddings.py

    # A DC-DiT only
    encoder_blocks: int
    decoder_blocks: int
    conv_width: int  # E
    router: str  # a name in models/router.py
    downsample_factor: float  # N: a router that learns nothing keeps 1 token in N
    min_tokens: int | None  # tokens that every image keeps at least, unless a budget says their number
    smoothing_sigma: float  # standard deviation of the dechunk smoothing, in latent cells; 0: none
    has_residual: bool  # whether the decoder also gets a projection of the encoder's output
    fp32_chunking: bool  # router, residual projection and dechunk in float32 under autocast too

    @property
    def is_static(self) -> bool:
        """Whether the network is a static DiT, which has no router."""
        return self.patch is not None

    @property
    def token_grid(self) -> Grid:
        """Rows and columns of all tokens of an image, kept or not."""
        return self.latent_grid.coarsen(self.patch or 1)

    @property
    def tokens(self) -> int:
        """L: all tokens of an image, kept or not."""
        return self.token_grid.cells

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: epsilon or velocity, then the variance logits."""
        return 2 * self.latent_channels if self.learn_sigma else self.latent_channels


class Routing(NamedTuple):
    """What the router decided for every token."""

    # (B, L) boundary probability p, float32 unless fp32_chunking is off; 1 at the first and last token
    prob: Tensor
    boundary: Tensor  # (B, L) bool, p > 0.5: the network's own decision
    # (B, L) bool: tokens that enter the transformer. Without a budget these are the boundary tokens; tail
    # dropping takes some of them away, and a token budget keeps the K most probable tokens
    keep: Tensor


class Packing(NamedTuple):
    """Where each kept token comes from: samples one after another, tokens in raster order, no padding."""

    token_index: Tensor  # (T,) int64, index into the flattened (B * L) tokens
    sample: Tensor  # (T,) int64, which sample a token belongs to
    cu_seqlens: Tensor  # (B + 1,) int32, first token of each sample; the last entry is T
    # (B * PIECES + 1,) int32, first token of each of PIECES (models/packing.py) nearly equal parts of each sample.
    # A sum over a sample adds the sums of its pieces
    pieces: Tensor
    lengths: Tensor  # (B,) int64, kept-token counts, on the host
    max_length: int  # L: the bound on the length of a sample that is known without asking the device


@dataclass(frozen=True)
class DenoiserOutput:
    """What a denoiser returns. Its parts have names only, so that a new one breaks no caller."""

    prediction: Tensor  # (B, C or 2C, S, S): epsilon or velocity, then the variance logits
    routing: Routing  # of a static DiT: every token is kept
    packing: Packing  # of the tokens in the transformer
    # Tokens (T, D) after each transformer block that the caller asked for, by the block's index, 0 the first
    hidden: dict[int, Tensor] = field(default_factory=dict)


# FSDP looks for tensors inside what a network returns; older versions of PyTorch find them only in known containers
torch.export.register_dataclass(DenoiserOutput)
