"""From a checkpoint to images.

    trained = load_trained("results/shapes/checkpoints/0001500.pt")
    images = generate_images(trained, labels=[0, 1, 2, 3], options=SamplingOptions(cfg_scale=4.0))  # (4, 3, H, W) uint8

Noise and label of sample i are functions of (seed, i): they do not depend on batch size, device or number of processes, and
different budgets are compared on the same noise.
"""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config, UserError, config_from_dict, differences, flatten, to_dict
from data.autoencoder import HUB_NAMES, Autoencoder
from data.streams import rng
from diffusion import GaussianDiffusion, create_diffusion
from diffusion.guidance import Conditioning, condition, guide
from diffusion.samplers import SAMPLERS, Step
from models import architecture, build_model
from models.attention import kernel_problem
from models.ops.precision import allow_tf32
from models.types import Routing
from processes import group
from sampling.accounting import Seconds, StepCounts
from sampling.budgets import ALL, Budget
from sampling.cost_limit import CostModel, CostPrediction, choose_fractions
from weights.checkpoint import load_checkpoint

# What may differ between --config and the checkpoint's configuration when sampling.
_MAY_DIFFER = ("model.name", "model.init", "model.attention", "model.upcycle.", "training.", "data.feature_path",
               "data.num_workers", "data.vae", "diffusion.cfg_channels", "logging.", "evaluation.", "ckpt")  # fmt: skip
PROBE_SAMPLES, PROBE_STEPS = 16, 10  # to predict what a budget costs
_MUST_AGREE = ("training.learn_sigma", "training.class_dropout_prob")


class TrainedModel(NamedTuple):
    """A trained model with all that sampling needs."""

    model: torch.nn.Module  # the EMA weights, in evaluation mode
    config: Config
    autoencoder: Autoencoder
    class_names: list[str] | None
    step: int  # optimizer steps it was trained for
    fingerprint: str  # of the weights and of what the configuration makes of them

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample; the names are the command line's.

    `budget` holds for both branches of guidance, or with Lite-CFG, which is asked for by `uncond`, for the conditional one.
    """

    cfg_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = (
        None  # guide at these timesteps t only, both ends included
    )
    num_sampling_steps: int = 250
    sampler: str = "ddpm"
    seed: int = 0
    bf16: bool = False
    budget: Budget = ALL
    uncond: Budget | None = None  # the unconditional branch's own (Lite-CFG)

    def check(self, config: Config) -> None:
        """Raise UserError for values out of range and for options that contradict each other or the model."""
        if not 1 <= self.cfg_scale < float("inf"):
            raise UserError(
                f"--cfg-scale {self.cfg_scale}: must be a number of at least 1 (1 is no guidance)"
            )
        if not 1 <= self.num_sampling_steps <= config.diffusion.diffusion_steps:
            steps = config.diffusion.diffusion_steps
            raise UserError(f"--num-sampling-steps {self.num_sampling_steps}: must be from 1 to {steps}")
        if self.sampler not in SAMPLERS:
            raise UserError(f"--sampler '{self.sampler}' is not one of {', '.join(SAMPLERS)}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed}: must be 0 or greater, and below 2**63")
        if self.uncond is not None and self.cfg_scale == 1:
            raise UserError(
                "--lite-cfg: has no unconditional branch to make cheaper at --cfg-scale 1; raise the scale"
            )
        if self.cfg_scale > 1 and config.training.class_dropout_prob == 0:
            raise UserError(
                f"--cfg-scale {self.cfg_scale}: the model was trained without class dropout; use 1"
            )
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0 <= low <= high <= config.diffusion.diffusion_steps:
                steps = config.diffusion.diffusion_steps
                raise UserError(
                    f"--guidance-interval {low:g} {high:g}: must be two timesteps from 0 to {steps}, the lower first"
                )
            if self.cfg_scale == 1:
                raise UserError(
                    f"--guidance-interval {low:g} {high:g}: --cfg-scale 1 is no guidance; raise the scale"
                )
        if self.uncond is not None and config.is_static:
            raise UserError("--lite-cfg: a static DiT has no router; leave it out")
        if self.uncond == ALL and self.budget == ALL:
            raise UserError(
                "--lite-cfg: changes nothing without a budget; add e.g. --uncond-tail-dropping-fraction 0.9"
            )
        self.budget.check(config)
        if self.uncond is not None:
            self.uncond.check(config, unconditional=True)


class SampledBatch(NamedTuple):
    """Samples that were generated together."""

    index: list[int]
    labels: list[int]
    images: Tensor  # (B, 3, H, W) uint8, on the CPU
    kept: list[StepCounts]  # one per step
    seconds: Seconds


Observe = Callable[[Step, Routing], None]  # is shown every step and the routing of the conditional branch


def load_trained(
    ckpt: str | Path,
    device: torch.device | str = "cpu",
    vae: str | None = None,
    config: Config | None = None,
    overrides: Sequence[str] = (),
) -> TrainedModel:
    """Load a checkpoint for sampling.

    Args:
        ckpt: a file that training wrote, a weights file, or a folder with one (and, maybe, with the autoencoder in vae/).
        vae: "ema", "mse" or a local folder; default: the autoencoder that comes with the checkpoint or that it names.
        config: default: the checkpoint's own.
        overrides: `section.key=value` for the checkpoint's own configuration.

    The configuration in use must agree with the checkpoint's in everything that shapes the model and the process.

    Raises:
        UserError: unreadable checkpoint, contradicting configuration, or another autoencoder than the one trained with.
    """
    state = load_checkpoint(ckpt)
    config = config or config_from_dict(state["config"], overrides)
    check_agreement(config, config_from_dict(state["config"]))
    model = build_model(config)
    try:
        model.load_state_dict(state["ema"])
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"--ckpt '{ckpt}': its weights are not those of its configuration ({reason}); give another"
        ) from None
    known = state["autoencoder"]
    if vae is None and Path(ckpt, "vae").is_dir():
        vae = str(Path(ckpt, "vae"))
    autoencoder = Autoencoder.load(vae or (known["name"] if known else config.data.vae), device)
    check_autoencoder(autoencoder, known, config)
    identity = fingerprint(model.state_dict(), config)
    return TrainedModel(
        model.to(device).eval(), config, autoencoder, state["class_names"], state["step"], identity
    )


def fingerprint(state_dict: dict[str, Tensor], config: Config) -> str:
    """SHA-256 of names and values, and of the keys that make another network or process of the same weights."""
    keys = flatten(to_dict(config))
    digest = hashlib.sha256(json.dumps({key: keys[key] for key in sorted(keys) if must_agree(key)}).encode())
    for name, value in state_dict.items():
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def must_agree(key: str) -> bool:
    """Whether a key, written `section.key`, shapes the network or the process."""
    return key.startswith(_MUST_AGREE) or not key.startswith(_MAY_DIFFER)


def check_agreement(given: Config, own: Config) -> None:
    """Refuse a configuration that would make another network or process of the checkpoint's weights."""
    changed = differences(to_dict(given), to_dict(own))
    if contradictions := [key for key in changed if must_agree(key)]:
        raise UserError(
            f"--config differs from the checkpoint's configuration in {', '.join(contradictions)}; leave it out"
        )


def check_autoencoder(autoencoder: Autoencoder, known: dict | None, config: Config) -> None:
    """The autoencoder must fit the model and be the one that the features were made with; ema and mse share their encoder."""
    ours = autoencoder.describe()
    if (ours["stride"], ours["channels"]) != (config.data.latent_stride, config.data.latent_channels):
        raise UserError(
            f"--vae '{ours['name']}' has stride {ours['stride']} and {ours['channels']} channels, but the model's are "
            f"{config.data.latent_stride} and {config.data.latent_channels}; give the autoencoder of the features"
        )
    if known and (ours["shift"], ours["scale"]) != (known["shift"], known["scale"]):
        raise UserError(
            f"--vae '{ours['name']}' scales latents differently from '{known['name']}', which the model was trained on"
        )
    if known and ours["sha256"] != known["sha256"]:
        if {ours["name"], known["name"]} != set(HUB_NAMES):
            raise UserError(
                f"--vae '{ours['name']}' has other weights than '{known['name']}' had when the model's features were made; "
                "give that one"
            )
        group.print_once(
            f"warning: --vae {ours['name']} decodes the latents of a model that was trained on {known['name']}"
        )


def check_labels(labels: list[int], config: Config) -> None:
    """Refuse labels that the model does not know; the null label is not one to ask for."""
    unknown = [label for label in labels if not 0 <= label < config.data.num_classes]
    if unknown:
        raise UserError(f"--classes {unknown[0]}: the model knows labels 0 to {config.data.num_classes - 1}")


def draw_labels(seed: int, index: list[int], num_classes: int, balanced: bool = False) -> list[int]:
    """Label of each sample: uniformly random as in DiT, or index modulo classes."""
    if balanced:
        return [i % num_classes for i in index]
    return [int(rng(seed, "sample label", i).integers(num_classes)) for i in index]


@torch.inference_mode()
def generate(
    trained: TrainedModel,
    index: list[int],
    labels: list[int],
    options: SamplingOptions,
    batch_size: int = 32,
    observe: Observe | None = None,
) -> Iterator[SampledBatch]:
    """Generate the samples with the given numbers and labels, batch by batch.

    Raises:
        UserError: options that do not fit, or a label that the model does not know.
    """
    options.check(trained.config)
    check_labels(labels, trained.config)
    options, _ = replace_cost_limits(trained, index, labels, options)
    for start in range(0, len(index), batch_size):
        part = slice(start, start + batch_size)
        started = time.perf_counter()
        latents, kept = sample_latents(trained, index[part], labels[part], options, observe)
        if latents.device.type != "cpu":
            torch.accelerator.synchronize()
        denoised = time.perf_counter()
        images = trained.autoencoder.decode(latents, options.bf16).cpu()
        yield SampledBatch(
            index[part],
            labels[part],
            images,
            kept,
            Seconds(denoised - started, time.perf_counter() - denoised),
        )


def generate_images(
    trained: TrainedModel, labels: list[int], options: SamplingOptions | None = None
) -> Tensor:
    """One image per label, (B, 3, H, W) uint8; sample i uses the noise of number i."""
    batches = generate(trained, list(range(len(labels))), labels, options or SamplingOptions())
    return torch.cat([batch.images for batch in batches])


@torch.inference_mode()
def replace_cost_limits(
    trained: TrainedModel, index: list[int], labels: list[int], options: SamplingOptions
) -> tuple[SamplingOptions, CostPrediction | None]:
    """Replace limits on the cost by fractions to drop, and predict the cost; other options pass through with None.

    A few of the samples are drawn in a few steps with nothing dropped, to see what the router keeps by itself at each t.
    """
    limited = [budget for budget in (options.budget, options.uncond) if budget and budget.unit == "tflops"]
    if not limited:
        return options, None
    few_steps = min(options.num_sampling_steps, PROBE_STEPS)
    undropped = dataclasses.replace(
        options, budget=ALL, uncond=None, guidance_interval=None, num_sampling_steps=few_steps
    )
    _, kept = sample_latents(trained, index[:PROBE_SAMPLES], labels[:PROBE_SAMPLES], undropped, None)
    timesteps = sampling_process(trained.config, options).timesteps
    model = CostModel(architecture(trained.config), kept, timesteps, options.guidance_interval)
    budget, uncond = choose_fractions(model, options.budget, options.uncond)
    chosen = dataclasses.replace(options, budget=budget, uncond=uncond)
    return chosen, model.predict(budget, uncond)


def describe_choice(options: SamplingOptions, prediction: CostPrediction) -> str:
    """One line about the budgets that `replace_cost_limits` chose."""
    choice = str(options.budget)
    if options.uncond is not None:
        choice += f", the unconditional branch {options.uncond}"
    cost = f"{prediction.total:.4g} TFLOP per image ({prediction.unconditional:.4g} unconditional)"
    return f"budget: {choice}; predicted {cost}"


def sampling_process(config: Config, options: SamplingOptions) -> GaussianDiffusion:
    return create_diffusion(
        config.diffusion.noise_schedule,
        config.diffusion.diffusion_steps,
        config.training.learn_sigma,
        options.num_sampling_steps,
    )


def sample_latents(
    trained: TrainedModel,
    index: list[int],
    labels: list[int],
    options: SamplingOptions,
    observe: Observe | None,
) -> tuple[Tensor, list[StepCounts]]:
    """The reverse process for one batch: scaled latents (B, C, S, S) and the kept tokens of every step."""
    config, device = trained.config, trained.device
    prepare_arithmetic(trained, options.bf16)
    diffusion = sampling_process(config, options)
    noise = sample_noise(
        options.seed, index, (config.data.latent_channels, config.latent_size, config.latent_size), device
    )
    watched = Watched(trained.model, options.bf16)
    denoise = guided_denoiser(watched, config, torch.tensor(labels, device=device), options)
    kept = []
    for step in SAMPLERS[options.sampler](diffusion, denoise, noise(), noise):
        routing = (
            watched.take()
        )  # rows of the conditional branch, then of the unconditional one where it was computed
        count = routing.keep.sum(1)
        kept.append(
            StepCounts(step.t, count[: len(index)], count[len(index) :] if len(count) > len(index) else None)
        )
        if observe is not None:
            observe(step, Routing(*(x[: len(index)] for x in routing)))
    return step.x_next, kept


def prepare_arithmetic(trained: TrainedModel, bf16: bool) -> None:
    """TF32 for the whole process as the configuration says; UserError for an attention kernel that cannot run like this."""
    if problem := kernel_problem(
        trained.config.model.attention, trained.device, bf16, trained.config.head_size
    ):
        raise UserError(f"model.attention: {problem}")
    allow_tf32(trained.config.model.hnet.fp32_router_dechunk == "tf32")


class Watched:
    """A model as a function to its prediction; `take` gives the routing of the calls since it was last asked."""

    def __init__(self, model: torch.nn.Module, bf16: bool):
        self.model, self.bf16, self.seen = model, bf16, []

    def __call__(self, x: Tensor, t: Tensor, **conditioning) -> Tensor:
        autocast = torch.autocast(x.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        with autocast:
            prediction, routing = self.model(x, t, **conditioning)
        self.seen.append(routing)
        return prediction.float()  # guidance takes differences, which bfloat16 would round away

    def take(self) -> Routing:
        seen, self.seen = self.seen, []
        return Routing(*(torch.cat(rows) for rows in zip(*seen))) if len(seen) > 1 else seen[0]


def guided_denoiser(denoise, config: Config, labels: Tensor, options: SamplingOptions):
    """Bind labels and budgets: one branch at scale 1, two branches above."""
    budget = options.budget
    uncond = budget if options.uncond is None else options.uncond
    # Without a fraction the router does not have to sort; where one branch drops, both are told, and run as one batch
    sort = budget.drops or uncond.drops
    conditional = branch_conditioning(labels, budget, sort)
    if options.cfg_scale == 1:
        return condition(denoise, conditional)
    null = torch.full_like(labels, config.data.num_classes)
    unconditional = branch_conditioning(null, uncond, sort)
    guided = config.diffusion.cfg_channels
    channels = config.data.latent_channels if guided == "all" else guided
    return guide(denoise, conditional, unconditional, options.cfg_scale, channels, options.guidance_interval)


def branch_conditioning(labels: Tensor, budget: Budget, sort: bool) -> Conditioning:
    """What one branch of the network is given beside x and t."""
    conditioning: Conditioning = {"labels": labels}
    if budget.token_count is not None:
        conditioning["tokens"] = [budget.token_count] * len(labels)
    elif sort:
        conditioning["drop"] = budget.drop_fraction
    return conditioning


def sample_noise(
    seed: int, index: list[int], shape: tuple[int, ...], device: torch.device
) -> Callable[[], Tensor]:
    """A function that returns the next standard normal draw (B, *shape), each sample from its own stream."""
    streams = [rng(seed, "sample", i) for i in index]

    def draw() -> Tensor:
        noise = torch.from_numpy(np.stack([s.standard_normal(shape, dtype=np.float32) for s in streams]))
        if device.type == "cuda":  # from pinned memory the copy waits for nothing
            noise = noise.pin_memory()
        return noise.to(device, non_blocking=device.type == "cuda")

    return draw
