"""Evaluation during training: samples of the EMA against a reference, every `evaluation.every` steps."""

import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from config import Config
from data.autoencoder import Autoencoder
from evaluation.extractors import load_extractor
from evaluation.image_sets import open_source
from evaluation.measure import (
    Chunks,
    Measured,
    check_sizes,
    check_source,
    compare,
    mean_of,
    measure_samples,
    measure_source,
)
from sampling.generate import SamplingOptions, TrainedModel, draw_labels


class Evaluation:
    """Called as (ema_model, step) on every process. The first gets the metrics, the others an empty dict.

    Args:
        autoencoder: decodes the samples.
        bf16: whether to sample in bfloat16.
        folder: for features, shared by all processes.
        rank, world: number of this process, and of all processes.

    Raises:
        UserError: a reference or features that cannot be read or do not fit, before training starts.
    """

    def __init__(
        self, config: Config, autoencoder: Autoencoder, bf16: bool, folder: Path, rank: int, world: int
    ):
        self.config = config
        self.autoencoder = autoencoder
        self.folder = folder
        self.rank = rank
        self.world = world
        section = config.evaluation
        self.options = SamplingOptions(
            cfg_scale=section.cfg_scale,
            num_sampling_steps=section.num_sampling_steps,
            sampler="ddim",
            bf16=bf16,
        )
        self.options.check(config)
        self.labels = draw_labels(
            self.options.seed, list(range(section.num_samples)), config.data.num_classes
        )
        # Measure the reference
        source = open_source(str(section.reference))
        size = config.data.image_size
        check_sizes((size, size), source.size)
        device = autoencoder.shift_map.device
        self.extractor = load_extractor(section.features, section.inception_weights, device)
        check_source(source, self.extractor)
        self.reference = measure_source(source, self.extractor, folder / "reference", rank, world)

    def __call__(self, model: torch.nn.Module, step: int) -> dict[str, float]:
        """Sample with all processes and compare on the first. Collective."""
        # Remove what an interrupted evaluation has left, perhaps from other weights
        folder = self.folder / f"{step:07d}"
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        self.wait()
        # Every process samples its share and writes the features to the folder
        title = f"evaluation at step {step}"
        trained = TrainedModel(model, self.config, self.autoencoder, None, step, fingerprint="")
        chunks = self.measure(trained, folder, title)
        self.wait()
        # The first process compares
        metrics: dict[str, float] = {}
        if self.rank == 0:
            samples = Measured(title, chunks, {}, np.array(self.labels))
            metrics = compare(samples, self.reference, self.extractor)
            metrics["kept"] = mean_of(chunks, "kept")
            metrics["tflop_per_image"] = mean_of(chunks, "tflop")
            shutil.rmtree(folder)
        self.wait()
        return metrics

    def measure(self, trained: TrainedModel, folder: Path, title: str) -> Chunks:
        """The features of this process's share of the samples."""
        return measure_samples(
            trained,
            self.options,
            self.labels,
            self.extractor,
            folder,
            self.config.evaluation.batch_size,
            self.rank,
            self.world,
            title,
        )

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.world > 1:
            dist.barrier()
