"""Evaluation during training: samples of the EMA against a reference, every `evaluation.every` steps."""

import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from config import Config
from data.autoencoder import Autoencoder
from evaluation.comparison import FeatureSet, check_sizes, check_source, compare, measure_source
from evaluation.extractors import load_extractor
from evaluation.image_sets import open_source
from evaluation.sample_features import SamplePlan, measure_samples
from processes.group import Processes
from sampling.generate import SamplingOptions, TrainedModel, draw_labels


class Evaluation:
    """Called as (ema_model, step) on every process; the first gets the numbers, the others an empty dictionary.

    Args:
        autoencoder: decodes the samples.
        folder: for features, shared by all processes.
        rank, world: this process among all.

    Raises:
        UserError: a reference or features that cannot be read or do not fit, before training starts.
    """

    def __init__(
        self, config: Config, autoencoder: Autoencoder, bf16: bool, folder: Path, rank: int, world: int
    ):
        self.config, self.autoencoder, self.folder, self.rank, self.world = (
            config,
            autoencoder,
            folder,
            rank,
            world,
        )
        section, device = config.evaluation, autoencoder.shift_map.device
        self.options = SamplingOptions(
            cfg_scale=section.cfg_scale,
            num_sampling_steps=section.num_sampling_steps,
            sampler="ddim",
            bf16=bf16,
        )
        self.options.check(config)
        source = open_source(section.reference)
        check_sizes((config.data.image_size,) * 2, source.size)
        self.extractor = load_extractor(section.features, section.inception_weights, device)
        check_source(source, self.extractor)
        self.processes = Processes(rank, world, device)
        self.reference = measure_source(source, self.extractor, folder / "reference", self.processes)
        self.labels = draw_labels(
            self.options.seed, list(range(section.num_samples)), config.data.num_classes
        )

    def __call__(self, model: torch.nn.Module, step: int) -> dict[str, float]:
        trained = TrainedModel(model, self.config, self.autoencoder, None, step, fingerprint="")
        folder = self.folder / f"{step:07d}"
        if self.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of an interrupted attempt, perhaps with other weights
        self.wait()
        batch_size, title = self.config.evaluation.batch_size, f"evaluation at step {step}"
        plan = SamplePlan(self.options, self.labels, batch_size, title)
        chunks = measure_samples(trained, plan, self.extractor, folder, self.processes)
        self.wait()
        found = {}
        if self.rank == 0:
            samples = FeatureSet(title, chunks, {}, np.array(self.labels))
            found = compare(samples, self.reference, self.extractor)
            found |= {"kept": chunks.mean("kept"), "tflop_per_image": chunks.mean("tflop")}
            shutil.rmtree(folder)
        self.wait()
        return found

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()
