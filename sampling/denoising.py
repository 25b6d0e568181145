"""From noise to latents: the one loop that runs a sampler on the guided network."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from config import Config, UserError
from data.autoencoder import NonFiniteImage
from data.streams import rng
from diffusion import OBJECTIVES, Process, build_process
from diffusion.guidance import ConditionedDenoise, Conditioning, condition, guide
from diffusion.process import evaluated_timesteps
from diffusion.samplers import Denoise, Step
from models import draws_at_random
from models.attention import kernel_problem
from models.ops.precision import allow_tf32, bfloat16_problem, tf32
from models.types import Routing
from sampling.accounting import StepCounts
from sampling.budgets import Budget
from sampling.conditions import condition_values
from sampling.half_weights import with_half_weights
from sampling.load import TrainedModel
from sampling.options import SamplingOptions

# Is shown every step, and the routing of the conditional branch, or of the only one, in it
OnStep = Callable[[Step, Routing], None]


class AnyStep(Protocol):
    """What every sampler yields: `t`, and the latents after the step, x_next (B, C, S, S)."""

    @property
    def t(self) -> int: ...

    @property
    def x_next(self) -> Tensor: ...


AnyStepT = TypeVar("AnyStepT", bound=AnyStep)


class BranchRouting(NamedTuple):
    """What the router decided in one step; None for a branch that was not computed. At least one was."""

    conditional: Routing | None
    unconditional: Routing | None

    @property
    def shown(self) -> Routing:
        """The conditional branch or, in samples without a class, the only one."""
        routing = self.unconditional if self.conditional is None else self.conditional
        assert routing is not None
        return routing

    def counts(self, t: int) -> StepCounts:
        """Kept tokens of each sample."""
        conditional, unconditional = (None if branch is None else branch.keep.sum(1) for branch in self)
        return StepCounts(t, conditional, unconditional)


def sample_latents(
    trained: TrainedModel,
    indices: list[int],
    labels: list[int],
    options: SamplingOptions,
    on_step: OnStep | None = None,
) -> tuple[Tensor, list[StepCounts]]:
    """The reverse process for one batch: scaled latents (B, C, S, S) and the kept tokens of every step."""
    kept = []
    latents = torch.empty(0)
    for step, routing in reverse_process(trained, indices, labels, options):
        latents = step.x_next
        kept.append(routing.counts(step.t))
        if on_step is not None:
            on_step(step, routing.shown)
    return latents, kept


def reverse_process(
    trained: TrainedModel, indices: list[int], labels: list[int], options: SamplingOptions
) -> Iterator[tuple[Step, BranchRouting]]:
    """The steps of the model's sampler for one batch, each with its routing."""
    config = trained.config
    diffusion = sampling_process(config, options)
    objective = OBJECTIVES[config.diffusion.objective]
    run = objective.samplers[options.sampler or objective.default]
    noise = sample_noise(options.seed, indices, config.latent_shape, trained.device)

    def sampler(denoise: Denoise) -> Iterator[Step]:
        return run(diffusion, denoise, noise(), noise)

    return sampling_steps(trained, labels, options, sampler, indices)


def sampling_steps(
    trained: TrainedModel,
    labels: list[int],
    options: SamplingOptions,
    sampler: Callable[[Denoise], Iterator[AnyStepT]],
    indices: Sequence[int] | None = None,
) -> Iterator[tuple[AnyStepT, BranchRouting]]:
    """Run a sampler on the guided network; yields what the sampler yields, with the routing of that step.

    Args:
        sampler: takes the guided network, a function of noised latents and timesteps; yields once per call.
        indices: which samples these are, for the message of an error; default: 0, 1, ...

    Raises:
        FloatingPointError: after the last step, if the latents of a sample are not finite.
    """
    prepare_arithmetic(trained, options.bf16)
    # Of the current step: one entry if both branches ran as one batch, otherwise two
    routings: list[Routing] = []
    model = trained.model
    if options.bf16 and trained.device.type == "cuda":
        # On a CPU this gains nothing
        model = with_half_weights(model, torch.bfloat16)

    def network(x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        autocast: contextlib.AbstractContextManager = contextlib.nullcontext()
        if options.bf16:
            autocast = torch.autocast(x.device.type, torch.bfloat16)
        with autocast:
            output = model(x, t, **conditioning)
        routings.append(output.routing)
        return output.prediction.float()  # guidance takes differences, which bfloat16 would round away

    on_device = torch.tensor(labels, device=trained.device)
    timesteps = []
    # A value per sample of each step. They are read after the last step, so that no step waits for the device
    finite = []
    indices = indices or range(len(labels))
    common = common_conditioning(trained, options, indices)
    for step in sampler(guided_denoiser(network, trained.config, on_device, options, common)):
        timesteps.append(step.t)
        finite.append(step.x_next.isfinite().flatten(1).all(1))
        yield step, split_branches(routings, len(labels), has_classes=options.cfg_scale > 0)
        routings.clear()
    check_finite_samples(torch.stack(finite), timesteps, indices)


def common_conditioning(
    trained: TrainedModel, options: SamplingOptions, indices: Sequence[int]
) -> Conditioning:
    """What both branches get beside labels and budgets: the seeds of a random router, and further conditions."""
    common: Conditioning = {}
    if draws_at_random(trained.config):
        common["draw"] = router_draws(options.seed, indices, trained.device)
    if trained.config.data.conditions:
        given = options.conditions or {}
        common["conditions"] = condition_values(given, trained.config, indices, trained.device)
    return common


def check_finite_samples(finite: Tensor, timesteps: Sequence[int], indices: Sequence[int]) -> None:
    """Raise a FloatingPointError that names the first sample with non-finite latents, and since which step.

    Args:
        finite: (steps, B) bool.
    """
    if finite.all():
        return
    steps, samples = (~finite).nonzero(as_tuple=True)
    step = int(steps[0])
    sample = indices[int(samples[0])]
    raise FloatingPointError(
        f"sample {sample} is not finite from step {step + 1} of {len(timesteps)} (t = {timesteps[step]}) on; "
        "lower the guidance scale, or look for infinite or very large weights"
    )


def decode_samples(
    trained: TrainedModel, latents: Tensor, indices: Sequence[int], bf16: bool = False
) -> Tensor:
    """Images (B, 3, H, W) uint8 of the samples with these indices; FloatingPointError for one that overflows.

    TF32 is used only where the configuration asks for it.
    """
    try:
        with tf32(trained.config.allows_tf32(bf16=False)):
            return trained.autoencoder.decode(latents, bf16)
    except NonFiniteImage as error:
        raise FloatingPointError(
            f"sample {indices[error.index]} has finite latents, but its decoded image is not finite; decode in "
            "float32, lower the guidance scale, or look for infinite or very large weights in the autoencoder"
        ) from None


def split_branches(routings: list[Routing], batch: int, has_classes: bool) -> BranchRouting:
    """Routing of the branches: two ran as one batch (conditional rows first) or one after the other.

    Without classes there is the unconditional branch alone.
    """
    first, *others = routings
    if not has_classes:
        return BranchRouting(None, first)
    conditional = Routing(*[rows[:batch] for rows in first])
    if others:
        return BranchRouting(conditional, others[0])
    if len(first.keep) == batch:
        return BranchRouting(conditional, None)
    return BranchRouting(conditional, Routing(*[rows[batch:] for rows in first]))


def guided_denoiser(
    network: ConditionedDenoise,
    config: Config,
    labels: Tensor,
    options: SamplingOptions,
    common: Conditioning,
) -> Denoise:
    """Bind labels and budgets: one branch at scale 1, and at 0 without labels; two branches above.

    Args:
        common: what both branches get beside them, except that the unconditional branch gets no condition.
    """
    budget = options.budget
    uncond = budget if options.uncond is None else options.uncond
    # If either branch drops a fraction, both pass one to the network (0 is one), so that they run as one batch.
    # If none does, the router skips the sort
    pass_drop = budget.drops or uncond.drops
    null = torch.full_like(labels, config.data.num_classes)
    if not options.has_guidance:
        only = labels if options.cfg_scale else null
        return condition(network, common | branch_conditioning(only, budget, pass_drop))
    conditional = common | branch_conditioning(labels, budget, pass_drop)
    unconditional = without_conditions(common) | branch_conditioning(null, uncond, pass_drop)
    channels = config.diffusion.cfg_channels
    if isinstance(channels, str):  # "all"
        channels = config.data.latent_channels
    return guide(network, conditional, unconditional, options.cfg_scale, channels, options.guidance_interval)


def without_conditions(common: Conditioning) -> Conditioning:
    """The same with every condition replaced by NaN, which is none."""
    result = dict(common)
    if "conditions" in common:
        values: dict[str, Tensor] = common["conditions"]
        result["conditions"] = {name: torch.full_like(value, math.nan) for name, value in values.items()}
    return result


def branch_conditioning(labels: Tensor, budget: Budget, pass_drop: bool) -> Conditioning:
    """What one branch of the network is given beside x and t."""
    conditioning: Conditioning = {"labels": labels}
    if budget.token_count is not None:
        conditioning["tokens"] = [budget.token_count] * len(labels)
    elif pass_drop:
        conditioning["drop"] = budget.drop_fraction
    return conditioning


def prepare_arithmetic(trained: TrainedModel, bf16: bool) -> None:
    """Set TF32 for this process as the configuration says; UserError for what cannot run on this device."""
    config = trained.config
    problem = bfloat16_problem(trained.device) if bf16 else None
    if problem:
        raise UserError(f"--precision bf16: {problem}; use fp32")
    problem = kernel_problem(config.model.attention, trained.device, bf16, config.head_size)
    if problem:
        raise UserError(f"model.attention: {problem}")
    allow_tf32(config.allows_tf32(bf16))


def sampling_process(config: Config, options: SamplingOptions) -> Process:
    """The model's diffusion process, respaced to the steps of the sampler."""
    return build_process(**config.process, sampling_steps=options.num_sampling_steps)


def router_draws(seed: int, indices: Sequence[int], device: torch.device) -> Tensor:
    """What a random router draws from: (B,) int64, a function of seed and sample."""
    offset = int(rng(seed, "router").integers(1 << 40))
    return torch.tensor([offset + index for index in indices], device=device)


def network_timesteps(config: Config, options: SamplingOptions) -> np.ndarray:
    """The timesteps at which the network will be evaluated, rising."""
    return evaluated_timesteps(config.diffusion.objective, sampling_process(config, options), options.sampler)


def sample_noise(
    seed: int, indices: list[int], shape: tuple[int, ...], device: torch.device
) -> Callable[[], Tensor]:
    """A function that returns the next standard normal draw (B, *shape), each sample from its own stream."""
    streams = [rng(seed, "sample", i) for i in indices]

    def draw() -> Tensor:
        draws = [stream.standard_normal(shape, dtype=np.float32) for stream in streams]
        noise = torch.from_numpy(np.stack(draws))
        if device.type != "cuda":
            return noise.to(device)
        return noise.pin_memory().to(device, non_blocking=True)  # a copy that waits for nothing

    return draw
