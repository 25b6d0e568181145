"""The loss as a pure function of what the model returned."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from models.types import Routing


class RatioTarget(NamedTuple):
    """What the ratio loss pulls the router towards in one step."""

    weight: float  # of the ratio loss in the total; 0 leaves it out
    downsample_factor: float  # N: keep 1 token in N
    group_size: int | None = None  # samples over which the shares are averaged; None: the whole batch


def total_loss(terms: dict[str, Tensor], routing: Routing, target: RatioTarget) -> dict[str, Tensor]:
    """Combine the loss terms of a micro-batch (DC-DiT, training objective).

    Args:
        terms: per sample (B,), from `diffusion.losses`.
        routing: of the same batch.
        target: of the ratio loss.

    Returns:
        "loss": the scalar to train on. Then its parts: the terms and their sum "diffusion_loss" (B,), and the
        scalar "ratio_loss" if it has a weight.
    """
    diffusion_loss = functools.reduce(torch.add, terms.values())  # (B,)
    losses = {"loss": diffusion_loss.mean(), **terms, "diffusion_loss": diffusion_loss}
    if target.weight > 0:
        ratio = ratio_loss(routing, target.downsample_factor, target.group_size)
        losses["loss"] = losses["loss"] + target.weight * ratio
        losses["ratio_loss"] = ratio
    return losses


def ratio_loss(routing: Routing, downsample_factor: float, group_size: int | None = None) -> Tensor:
    """Push the kept share towards 1 in `downsample_factor` (H-Net, arXiv 2507.07955, equation 10).

    Args:
        routing: of a batch of B samples; the decision before tail dropping counts.
        downsample_factor: N > 1.
        group_size: samples over which the shares are averaged before the loss; divides B. None: all of them.

    Returns:
        Scalar: N / (N - 1) * ((N - 1) F G + (1 - F)(1 - G)), F the kept share and G the mean probability of a
        group, averaged over groups. It is 1 when both are 1 / N, and can be below 1 elsewhere.
    """
    n = downsample_factor
    groups = 1 if group_size is None else len(routing.prob) // group_size
    # F and G of each group (groups,)
    kept = routing.boundary.float().view(groups, -1).mean(1)
    prob = routing.prob.float().view(groups, -1).mean(1)
    return (n / (n - 1) * ((n - 1) * kept * prob + (1 - kept) * (1 - prob))).mean()
