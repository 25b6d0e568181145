"""From a trained model to images.

    trained = load_trained("results/shapes/checkpoints/0000800.pt")
    options = SamplingOptions(cfg_scale=4.0, num_sampling_steps=100)
    images = generate_images(trained, labels=[0, 1, 2, 3], options=options)  # (4, 3, H, W) uint8

The noise of sample i, and its label from `draw_labels`, are functions of (seed, i): they do not depend on batch
size, device or number of processes, and different budgets are compared on the same noise.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from config import Config, UserError
from data.codecs import KLCodec, counted_decoder_flops
from data.streams import rng
from models import architecture, flops
from processes.memory import peak_memory, reset_peak_memory
from sampling.accounting import SamplingRecord, Seconds, StepCounts, stack_kept, summarise
from sampling.budgets import ALL
from sampling.conditions import check_rows
from sampling.cost_limit import CostModel, CostPrediction, choose_fractions
from sampling.denoising import OnStep, decode_samples, network_timesteps, sample_latents
from sampling.load import TrainedModel, load_trained
from sampling.options import SamplingOptions

# The interface for a user's own scripts.
__all__ = ["SamplingOptions", "TrainedModel", "generate", "generate_images", "load_trained"]

# What is sampled to predict the cost of a budget
PROBE_SAMPLES = 16
PROBE_STEPS = 10


class SampledBatch(NamedTuple):
    """Samples that were generated together."""

    indices: list[int]  # numbers i of the samples, whose noise is a function of (seed, i)
    labels: list[int]
    images: Tensor  # (B, 3, H, W) uint8, on the CPU
    kept: list[StepCounts]  # one per step
    seconds: Seconds
    peak_memory: int  # bytes: allocated on a GPU, resident elsewhere

    @property
    def ms_per_image(self) -> float:
        """Milliseconds of denoising per image; decoding is not a matter of the budget."""
        return 1e3 * self.seconds.denoising / len(self.indices)

    def record(self) -> SamplingRecord:
        """What accounting needs of the batch."""
        timesteps = [step.t for step in self.kept]
        return SamplingRecord(timesteps, stack_kept(self.kept), self.labels, self.seconds, self.peak_memory)


# ----------------------------------------------------------------------------------------------------- labels


def check_labels(labels: list[int], config: Config) -> None:
    """Refuse labels that the model does not know; the null label cannot be asked for."""
    known = range(config.data.num_classes)
    for label in labels:
        if label not in known:
            raise UserError(f"--classes {label}: the model knows labels 0 to {known[-1]}")


def draw_labels(seed: int, indices: list[int], num_classes: int, balanced: bool = False) -> list[int]:
    """Label of each sample: uniformly random as in DiT, or index modulo classes."""
    if balanced:
        return [i % num_classes for i in indices]
    return [int(rng(seed, "sample label", i).integers(num_classes)) for i in indices]


# ----------------------------------------------------------------------------------------------------- images


@torch.inference_mode()
def generate(
    trained: TrainedModel,
    indices: list[int],
    labels: list[int],
    options: SamplingOptions,
    batch_size: int = 32,
    on_step: OnStep | None = None,
) -> Iterator[SampledBatch]:
    """Generate the samples with the given indices and labels, batch by batch.

    Raises:
        UserError: options that do not fit the model or the samples, or a label that the model does not know.
    """
    options.check(trained.config)
    check_labels(labels, trained.config)
    check_rows(options.conditions or {}, trained.config, max(indices, default=-1) + 1)
    options, _ = replace_cost_limits(trained, indices, labels, options)
    for start in range(0, len(indices), batch_size):
        part = slice(start, start + batch_size)
        reset_peak_memory(trained.device)
        started = time.perf_counter()
        latents, kept = sample_latents(trained, indices[part], labels[part], options, on_step)
        if latents.device.type != "cpu":
            torch.accelerator.synchronize()
        denoised = time.perf_counter()
        images = decode_samples(trained, latents, indices[part], options.bf16_vae).cpu()
        seconds = Seconds(denoised - started, time.perf_counter() - denoised)
        peak = peak_memory(trained.device)
        yield SampledBatch(indices[part], labels[part], images, kept, seconds, peak)


def generate_images(
    trained: TrainedModel, labels: list[int], options: SamplingOptions | None = None
) -> Tensor:
    """One image per label, (B, 3, H, W) uint8; image i uses the noise of sample i."""
    indices = list(range(len(labels)))
    batches = generate(trained, indices, labels, options or SamplingOptions())
    return torch.cat([batch.images for batch in batches])


def warm_up(trained: TrainedModel, labels: list[int], options: SamplingOptions) -> None:
    """Sample one step for nothing: kernels are loaded and memory is allocated before anything is timed."""
    one_step = dataclasses.replace(options, num_sampling_steps=1, budget=ALL, uncond=None)
    for _ in generate(trained, list(range(len(labels))), labels, one_step, len(labels)):
        pass


def summarise_run(trained: TrainedModel, options: SamplingOptions, record: SamplingRecord) -> dict:
    """What summary.json holds: the options, and what the samples cost."""
    codec = trained.autoencoder.codec
    grid = trained.config.latent_grid
    if isinstance(codec, KLCodec):
        decoding = sum(flops.decoder_flops(codec.model.config, grid).values())
    else:
        decoding = counted_decoder_flops(codec, grid)
    account = summarise(trained.config, decoding, trained.class_names, record)
    return {"options": options.plain(), **account}


# ----------------------------------------------------------------------------------------- limits on the cost


@torch.inference_mode()
def replace_cost_limits(
    trained: TrainedModel, indices: list[int], labels: list[int], options: SamplingOptions
) -> tuple[SamplingOptions, CostPrediction | None]:
    """Replace limits on the cost by fractions to drop, and predict the cost; without limits there is no prediction.

    A few samples are drawn in a few steps with nothing dropped, to see what the router itself keeps at each t.
    """
    limited = options.budget.unit == "tflops"
    uncond_limited = options.uncond is not None and options.uncond.unit == "tflops"
    if not limited and not uncond_limited:
        return options, None

    # What the router keeps by itself
    undropped = dataclasses.replace(
        options,
        budget=ALL,
        uncond=None,
        guidance_interval=None,
        num_sampling_steps=min(options.num_sampling_steps, PROBE_STEPS),
    )
    _, kept = sample_latents(trained, indices[:PROBE_SAMPLES], labels[:PROBE_SAMPLES], undropped)

    # What the samples cost at each fraction, and the smallest fractions within the limits
    timesteps = network_timesteps(trained.config, options)
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
