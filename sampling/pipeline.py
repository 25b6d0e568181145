"""Generation in the manner of diffusers: a pipeline object with a diffusers scheduler.

    pipe = DCDiTPipeline.from_pretrained("results/B-N4/checkpoints/0400000.pt", device="cuda")
    output = pipe(class_labels=[207, 360], guidance_scale=4.0, drop_fraction=0.4, num_inference_steps=50)
    output.images[0].save("golden_retriever.png")

The scheduler may be replaced, with one that reads no variances where it is not DDPM:

    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, variance_type=None)
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from config import Config, UserError, one_line
from diffusion import schedule
from diffusion.samplers import Denoise
from sampling.accounting import StepCounts
from sampling.budgets import ALL, Budget
from sampling.classes import choose_labels
from sampling.conditions import check_rows
from sampling.denoising import decode_samples, sampling_steps
from sampling.generate import check_labels
from sampling.load import TrainedModel, load_trained
from sampling.options import SamplingOptions, possible_scale

# Guidance where none is asked for, if the model can do it
DEFAULT_SCALE = 4.0

# `diffusion.prediction` in diffusers' words
PREDICTION_TYPES = {"epsilon": "epsilon", "velocity": "v_prediction"}

Generators = torch.Generator | list[torch.Generator]


class PipelineOutput(NamedTuple):
    """What a call returns."""

    images: list[Image.Image]
    kept: list[StepCounts]  # kept tokens, one record per step


class SchedulerStep(NamedTuple):
    """What every diffusers scheduler tells of one step."""

    t: int
    x_next: Tensor  # (B, C, S, S) latents after the step


class DCDiTPipeline:
    """A trained model with its autoencoder and a scheduler.

    Attributes:
        trained: the model, its configuration and its autoencoder.
        scheduler: a diffusers scheduler for the model's prediction and noise schedule; default: DDPM with the
            model's variances.
    """

    def __init__(self, trained: TrainedModel, scheduler: SchedulerMixin | None = None):
        objective = trained.config.diffusion.objective
        if objective != "gaussian":
            raise UserError(
                f"diffusion.objective {objective}: the schedulers of diffusers step through other timesteps; "
                "draw samples with sample.py"
            )
        self.trained = trained
        self.scheduler = scheduler if scheduler is not None else default_scheduler(trained.config)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, device: torch.device | str = "cpu", vae: str | None = None
    ) -> "DCDiTPipeline":
        """Load a checkpoint, a weights file or a folder of `save_pretrained`, as `load_trained` does."""
        return cls(load_trained(source, device, vae))

    @torch.inference_mode()
    def __call__(
        self,
        class_labels: Sequence[int | str],
        guidance_scale: float | None = None,
        drop_fraction: float = 0.0,
        num_inference_steps: int = 50,
        generator: Generators | None = None,
        conditions: Mapping[str, ArrayLike] | None = None,
        uncond_drop_fraction: float | None = None,
    ) -> PipelineOutput:
        """One image per label.

        Args:
            class_labels: labels, or names of classes.
            guidance_scale: 1 is none, and 0 samples without a class; default: 4, or the only scale that the model
                can do.
            drop_fraction: share of the kept tokens to drop, in [0, 1).
            generator: of the noise, as everywhere in diffusers.
            conditions: name -> a condition beside the class: one value, or a row per image.
            uncond_drop_fraction: share that the unconditional branch of guidance drops, which is Lite-CFG; default:
                `drop_fraction` there too.

        Raises:
            UserError: a value out of range, an unknown label, an attention kernel that needs bfloat16 (the
                network runs in float32 here), or a scheduler that does not fit.
        """
        config = self.trained.config
        if guidance_scale is None:
            guidance_scale = possible_scale(DEFAULT_SCALE, config)
        options = SamplingOptions(
            cfg_scale=guidance_scale,
            num_sampling_steps=num_inference_steps,
            budget=Budget.fraction(drop_fraction) if drop_fraction else ALL,
            uncond=None if uncond_drop_fraction is None else Budget.fraction(uncond_drop_fraction),
            conditions=conditions,
        )
        options.check(config)
        labels = choose_labels(class_labels, self.trained.class_names)
        check_labels(labels, config)
        check_rows(conditions or {}, config, len(labels))
        prepare_scheduler(self.scheduler, config, num_inference_steps)

        def sampler(denoise: Denoise) -> Iterator[SchedulerStep]:
            return self.scheduler_steps(denoise, len(labels), generator)

        kept = []
        for step, routing in sampling_steps(self.trained, labels, options, sampler):
            kept.append(routing.counts(step.t))
        images = decode_samples(self.trained, step.x_next, range(len(labels)))
        return PipelineOutput(to_pil(images), kept)

    def scheduler_steps(
        self, denoise: Denoise, batch: int, generator: Generators | None
    ) -> Iterator[SchedulerStep]:
        """The scheduler as a sampler, from noise on."""
        config = self.trained.config
        channels = config.data.latent_channels
        with_variance = wants_variance(self.scheduler)
        arguments = {}
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            arguments["generator"] = generator

        x = randn_tensor((batch, *config.latent_shape), generator=generator, device=self.trained.device)
        x = x * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            on_device = torch.full((batch,), t.item(), dtype=t.dtype, device=x.device)
            prediction = denoise(self.scheduler.scale_model_input(x, t), on_device)
            if not with_variance:
                prediction = prediction[:, :channels]
            x = self.scheduler.step(prediction, t, x, **arguments).prev_sample
            yield SchedulerStep(int(t), x)


def default_scheduler(config: Config) -> DDPMScheduler:
    """Ancestral sampling as `--sampler ddpm` does it."""
    steps = config.diffusion.diffusion_steps
    return DDPMScheduler(
        num_train_timesteps=steps,
        trained_betas=schedule.betas(config.diffusion.noise_schedule, steps).tolist(),
        variance_type="learned_range" if config.training.learn_sigma else "fixed_large",
        clip_sample=False,
        timestep_spacing="linspace",
        prediction_type=PREDICTION_TYPES[config.diffusion.prediction],
    )


def prepare_scheduler(scheduler: SchedulerMixin, config: Config, steps: int) -> None:
    """Set the timesteps of a scheduler; UserError if it is not one for the model's process.

    The timesteps stay on the host. On a GPU, schedulers that look up the next one would wait for it in every step.
    """
    problem = scheduler_problem(scheduler, config)
    if problem is None:
        try:
            scheduler.set_timesteps(steps)
        except Exception as error:  # a scheduler has conditions of its own, and any kind of error for them
            problem = f"cannot make {steps} steps ({one_line(error)})"
    if problem is None:
        timesteps = scheduler.timesteps
        first = float(timesteps[0])
        last = float(timesteps[-1])
        if not 0 <= last <= first < config.diffusion.diffusion_steps:
            problem = f"goes from t = {first:g} to {last:g}, not from noise to image"
    if problem is not None:
        raise UserError(
            f"scheduler {type(scheduler).__name__}: {problem}; give one that denoises from the "
            f"{config.diffusion.prediction}, such as "
            "DDIMScheduler.from_config(pipe.scheduler.config)"
        )


def scheduler_problem(scheduler: SchedulerMixin, config: Config) -> str | None:
    """Why a scheduler cannot denoise with the model, or None."""
    needed = ("set_timesteps", "step", "scale_model_input", "init_noise_sigma", "alphas_cumprod")
    if not all(hasattr(scheduler, name) for name in needed):
        return (
            "is for another process, such as flow matching, than the diffusion that the model was trained for"
        )
    predicts = config.diffusion.prediction
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if prediction_type != PREDICTION_TYPES[predicts] or scheduler.config.get("use_flow_sigmas"):
        return f"reads a prediction of another kind ({prediction_type}) than the model's {predicts}"
    parameters = inspect.signature(scheduler.step).parameters.values()
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    others = set(required) - {"model_output", "timestep", "sample", "args", "kwargs"}
    if others:
        return f"needs {', '.join(sorted(others))} in every step"
    # The noise at each timestep is that of training
    betas = schedule.betas(config.diffusion.noise_schedule, config.diffusion.diffusion_steps)
    signal = torch.as_tensor(1 - betas).cumprod(0).float()
    own = scheduler.alphas_cumprod.float().cpu()
    if own.shape != signal.shape or not torch.allclose(own, signal, atol=1e-4):
        return "has another noise schedule than the model was trained with"
    return None


def wants_variance(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler takes epsilon with the variance logits; UserError where it would misread them."""
    # Schedulers without the argument carry the entry along in their configuration, and ignore it
    takes_it = "variance_type" in inspect.signature(type(scheduler).__init__).parameters
    if not takes_it or scheduler.config.variance_type not in ("learned", "learned_range"):
        return False
    if not isinstance(scheduler, DDPMScheduler):
        name = type(scheduler).__name__
        raise UserError(
            f"scheduler {name}: reads learned variances its own way; make it with variance_type=None"
        )
    return True


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) uint8 -> PIL images."""
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]
