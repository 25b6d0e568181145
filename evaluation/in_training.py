"""Evaluation during training: samples of the EMA against a reference, every `evaluation.every` steps."""

import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from config import Config, UserError
from data.autoencoder import Autoencoder
from data.features import Features
from diffusion import OBJECTIVES
from evaluation.class_labels import sampled_classes
from evaluation.comparison import (
    FeatureSet,
    check_sizes,
    check_source,
    class_note,
    compare,
    compression_warning,
    measure_source,
)
from evaluation.extractors import load_extractor
from evaluation.feature_cache import FeatureChunks
from evaluation.image_sets import open_source
from evaluation.sample_features import SamplePlan, measure_samples
from processes import group
from processes.group import Processes
from sampling.conditions import conditions_of_images
from sampling.generate import SamplingOptions, TrainedModel, draw_labels
from sampling.options import possible_scale


class Evaluation:
    """Called as (ema_model, step) on every process. The first gets the metrics, the others an empty dict.

    Args:
        autoencoder: decodes the samples.
        bf16: whether to sample in bfloat16.
        folder: for features, shared by all processes.
        processes: this process among those of the run.
        store: the features, whose images the samples take their conditions from.

    Raises:
        UserError: a reference or features that cannot be read or do not fit, before training starts.
    """

    def __init__(
        self,
        config: Config,
        autoencoder: Autoencoder,
        bf16: bool,
        folder: Path,
        processes: Processes,
        store: Features,
    ):
        self.config = config
        self.autoencoder = autoencoder
        self.folder = folder
        self.processes = processes
        self.class_names = store.class_names
        self.note = ""  # about the classes, as it was printed
        section = config.evaluation
        scale = possible_scale(section.cfg_scale, config)
        self.labels = draw_labels(0, list(range(section.num_samples)), config.data.num_classes)
        self.options = SamplingOptions(
            cfg_scale=scale,
            num_sampling_steps=section.num_sampling_steps,
            sampler=OBJECTIVES[config.diffusion.objective].fast,
            bf16=bf16,
            conditions=conditions_of_images(store, config, self.labels) if scale else None,
        )
        self.options.check(config)
        # Measure the reference
        source = open_source(str(section.reference), "evaluation.reference")
        for note in source.notes:
            group.print_once(note)
        check_sizes(config.data.image_grid, source.size)
        self.extractor = load_extractor(section.features, section.inception_weights, processes.device)
        check_source(source, self.extractor)
        warning = compression_warning(None, source)
        if warning:
            group.print_once(warning)
        self.reference = measure_source(source, self.extractor, folder / "reference", processes)

    def __call__(self, model: torch.nn.Module, step: int) -> dict[str, float]:
        """Sample with all processes and compare on the first. Collective."""
        is_first = self.processes.rank == 0
        title = f"evaluation at step {step}"
        # Remove what an interrupted evaluation has left, perhaps from other weights
        folder = self.folder / f"{step:07d}"
        if is_first:
            shutil.rmtree(folder, ignore_errors=True)
        self.wait()
        # Every process samples its share and writes the features to the folder
        trained = TrainedModel(model, self.config, self.autoencoder, None, step, fingerprint="")
        plan = SamplePlan(self.options, self.labels, self.config.evaluation.batch_size, title)
        # Samples that overflow, or whose features do, are no reason to end a run
        features = None
        try:
            features = measure_samples(trained, plan, self.extractor, folder, self.processes)
        except (FloatingPointError, UserError) as error:
            print(f"warning: no evaluation at step {step}: {error}")
        if self.any_process(features is None) or features is None:
            shutil.rmtree(folder, ignore_errors=True)
            return {}
        # The first process compares
        metrics: dict[str, float] = {}
        if is_first:
            classes = sampled_classes(self.labels, self.class_names, self.options.cfg_scale)
            try:
                metrics = self.compare(FeatureSet(title, features, {}, classes), features)
            except UserError as error:
                print(f"warning: no evaluation at step {step}: {error}")
            shutil.rmtree(folder)
        self.wait()
        return metrics

    def compare(self, samples: FeatureSet, features: FeatureChunks) -> dict[str, float]:
        """Metrics and costs of the samples; UserError for a metric that is not finite."""
        metrics = compare(samples, self.reference, self.extractor)
        self.print_note(class_note(samples, self.extractor))
        metrics["kept"] = features.mean("kept")
        metrics["tflop_per_image"] = features.mean("tflop")
        return metrics

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set on any process. Collective."""
        flags = [flag] * self.processes.world
        if self.processes.world > 1:
            dist.all_gather_object(flags, flag)
        return any(flags)

    def print_note(self, note: str) -> None:
        """Print a note about the classes, unless the evaluation before had the same."""
        if note and note != self.note:
            print(note)
        self.note = note

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.processes.world > 1:
            dist.barrier()
