"""Generation in the manner of diffusers: a pipeline object with a diffusers scheduler.

    pipe = DCDiTPipeline.from_pretrained("results/B-N4/checkpoints/0400000.pt", device="cuda")
    output = pipe(class_labels=[207, 360], guidance_scale=4.0, drop_fraction=0.4, num_inference_steps=50)
    output.images[0].save("golden_retriever.png")

The scheduler may be replaced, with one that reads epsilon alone where it is not DDPM:

    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, variance_type=None)
"""

import inspect
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from config import Config, UserError
from diffusion import schedule
from sampling.budgets import ALL, Budget
from sampling.generate import (
    SamplingOptions,
    StepCounts,
    TrainedModel,
    Watched,
    check_labels,
    guided_denoiser,
    load_trained,
    prepare_arithmetic,
)


class PipelineOutput(NamedTuple):
    """What a call returns."""

    images: list[Image.Image]
    kept: list[StepCounts]  # kept tokens, one record per step


class DCDiTPipeline:
    """A trained model with its autoencoder and a scheduler.

    Attributes:
        trained: the model, its configuration and its autoencoder.
        scheduler: any diffusers scheduler for epsilon prediction; DDPM with the model's own variances by default.
    """

    def __init__(self, trained: TrainedModel, scheduler: SchedulerMixin | None = None):
        self.trained = trained
        self.scheduler = scheduler if scheduler is not None else default_scheduler(trained.config)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, device: torch.device | str = "cpu", vae: str | None = None
    ) -> "DCDiTPipeline":
        """Load a checkpoint, a weights file or a folder of `save_pretrained`; see `sampling.generate.load_trained`."""
        return cls(load_trained(source, device, vae))

    @torch.inference_mode()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 4.0,
        drop_fraction: float = 0.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> PipelineOutput:
        """One image per label.

        Args:
            guidance_scale: 1 is none. drop_fraction: share of the kept tokens to drop, in [0, 1).
            generator: of the noise, as everywhere in diffusers.

        Raises:
            UserError: a value out of range, an unknown label, an attention kernel that needs bfloat16 (the network runs in
                float32 here), or a scheduler that does not fit.
        """
        config, device = self.trained.config, self.trained.device
        options = SamplingOptions(
            cfg_scale=guidance_scale,
            num_sampling_steps=num_inference_steps,
            budget=Budget.fraction(drop_fraction) if drop_fraction else ALL,
        )
        options.check(config)
        check_labels(class_labels, config)
        prepare_arithmetic(self.trained, bf16=False)
        whole = wants_variance(self.scheduler)
        watched = Watched(self.trained.model, bf16=False)
        denoise = guided_denoiser(watched, config, torch.tensor(class_labels, device=device), options)
        shape = (len(class_labels), config.data.latent_channels, config.latent_size, config.latent_size)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        x = (
            randn_tensor(shape, generator=generator, device=torch.device(device))
            * self.scheduler.init_noise_sigma
        )
        random = (
            {"generator": generator}
            if "generator" in inspect.signature(self.scheduler.step).parameters
            else {}
        )
        kept = []
        for t in self.scheduler.timesteps:
            prediction = denoise(self.scheduler.scale_model_input(x, t), t.expand(len(x)))
            prediction = prediction if whole else prediction[:, : shape[1]]
            x = self.scheduler.step(prediction, t, x, **random).prev_sample
            counts = watched.take().keep.sum(1).split(len(x))
            kept.append(StepCounts(int(t), counts[0], counts[1] if len(counts) > 1 else None))
        return PipelineOutput(to_pil(self.trained.autoencoder.decode(x)), kept)


def default_scheduler(config: Config) -> DDPMScheduler:
    """Ancestral sampling as `--sampler ddpm` does it."""
    steps = config.diffusion.diffusion_steps
    return DDPMScheduler(
        num_train_timesteps=steps,
        trained_betas=schedule.betas(config.diffusion.noise_schedule, steps).tolist(),
        variance_type="learned_range" if config.training.learn_sigma else "fixed_large",
        clip_sample=False,
        timestep_spacing="linspace",
    )


def wants_variance(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler takes epsilon together with the variance logits; UserError where it would misread them."""
    takes_it = (
        "variance_type" in inspect.signature(type(scheduler).__init__).parameters
    )  # others just carry the entry along
    if not takes_it or scheduler.config.variance_type not in ("learned", "learned_range"):
        return False
    if not isinstance(scheduler, DDPMScheduler):
        raise UserError(
            f"scheduler {type(scheduler).__name__}: reads learned variances its own way; make it with variance_type=None"
        )
    return True


def to_pil(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
