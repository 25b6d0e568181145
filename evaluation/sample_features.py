"""Features and costs of a trained model's samples. The images themselves are not kept."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evaluation.extractors import Extractor
from evaluation.feature_cache import FeatureChunks, as_arrays, check_finite, progress_bar, run_extractor
from processes.group import Processes
from sampling.accounting import image_tflop
from sampling.generate import SampledBatch, SamplingOptions, TrainedModel, generate


@dataclass(frozen=True)
class SamplePlan:
    """Which samples to draw: image i has the class labels[i]."""

    options: SamplingOptions
    labels: list[int]
    batch_size: int
    title: str = "samples"  # of the progress bar


def measure_samples(
    trained: TrainedModel, plan: SamplePlan, extractor: Extractor, folder: Path, processes: Processes
) -> FeatureChunks:
    """Draw the samples and write what is measured on them to `folder`, one chunk per batch.

    The chunks hold what `measure_batch` returns. Batches that have a file are not sampled again. When all
    processes have returned, the result is complete; it does not depend on their number.
    """
    chunks = FeatureChunks(folder, len(plan.labels), plan.batch_size)
    missing = chunks.missing(processes)
    with progress_bar(chunks.images_in(missing), plan.title, processes) as bar:
        for chunk in missing:
            index = list(chunks.ranges[chunk])
            labels = [plan.labels[i] for i in index]
            (batch,) = generate(trained, index, labels, plan.options, plan.batch_size)
            arrays = measure_batch(trained, batch, extractor)
            check_finite(arrays, [f"{plan.title}, sample {i}" for i in index])
            chunks.write(chunk, arrays)
            bar.update(len(index))
    return chunks


def measure_batch(trained: TrainedModel, batch: SampledBatch, extractor: Extractor) -> dict[str, np.ndarray]:
    """Arrays with a row per image.

    They are what the extractor gives; `tflop`, the cost of the image; and `kept`, the kept share over all steps
    of the conditional branch or, in samples without a class, of the only one.
    """
    arrays = as_arrays([run_extractor(extractor, batch.images)])
    counts = torch.stack([step.shown for step in batch.kept])  # (steps, B)
    arrays["kept"] = counts.double().mean(0).cpu().numpy() / trained.config.tokens
    arrays["tflop"] = image_tflop(trained.config, batch.kept)
    return arrays
