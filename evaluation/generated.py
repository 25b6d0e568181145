"""A trained model measured directly: samples are generated, turned into features and forgotten, batch by batch."""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from evaluation.accounting import image_tflop
from evaluation.generate import Batch, Run, SamplingOptions, generate
from evaluation.measure import Chunks, Extractor, as_arrays, run_extractor


def measure_batch(run: Run, batch: Batch, extractor: Extractor) -> dict[str, np.ndarray]:
    """What is kept of a batch, a row per image: features, cost in TFLOP and kept share of the conditional branch."""
    share = (
        torch.stack([step.conditional for step in batch.kept]).double().mean(0).cpu().numpy()
        / run.config.tokens
    )
    return as_arrays([run_extractor(extractor, batch.images)]) | {
        "tflop": image_tflop(run.config, batch.kept),
        "kept": share,
    }


def measure_samples(
    run: Run,
    options: SamplingOptions,
    labels: list[int],
    extractor: Extractor,
    folder: Path,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    title: str = "samples",
) -> Chunks:
    """Sample image i with labels[i] for all i and keep its features in `folder`, a file per batch.

    Batches that have a file are not sampled again, and process `rank` of `world` makes its share. When all processes have
    returned, the result is complete; it does not depend on their number.
    """
    chunks = Chunks(folder, len(labels), batch_size)
    todo = chunks.missing(rank, world)
    with tqdm(
        total=sum(len(chunks.ranges[c]) for c in todo), unit="img", disable=rank > 0, desc=title
    ) as bar:
        for chunk in todo:
            index = list(chunks.ranges[chunk])
            (batch,) = generate(run, index, [labels[i] for i in index], options, batch_size)
            chunks.write(chunk, measure_batch(run, batch, extractor))
            bar.update(len(index))
    return chunks


def mean_of(chunks: Chunks, name: str) -> float:
    return float(chunks.read(name).mean())
