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

# How a budget is spent -> the options at a dropped fraction
Way = Callable[[float], SamplingOptions]


def measure_budgets(case: Case, setup: Setup) -> list[Row]:
    """Milliseconds of denoising per image and step, at every budget: guided, with Lite-CFG, and as CUDA graphs.

    Time and FLOPs are shares of guided sampling with nothing dropped; "excess" is the first by the second. The
    router's probabilities are fixed, and everything else is what sample.py runs. With Lite-CFG the unconditional
    branch drops 90 % of its tokens at every budget of the other branch.
    """
    workload = build_workload(case.config(), case.batch, setup)
    tokens = workload.config.tokens / downsampling(workload.config)

    def guided(dropped: float) -> SamplingOptions:
        return dataclasses.replace(GUIDED, bf16=setup.bf16, budget=fraction(dropped))

    def lite(dropped: float) -> SamplingOptions:
        return dataclasses.replace(guided(dropped), uncond=fraction(LITE_DROPPED))

    def graph(dropped: float) -> SamplingOptions:
        kept = max(2, round(tokens * (1 - dropped)))
        return dataclasses.replace(guided(dropped), budget=Budget.tokens(kept))

    # Every way at every budget
    plain = trained_model(workload, workload.model)
    ways: dict[str, tuple[Way, TrainedModel]] = {"guidance": (guided, plain), "Lite-CFG": (lite, plain)}
    if setup.device.type == "cuda":
        ways["CUDA graph"] = (graph, trained_model(workload, GraphedDenoiser(workload.model)))
    runs: dict[tuple[str, float], Callable[[], float]] = {}
    for way, (options, trained) in ways.items():
        for dropped in DROPPED:
            runs[way, dropped] = sampling_run(workload, trained, options(dropped))
    cost = {key: run() for key, run in runs.items()}
    times = medians(runs, setup.device, setup.seconds)

    first = next(iter(runs))
    rows = []
    for way, dropped in runs:
        time = times[way, dropped] / times[first]
        flops = cost[way, dropped] / cost[first]
        rows.append(
            {
                **case.columns,
                "way": way,
                "dropped": dropped,
                "ms per image and step": times[way, dropped] * 1e3 / case.batch / STEPS,
                "GFLOP per image and step": cost[way, dropped] * 1e3 / STEPS,
                "time": time,
                "FLOPs": flops,
                "excess": time / flops,
            }
        )
    return rows


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
