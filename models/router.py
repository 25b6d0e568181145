"""Routers: which tokens are chunk boundaries, and in which order a budget drops them. `ROUTERS` names them all.

A router gives every token two numbers. `prob` decides: above 1/2 the token is kept, and dechunk weighs the
token's own value against the smoothed one by it. `order` is the importance, by which budgets drop tokens.
`learned` is the paper's router. `hnet` compares neighbours, as H-Net does. The others learn nothing: they show
what choosing tokens well is worth.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grid import Grid
from models.conv import Conv1x1, Conv3x3, GroupNorm, to_tokens
from models.ops.norm_silu import norm_silu
from models.tail_drop import drop_tail, force_ends, keep_top
from models.types import Routing

INITIAL_BIAS = -1.1  # sigmoid(-1.1) is about 0.25

# Mean and standard deviation of silu of a standard normal
SILU_MEAN = 0.2066
SILU_STD = 0.5596

# splitmix64's constants 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB as signed numbers
STEP = -7046029254386353131
FIRST_MIX = -4658895280553007687
SECOND_MIX = -7723592293110705685


class Scores(NamedTuple):
    """What a router thinks of every token."""

    prob: Tensor  # (B, L) boundary probability; above 1/2 the token is a boundary
    order: Tensor  # (B, L) in [0, 1], importance: budgets drop the lowest


class Router(nn.Module):
    """Encoder output (B, D, S, S) -> Routing over its L tokens. A subclass defines `score` and `flops`.

    `start` and `balance` are optional. docs/extending.md lists what else a new router needs.

    Args:
        width: D.
        factor: N; a router that learns nothing keeps 1 token in N.
    """

    # Whether training can change what it keeps; if not, there is no ratio loss
    is_learned = True
    # Whether `score` uses `draw`
    is_random = False
    # Every sample keeps at least this many tokens, the most important by `order`; `forward`'s `tokens` overrides it
    min_tokens: int | None = None

    def __init__(self, width: int, factor: float):
        super().__init__()
        self.factor = factor

    def score(self, features: Tensor, draw: Tensor) -> Scores:
        """Score every token. features: (B, D, S, S). draw: (B,) int64, the seed of each sample's draw."""
        raise NotImplementedError

    @staticmethod
    def flops(cells: int, width: int) -> float:
        """FLOPs per image, 2 per multiply-add."""
        raise NotImplementedError

    def start(self) -> None:
        """Set the first weights that should differ from PyTorch's and from those of `init_transformer`."""

    def balance(self, factor: float) -> list[str]:
        """Make it keep about 1 token in `factor` from the first step on. Returns the names of changed weights."""
        return []

    def forward(
        self,
        features: Tensor,
        drop: Tensor | float | None = None,
        tokens: int | list[int] | None = None,
        draw: Tensor | None = None,
    ) -> Routing:
        """Score every token and decide which are kept.

        Args:
            features: (B, D, S, S).
            drop: fraction of the boundary tokens to drop, in [0, 1): one number, one per sample (B,), or None.
            tokens: keep exactly this number instead, in [2, L]: one number, one per sample, or None.
            draw: (B,) int64, the seeds of a random router; None: 0 to B - 1.
        """
        if draw is None:
            draw = torch.arange(len(features), device=features.device)
        prob, order = self.score(features, draw)
        prob = force_ends(prob)

        # The router's own decision, as an argmax over (1 - p, p) takes it
        boundary = prob > 1 - prob

        # A budget changes which tokens are kept, not which are boundaries
        if tokens is not None:
            keep = keep_top(order, tokens)
        elif drop is not None:
            keep = drop_tail(order, boundary, drop)
        else:
            keep = boundary
        if self.min_tokens is not None and tokens is None:
            keep = keep | keep_top(order, self.min_tokens)
        return Routing(prob, boundary, keep)


class LearnedRouter(Router):
    """The error with which its surroundings predict a token, scored by a small network (DC-DiT, section 3)."""

    def __init__(self, width: int, factor: float):
        super().__init__(width, factor)
        inner = width // 4
        self.proj = Conv1x1(width, inner)
        self.context_predictor = Conv3x3(inner, inner)
        self.residual_scorer = nn.Sequential(
            Conv3x3(inner, inner), GroupNorm(8, inner), nn.SiLU(), Conv1x1(inner, 1)
        )

    def score(self, features: Tensor, draw: Tensor) -> Scores:
        z = self.proj(features)  # (B, D / 4, S, S)
        surprise = z - self.context_predictor(z)
        prob = to_tokens(self.logits(surprise)).squeeze(2).sigmoid()  # (B, L)
        return Scores(prob, prob)

    @staticmethod
    def flops(cells: int, width: int) -> float:
        inner = width // 4
        projection = width * inner
        context_and_scorer = 2 * 9 * inner * inner
        return 2 * cells * (projection + context_and_scorer + inner)

    @torch.no_grad()
    def start(self) -> None:
        """Set the last bias such that the mean probability starts near 1/4.

        That is below 1/2, so at first almost no token is a boundary, until the ratio loss raises the probabilities.
        """
        nn.init.constant_(self.residual_scorer.get_parameter("3.bias"), INITIAL_BIAS)

    @torch.no_grad()
    def balance(self, factor: float) -> list[str]:
        """Choose the last bias so that about 1 token in `factor` scores above one half, on any input.

        The last layer takes silu(GroupNorm(.)), about silu of standard normals, so mean and deviation of the
        score follow from the layer's weights.
        """
        # The score exceeds one half where the last layer's output exceeds 0
        weight = self.residual_scorer.get_parameter("3.weight")
        quantile = NormalDist().inv_cdf(1 - 1 / factor)
        bias = -(SILU_MEAN * weight.sum() + quantile * SILU_STD * weight.norm())
        self.residual_scorer.get_parameter("3.bias").copy_(bias)
        return ["residual_scorer.3.bias"]

    def logits(self, surprise: Tensor) -> Tensor:
        """(B, D / 4, S, S) -> logits (B, 1, S, S), by `residual_scorer`, whose norm and SiLU are one operation."""
        conv, norm, _, last_conv = self.residual_scorer
        assert isinstance(norm, nn.GroupNorm)
        return last_conv(norm_silu(conv(surprise), norm))


class HNetRouter(Router):
    """How little a token resembles its neighbours (H-Net, arXiv 2507.07955, equation 4, on a grid).

    p = (1 - mean cosine similarity of q and the four neighbours' k) / 2.
    """

    def __init__(self, width: int, factor: float):
        super().__init__(width, factor)
        self.query = nn.Conv2d(width, width, 1, bias=False)
        self.key = nn.Conv2d(width, width, 1, bias=False)

    def score(self, features: Tensor, draw: Tensor) -> Scores:
        query = F.normalize(self.query(features), dim=1)
        key = F.normalize(self.key(features), dim=1)
        # The mean over the neighbours that there are: two in a corner, three at an edge
        similarity = (query * neighbour_sum(key)).sum(1)  # (B, S, S)
        neighbours = neighbour_sum(torch.ones_like(similarity[:, None]))[:, 0]
        prob = (1 - similarity / neighbours).flatten(1) / 2
        prob = prob.clamp(0, 1)
        return Scores(prob, prob)

    @staticmethod
    def flops(cells: int, width: int) -> float:
        return 2 * cells * (2 * width * width + width)

    @torch.no_grad()
    def start(self) -> None:
        """Start with the features themselves as queries and keys, as H-Net does."""
        for conv in (self.query, self.key):
            nn.init.eye_(conv.weight[:, :, 0, 0])


class ControlRouter(Router):
    """Keeps the 1 token in N of the highest `importance`; nothing is learned.

    The probability is 1 at these tokens and 0 elsewhere, so dechunk hardly smooths them.
    """

    is_learned = False

    def importance(self, features: Tensor, draw: Tensor) -> Tensor:
        """(B, L) in [0, 1]."""
        raise NotImplementedError

    @torch.no_grad()
    def score(self, features: Tensor, draw: Tensor) -> Scores:
        order = self.importance(features, draw)
        length = order.shape[1]
        kept = max(2, round(length / self.factor))
        return Scores(keep_top(order, kept).to(features.dtype), order)

    @staticmethod
    def flops(cells: int, width: int) -> float:
        return 0.0


class UniformRouter(ControlRouter):
    """A regular grid, the same in every image; at N = 4 one token in every 2 x 2 cells. Budgets thin it evenly."""

    def importance(self, features: Tensor, draw: Tensor) -> Tensor:
        rows, columns = features.shape[2:]
        ranks = ordered_dither(Grid(rows, columns), features.device)
        return 1 - ranks.flatten().expand(len(features), -1)


class RandomRouter(ControlRouter):
    """Another draw for every sample and timestep."""

    is_random = True

    def importance(self, features: Tensor, draw: Tensor) -> Tensor:
        cells = torch.arange(features.shape[2] * features.shape[3], device=features.device)
        return hash_to_unit(draw[:, None], cells)


class ContrastRouter(ControlRouter):
    """The tokens that differ most from the mean of their 3 x 3 surroundings, which no weights decide."""

    def importance(self, features: Tensor, draw: Tensor) -> Tensor:
        surroundings = F.avg_pool2d(features, 3, stride=1, padding=1, count_include_pad=False)
        contrast = (features - surroundings).square().mean(1).flatten(1)
        return contrast / (1 + contrast)

    @staticmethod
    def flops(cells: int, width: int) -> float:
        return 2 * cells * width


# The names of `model.router`. config_keys.py lists them too, and in CONTROL_ROUTERS those that learn nothing
ROUTERS: dict[str, type[Router]] = {
    "learned": LearnedRouter,
    "hnet": HNetRouter,
    "uniform": UniformRouter,
    "random": RandomRouter,
    "contrast": ContrastRouter,
}


def neighbour_sum(x: Tensor) -> Tensor:
    """The sum over the four neighbours of each cell that exist: (B, C, S, S) -> (B, C, S, S)."""
    padded = F.pad(x, (1, 1, 1, 1))
    above = padded[..., :-2, 1:-1]
    below = padded[..., 2:, 1:-1]
    left = padded[..., 1:-1, :-2]
    right = padded[..., 1:-1, 2:]
    return above + below + left + right


def ordered_dither(grid: Grid, device: torch.device) -> Tensor:
    """Ranks of the cells of a grid in [0, 1): (rows, columns). The first cells by rank lie evenly, for any count.

    The ranks are Bayer's ordered-dither matrix, cut to the grid: each level takes one more cell of every 2 x 2.
    """
    levels = max(1, math.ceil(math.log2(max(grid))))
    corner = torch.tensor([[0.0, 2.0], [3.0, 1.0]], device=device)
    ranks = torch.zeros(1, 1, device=device)
    for _ in range(levels):
        repeated = torch.kron(torch.ones_like(corner), 4 * ranks)
        quadrant = torch.kron(corner, torch.ones_like(ranks))
        ranks = repeated + quadrant
    return ranks[: grid.rows, : grid.columns] / 4**levels


def hash_to_unit(seed: Tensor, position: Tensor) -> Tensor:
    """A number in [0, 1) for every pair of int64 numbers, by integer arithmetic that is equal on every device.

    The mixing steps are those of splitmix64, by Steele, Lea and Flood (2014).
    """
    x = seed * STEP + position * FIRST_MIX
    x = (x ^ shift_right(x, 30)) * FIRST_MIX
    x = (x ^ shift_right(x, 27)) * SECOND_MIX
    x = x ^ shift_right(x, 31)
    return shift_right(x, 40).float() / 2**24  # the upper 24 bits


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 numbers to the right and fill with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
