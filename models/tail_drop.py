"""Token budgets: which of a sample's tokens stay, by an order of importance (DC-DiT, elastic inference).

Every function takes scores (B, L), of which the highest are the most important. The first and last token always
stay, so that no sample is empty.
"""

import itertools

import torch
from torch import Tensor

# Sort keys above every score in [0, 1]: the ends, which always stay, and tokens that are no boundaries, which tail
# dropping does not count.
END_KEY = 2.0
NO_CANDIDATE_KEY = 3.0


def force_ends(prob: Tensor) -> Tensor:
    """Set the first and last token's probability to 1, so that no sample is empty; no gradient flows there."""
    return prob.masked_fill(_ends(prob), 1.0)


def drop_tail(score: Tensor, boundary: Tensor, drop: Tensor | float) -> Tensor:
    """Drop the lowest share of each sample's boundary tokens (DC-DiT, elastic inference).

    Args:
        score: (B, L) in [0, 1]. boundary: (B, L) bool.
        drop: fraction in [0, 1), one number or one per sample (B,).

    Returns:
        (B, L) bool. trunc(count * drop) tokens are dropped, in float32 like in the official code. Of equal
        scores the lowest raster index is dropped first; the first and last token always stay.
    """
    # Made on the device, because a copy from the host would make the host wait
    if not isinstance(drop, Tensor):
        drop = torch.full((), drop, device=score.device)

    count = boundary.sum(1)
    dropped = (count.float() * drop.float()).long()
    dropped = torch.minimum(dropped, count - 2)  # (B,)
    key = score.detach().masked_fill(~boundary, NO_CANDIDATE_KEY)
    return boundary & (_rank(key) >= dropped[:, None])


def keep_top(score: Tensor, tokens: int | list[int]) -> Tensor:
    """Keep exactly this number of tokens: the highest scores, with the first and last token among them.

    Below the number of boundary tokens this equals `drop_tail` with the same count; above it, tokens that are no
    boundaries stay too. The counts are numbers on the host, so all shapes that follow are known in advance.

    Args:
        score: (B, L) in [0, 1].
        tokens: K in [2, L], one number or one per sample.

    Returns:
        (B, L) bool. Of equal scores the highest raster index is kept first, like in `drop_tail`.
    """
    length = score.shape[1]
    kept = tokens if isinstance(tokens, int) else fill_on_device(tokens, score.device)[:, None]
    return _rank(score.detach()) >= length - kept


def fill_on_device(numbers: list[int], device: torch.device) -> Tensor:
    """Numbers of the host as a tensor, made by a `full` per run of equal ones.

    A copy from the host could not be part of a CUDA graph.
    """
    runs = []
    for number, equal in itertools.groupby(numbers):
        length = len(list(equal))
        runs.append(torch.full((length,), number, device=device))
    return torch.cat(runs)


def _ends(score: Tensor) -> Tensor:
    """(B, L) bool: the first and last token of each sample."""
    ends = torch.zeros_like(score, dtype=torch.bool)
    ends[:, 0] = True
    ends[:, -1] = True
    return ends


def _rank(key: Tensor) -> Tensor:
    """Place of each token in its sample by ascending key, lower raster index first: (B, L) -> (B, L) int64.

    The ends come after all scores and before tokens that are no candidates.
    """
    key = key.masked_fill(_ends(key), END_KEY)
    order = key.argsort(dim=1, stable=True)
    places = torch.arange(key.shape[1], device=key.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
