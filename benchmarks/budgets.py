"""Time of sampling as the budget falls, against the FLOPs that it leaves."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch

from benchmarks.meters import medians
from benchmarks.report import Row
from benchmarks.step_functions import LITE_DROPPED
from benchmarks.workload import Case, Setup, Workload, build_workload, downsampling
from sampling.accounting import image_tflop
from sampling.budgets import ALL, Budget
from sampling.cuda_graph import GraphedDenoiser
from sampling.denoising import sample_latents
from sampling.load import TrainedModel
from sampling.options import SamplingOptions

DROPPED = (0.0, 0.3, 0.6, 0.9)
STEPS = 2  # per measurement
GUIDED = SamplingOptions(cfg_scale=1.5, num_sampling_steps=STEPS, sampler="ddim")

Key = tuple[str, float]  # the way of sampling, the dropped fraction


def measure_budgets(case: Case, setup: Setup) -> list[Row]:
    """Milliseconds of denoising per image and step, at every budget: guided, with Lite-CFG, and as CUDA graphs.

    Time and FLOPs are shares of guided sampling with nothing dropped; "excess" is the first by the second. The
    router's probabilities are fixed, and everything else is what sample.py runs.
    """
    workload = build_workload(case.config(), case.batch, setup)
    runs = sampling_runs(workload)
    tflop = {key: run() for key, run in runs.items()}
    seconds = medians(runs, setup.device, setup.seconds)

    first = next(iter(runs))
    rows = []
    for key in runs:
        time = seconds[key] / seconds[first]
        flops = tflop[key] / tflop[first]
        rows.append(
            {
                **case.columns,
                "way": key[0],
                "dropped": key[1],
                "ms per image and step": seconds[key] * 1e3 / case.batch / STEPS,
                "GFLOP per image and step": tflop[key] * 1e3 / STEPS,
                "time": time,
                "FLOPs": flops,
                "excess": time / flops,
            }
        )
    return rows


def sampling_runs(workload: Workload) -> dict[Key, Callable[[], float]]:
    """A function for every way to sample and every budget.

    With Lite-CFG the unconditional branch drops 90 % of its tokens at every budget of the other branch.
    """
    options = dataclasses.replace(GUIDED, bf16=workload.bf16)
    lite = dataclasses.replace(options, uncond=fraction(LITE_DROPPED))
    plain = trained_model(workload, workload.model)
    runs: dict[Key, Callable[[], float]] = {}
    for way, own in (("guidance", options), ("Lite-CFG", lite)):
        for dropped in DROPPED:
            budget = fraction(dropped)
            runs[way, dropped] = sampling_run(workload, plain, dataclasses.replace(own, budget=budget))
    if workload.x.device.type != "cuda":
        return runs

    # Graphs need numbers of tokens that are known in advance
    graphed = trained_model(workload, GraphedDenoiser(workload.model))
    for dropped in DROPPED:
        tokens = workload.config.tokens / downsampling(workload.config) * (1 - dropped)
        budget = Budget.tokens(max(2, round(tokens)))
        runs["CUDA graph", dropped] = sampling_run(
            workload, graphed, dataclasses.replace(options, budget=budget)
        )
    return runs


def fraction(dropped: float) -> Budget:
    """The budget of a dropped fraction."""
    return Budget.fraction(dropped) if dropped else ALL


def trained_model(workload: Workload, model: torch.nn.Module) -> TrainedModel:
    """The model as sampling takes it. There is no autoencoder, because nothing is decoded."""
    return TrainedModel(model, workload.config, cast(Any, None), None, step=0, fingerprint="")


def sampling_run(workload: Workload, trained: TrainedModel, options: SamplingOptions) -> Callable[[], float]:
    """A function that samples a batch and returns TFLOP per image."""
    images = len(workload.x)
    indices = list(range(images))
    labels = [0] * images
    # Both branches of an image have its mask
    prob = workload.prob.repeat(2, 1)

    @torch.inference_mode()
    def run() -> float:
        with workload.masked(prob):
            _, kept = sample_latents(trained, indices, labels, options)
        return float(image_tflop(workload.config, kept).mean())

    return run
