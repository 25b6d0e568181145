"""A training step and a sampling step as functions without arguments, which the benchmarks time."""

import itertools
from collections.abc import Callable

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from benchmarks.meters import saved_bytes
from benchmarks.workload import Workload, downsampling
from diffusion import build_process
from diffusion.guidance import guide
from models.types import DenoiserOutput
from training.losses import ratio_loss

Forward = Callable[[Tensor, Tensor, Tensor], DenoiserOutput]  # x_t, t, labels
StepFunction = Callable[[], object]

EMA_DECAY = 0.9999
LITE_DROPPED = 0.9  # share of the tokens that the unconditional branch of Lite-CFG drops


def training_loss(workload: Workload, forward: Forward) -> Callable[[], Tensor]:
    """A function that returns a scalar: diffusion loss, and ratio loss where the configuration has one."""
    config = workload.config
    weight = config.training.ratio_loss_weight
    diffusion = build_process(**config.process)

    def loss() -> Tensor:
        x0, t, labels = workload.inputs
        x_t = diffusion.add_noise(x0, t, workload.noise)
        with workload.autocast():
            out = forward(x_t, t, labels)
        terms = diffusion.losses(out.prediction.float(), x0, x_t, t, workload.noise)
        total = torch.stack(list(terms.values())).sum(0).mean()
        return total + weight * ratio_loss(out.routing, downsampling(config)) if weight > 0 else total

    return loss


class TrainingStep:
    """A training step on one batch, as the trainer does it: loss, backward, clipping, fused AdamW and EMA.

    Loading, the averages for the log and the check for finite gradients are left out.

    Args:
        workload: model and batch.
        forward: the model, or its textbook version.
        is_textbook: take AdamW as PyTorch makes it by default, and update the EMA in a loop.
    """

    def __init__(self, workload: Workload, forward: Forward, is_textbook: bool = False):
        self.workload = workload
        self.loss = training_loss(workload, forward)
        self.is_textbook = is_textbook
        self.training = workload.config.training
        self.ema = ModelEmaV3(workload.model, decay=EMA_DECAY, exclude_buffers=True)
        self.optimizer = torch.optim.AdamW(
            workload.model.parameters(),
            lr=1e-5,
            weight_decay=self.training.weight_decay,
            fused=None if is_textbook else True,
        )

    def __call__(self) -> None:
        self.loss().backward()
        self.update()

    def update(self) -> None:
        """What follows the backward pass: clipping, optimizer and EMA."""
        torch.nn.utils.clip_grad_norm_(self.workload.model.parameters(), self.training.longest_gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.is_textbook:
            self.update_ema_in_a_loop()
        else:
            self.ema.update(self.workload.model)

    @torch.no_grad()
    def update_ema_in_a_loop(self) -> None:
        averages = self.ema.module.parameters()
        for average, value in zip(averages, self.workload.model.parameters()):
            average.mul_(EMA_DECAY).add_(value, alpha=1 - EMA_DECAY)

    def saved_bytes(self) -> int:
        """Memory that the forward pass keeps for the backward pass, beyond weights and batch."""
        model = self.workload.model
        known = [*model.parameters(), *model.buffers(), *self.workload.inputs, self.workload.noise]
        return saved_bytes(self.loss, known)


def sampling_step(
    workload: Workload, forward: Forward, prob: Tensor, lite: bool = False
) -> Callable[[], Tensor]:
    """One guided evaluation of the network, with both branches in one batch.

    Args:
        workload: model and batch.
        forward: the model, or its textbook version.
        prob: (B, L), the mask of both branches.
        lite: Lite-CFG: the unconditional branch drops 90 % of these tokens.
    """
    x, t, labels = workload.inputs
    null_labels = torch.full_like(labels, workload.config.data.num_classes)
    unconditional = drop_tokens(prob, LITE_DROPPED) if lite else prob
    both = torch.cat([prob, unconditional])

    def denoise(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        with workload.autocast():
            return forward(x, t, labels).prediction.float()

    guided = guide(denoise, {"labels": labels}, {"labels": null_labels}, 1.5, 3)

    @torch.no_grad()
    def step() -> Tensor:
        with workload.masked(both):
            return guided(x, t)

    return step


def drop_tokens(prob: Tensor, share: float) -> Tensor:
    """A mask (B, L) that keeps all but about this share of the tokens that `prob` keeps, and both ends."""
    keep = prob > 0.5
    fewer = keep & (torch.rand_like(prob) > share)
    fewer[:, 0] = True
    fewer[:, -1] = True
    return torch.where(fewer == keep, prob, 1 - prob)


def with_mask(workload: Workload, prob: Tensor, step: StepFunction) -> StepFunction:
    """A step on the tokens that `prob` keeps."""

    def run() -> object:
        with workload.masked(prob):
            return step()

    return run


def in_turn(steps: list[StepFunction]) -> StepFunction:
    """A function that runs the next of these steps. Each runs once here, so that torch.compile compiles."""
    for step in steps:
        step()
    turns = itertools.cycle(steps)
    return lambda: next(turns)()
