"""Loss terms as pure functions of what the model returned."""

from torch import Tensor

from models.types import Routing


def ratio_loss(routing: Routing, downsample_factor: float, group_size: int | None = None) -> Tensor:
    """Push the kept share towards 1 in `downsample_factor` (H-Net, arXiv 2507.07955, equation 10).

    Args:
        routing: of a batch of B samples; the decision before tail dropping counts.
        downsample_factor: N > 1.
        group_size: samples over which the shares are averaged before the loss; divides B. None: the whole batch.

    Returns:
        Scalar: N / (N - 1) * ((N - 1) F G + (1 - F)(1 - G)), F the kept share and G the mean probability of a group,
        averaged over groups. It is 1 when both are 1 / N, and can be below 1 elsewhere.
    """
    n = downsample_factor
    groups = 1 if group_size is None else len(routing.prob) // group_size
    kept = routing.boundary.float().view(groups, -1).mean(1)
    prob = routing.prob.view(groups, -1).mean(1)
    return (n / (n - 1) * ((n - 1) * kept * prob + (1 - kept) * (1 - prob))).mean()
