"""The router: a boundary probability for every token, the keep decision, and the elastic budget.

A token is a boundary where the encoder's features are hard to predict from their surroundings (DC-DiT, section 3).
"""

import itertools

import torch
from torch import Tensor, nn

from models.conv import Conv3x3, to_tokens
from models.types import Routing

INITIAL_BIAS = -1.1  # sigmoid(-1.1) is about 0.25: the scores start near the usual target


class Router(nn.Module):
    """Encoder output (B, D, S, S) -> Routing over its L tokens."""

    def __init__(self, width: int):
        super().__init__()
        inner = width // 4
        self.proj = nn.Conv2d(width, inner, 1)
        self.context_predictor = Conv3x3(inner, inner)
        self.residual_scorer = nn.Sequential(
            Conv3x3(inner, inner), nn.GroupNorm(8, inner), nn.SiLU(), nn.Conv2d(inner, 1, 1)
        )

    def forward(
        self, features: Tensor, drop: Tensor | float | None = None, tokens: int | list[int] | None = None
    ) -> Routing:
        z = self.proj(features)
        surprise = z - self.context_predictor(z)
        score = to_tokens(self.residual_scorer(surprise)).squeeze(2)  # (B, L)
        prob = force_ends(score.sigmoid())
        natural = prob > 1 - prob
        if tokens is not None:
            return Routing(prob, natural, keep_top(prob, tokens))
        return Routing(prob, natural, natural if drop is None else drop_tail(prob, natural, drop))


def force_ends(prob: Tensor) -> Tensor:
    """Set the first and last token's probability to 1, so that no sample is ever empty; no gradient flows there."""
    ends = torch.zeros_like(prob, dtype=torch.bool)
    ends[:, 0] = ends[:, -1] = True
    return prob.masked_fill(ends, 1.0)


def drop_tail(prob: Tensor, natural: Tensor, drop: Tensor | float) -> Tensor:
    """Drop the least probable share of each sample's naturally kept tokens (DC-DiT, elastic inference).

    Args:
        prob, natural: (B, L).
        drop: fraction in [0, 1), one number or one per sample (B,).

    Returns:
        (B, L) bool. trunc(count * drop) tokens are dropped, in float32 as the official code does; equal probabilities go
        lowest raster index first; the first and last token stay.
    """
    if not isinstance(drop, Tensor):
        drop = torch.full(
            (), drop, device=prob.device
        )  # written by the device: a copy from the host would wait for it
    count = natural.sum(1)
    dropped = torch.minimum((count.float() * drop.float()).long(), count - 2)  # the two ends stay
    key = prob.detach().masked_fill(~natural, 3.0)  # above every candidate
    return natural & (_rank(key) >= dropped[:, None])


def keep_top(prob: Tensor, tokens: int | list[int]) -> Tensor:
    """Keep exactly so many tokens: the most probable ones, the first and last token always among them.

    Where that is fewer than the router would keep, it is `drop_tail` with the same count; where it is more, tokens that the
    router scored below one half stay too. The counts are numbers of the host, so the shapes that follow are known in advance.

    Args:
        prob: (B, L).
        tokens: K in [2, L], one number or one per sample.

    Returns:
        (B, L) bool. Of equal probabilities those with the highest raster index stay, as in `drop_tail`.
    """
    length = prob.shape[1]
    if isinstance(tokens, list):
        tokens = written_by_device(tokens, prob.device)[:, None]
    return _rank(prob.detach().clone()) >= length - tokens


def written_by_device(numbers: list[int], device: torch.device) -> Tensor:
    """Numbers of the host as a tensor, filled in by runs of equal ones: a copy could not be part of a CUDA graph."""
    runs = [(len(list(run)), number) for number, run in itertools.groupby(numbers)]
    return torch.cat([torch.full((length,), number, device=device) for length, number in runs])


def _rank(key: Tensor) -> Tensor:
    """Place of each token in its sample by ascending key, lower raster index first; the ends come after all probabilities.

    Changes key (B, L), whose ends are set to 2: above every probability, below the mark of tokens that are no candidates.
    """
    key[:, 0] = key[:, -1] = 2.0
    order = key.argsort(dim=1, stable=True)
    places = torch.arange(key.shape[1], device=key.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
