"""Grids of samples that a run draws from its EMA, and the autoencoder that decodes them."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from config import Config, UserError
from data.autoencoder import Autoencoder, is_same_autoencoder
from data.features import Features
from diffusion import OBJECTIVES
from sampling.conditions import conditions_of_images
from sampling.generate import SamplingOptions, TrainedModel, generate_images
from sampling.options import possible_scale
from sampling.pictures import save_grid

IMAGES = 16
COLUMNS = 8
MAX_STEPS = 50


def grid_path(folder: Path, step: int) -> Path:
    """File of a step's grid in the folder of the run."""
    return folder / "samples" / f"{step:07d}.png"


def grid_labels(config: Config) -> list[int]:
    """The classes of the images, in turn."""
    return [number % config.data.num_classes for number in range(IMAGES)]


def grid_options(config: Config, store: Features, bf16: bool) -> SamplingOptions:
    """How the grids are sampled."""
    scale = possible_scale(config.logging.sample_cfg_scale, config)
    return SamplingOptions(
        cfg_scale=scale,
        num_sampling_steps=min(MAX_STEPS, config.diffusion.diffusion_steps),
        sampler=OBJECTIVES[config.diffusion.objective].fast,
        bf16=bf16,
        conditions=conditions_of_images(store, config, grid_labels(config)) if scale else None,
    )


def check_grids(config: Config, store: Features) -> None:
    """Raise a UserError if the run is to draw grids and cannot."""
    if config.logging.sample_every:
        grid_options(config, store, bf16=False).check(config)


class SampleGrids:
    """Draws a grid of samples with the main process. Called as (ema_model, step) on every process.

    Args:
        store: the features, whose images the samples take their conditions from.
        folder: the folder of the run.
    """

    def __init__(
        self,
        config: Config,
        autoencoder: Autoencoder,
        accelerator: Accelerator,
        store: Features,
        folder: Path,
    ):
        self.config = config
        self.autoencoder = autoencoder
        self.accelerator = accelerator
        self.folder = folder
        self.options = grid_options(config, store, bf16=accelerator.mixed_precision == "bf16")
        self.labels = grid_labels(config)

    def __call__(self, model: nn.Module, step: int) -> None:
        if self.accelerator.is_main_process:
            trained = TrainedModel(model, self.config, self.autoencoder, None, step, fingerprint="")
            # Samples that overflow are no reason to end a run
            try:
                images = generate_images(trained, self.labels, self.options)
                save_grid(images, grid_path(self.folder, step), columns=COLUMNS)
            except FloatingPointError as error:
                self.accelerator.print(f"warning: no sample grid at step {step}: {error}")
        self.accelerator.wait_for_everyone()


def load_decoder(config: Config, store: Features, device: torch.device | str) -> Autoencoder | None:
    """The autoencoder for a run that samples, None for any other: the one that made the features.

    If it is no longer where the features say, `data.vae` may name a copy.

    Raises:
        UserError: neither place has the autoencoder that made the features.
    """
    if not (config.logging.sample_every or config.evaluation.every):
        return None
    # Look where the features say, then at data.vae
    known = store.autoencoder
    names = [known["name"], config.data.vae] if known else [config.data.vae]
    problem = ""
    for name in names:
        try:
            autoencoder = Autoencoder.load(name, device)
        except UserError as error:
            problem = str(error).removeprefix("--vae ")
            continue
        if not known or is_same_autoencoder(autoencoder.describe(), known):
            return autoencoder
        problem = (
            f"{name} is another autoencoder than the features were made with; give a copy of {known['name']}"
        )
    raise UserError(f"data.vae: {problem}")
