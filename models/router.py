"""The router: a boundary probability for every token, the keep decision, and the elastic budget.

A token's score is computed from the error with which its surroundings predict its features (DC-DiT, section 3).
"""

import itertools

import torch
from torch import Tensor, nn

from models.conv import Conv1x1, Conv3x3, GroupNorm, to_tokens
from models.types import Routing

INITIAL_BIAS = -1.1  # sigmoid(-1.1) is about 0.25

# Sort keys above every probability: the ends, which always stay, and tokens that are no boundaries, which tail
# dropping does not count.
END_KEY = 2.0
NO_CANDIDATE_KEY = 3.0


class Router(nn.Module):
    """Encoder output (B, D, S, S) -> Routing over its L tokens."""

    def __init__(self, width: int):
        super().__init__()
        inner = width // 4
        self.proj = Conv1x1(width, inner)
        self.context_predictor = Conv3x3(inner, inner)
        self.residual_scorer = nn.Sequential(
            Conv3x3(inner, inner), GroupNorm(8, inner), nn.SiLU(), Conv1x1(inner, 1)
        )

    @torch.no_grad()
    def start(self) -> None:
        """Set the last bias such that the mean probability starts near 1/4.

        That is below 1/2, so at first almost no token is a boundary, until the ratio loss raises the probabilities.
        """
        nn.init.constant_(self.residual_scorer.get_parameter("3.bias"), INITIAL_BIAS)

    def forward(
        self, features: Tensor, drop: Tensor | float | None = None, tokens: int | list[int] | None = None
    ) -> Routing:
        """Score every token and decide which are kept.

        Args:
            features: (B, D, S, S).
            drop: fraction of the boundary tokens to drop, in [0, 1): one number, one per sample (B,), or None.
            tokens: keep exactly this number instead, in [2, L]: one number, one per sample, or None.
        """
        # The score of a token follows from how badly its surroundings predict it
        z = self.proj(features)  # (B, D / 4, S, S)
        surprise = z - self.context_predictor(z)
        score = to_tokens(self.residual_scorer(surprise)).squeeze(2)  # (B, L)
        prob = force_ends(score.sigmoid())

        # Without a budget every boundary token is kept
        boundary = prob > 1 - prob
        if tokens is not None:
            keep = keep_top(prob, tokens)
        elif drop is not None:
            keep = drop_tail(prob, boundary, drop)
        else:
            keep = boundary
        return Routing(prob, boundary, keep)


def force_ends(prob: Tensor) -> Tensor:
    """Set the first and last token's probability to 1, so that no sample is empty; no gradient flows there."""
    return prob.masked_fill(_ends(prob), 1.0)


def drop_tail(prob: Tensor, boundary: Tensor, drop: Tensor | float) -> Tensor:
    """Drop the least probable share of each sample's boundary tokens (DC-DiT, elastic inference).

    Args:
        prob, boundary: (B, L).
        drop: fraction in [0, 1), one number or one per sample (B,).

    Returns:
        (B, L) bool. trunc(count * drop) tokens are dropped, in float32 like in the official code. Of equal
        probabilities the lowest raster index is dropped first; the first and last token always stay.
    """
    # Made on the device, because a copy from the host would make the host wait
    if not isinstance(drop, Tensor):
        drop = torch.full((), drop, device=prob.device)

    count = boundary.sum(1)
    dropped = (count.float() * drop.float()).long()
    dropped = torch.minimum(dropped, count - 2)  # (B,)
    key = prob.detach().masked_fill(~boundary, NO_CANDIDATE_KEY)
    return boundary & (_rank(key) >= dropped[:, None])


def keep_top(prob: Tensor, tokens: int | list[int]) -> Tensor:
    """Keep exactly this number of tokens: the most probable ones, with the first and last token among them.

    Below the number of boundary tokens this equals `drop_tail` with the same count; above it, tokens with a
    probability under one half stay too. The counts are numbers on the host, so all shapes that follow are
    known in advance.

    Args:
        prob: (B, L).
        tokens: K in [2, L], one number or one per sample.

    Returns:
        (B, L) bool. Of equal probabilities the highest raster index is kept first, like in `drop_tail`.
    """
    length = prob.shape[1]
    kept = tokens if isinstance(tokens, int) else fill_on_device(tokens, prob.device)[:, None]
    return _rank(prob.detach()) >= length - kept


def fill_on_device(numbers: list[int], device: torch.device) -> Tensor:
    """Numbers of the host as a tensor, made by a `full` per run of equal ones.

    A copy from the host could not be part of a CUDA graph.
    """
    runs = []
    for number, equal in itertools.groupby(numbers):
        length = len(list(equal))
        runs.append(torch.full((length,), number, device=device))
    return torch.cat(runs)


def _ends(prob: Tensor) -> Tensor:
    """(B, L) bool: the first and last token of each sample."""
    ends = torch.zeros_like(prob, dtype=torch.bool)
    ends[:, 0] = True
    ends[:, -1] = True
    return ends


def _rank(key: Tensor) -> Tensor:
    """Place of each token in its sample by ascending key, lower raster index first: (B, L) -> (B, L) int64.

    The ends come after all probabilities and before tokens that are no candidates.
    """
    key = key.masked_fill(_ends(key), END_KEY)
    order = key.argsort(dim=1, stable=True)
    places = torch.arange(key.shape[1], device=key.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
