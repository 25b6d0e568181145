"""Whole training and sampling steps: against the textbook version and a static DiT, as a share of the
machine's peak, and as tokens drop, batches grow and images grow.
"""

import copy
import statistics

import torch

from benchmarks.meters import largest_difference, matmul_peak, medians, peak_bytes
from benchmarks.report import Row
from benchmarks.step_functions import StepFunction, TrainingStep, in_turn, sampling_step, with_mask
from benchmarks.workload import (
    Case,
    Setup,
    Workload,
    build_workload,
    downsampling,
    fixed_probabilities,
    token_counts,
    varied_masks,
)
from config import Config, switch_router_off
from models import architecture, compile_parts
from models.dc_dit import DCDiT
from models.dit import DiT
from models.flops import TokenCounts, total_flops
from models.tail_drop import keep_top
from models.types import DenoiserOutput
from sampling.cuda_graph import GraphedDenoiser

DROPPED = (0.0, 0.2, 0.4, 0.6)
FORWARDS_PER_STEP = 3  # in FLOPs: a backward pass costs as much as two forward passes


def measure_step(case: Case, setup: Setup, compiled: bool = False) -> list[Row]:
    """One configuration's row: step times in milliseconds, memory in MB, ratios textbook / ours.

    Batches with different numbers of tokens take turns, so that compiled code must serve any number, as in
    training.

    Args:
        compiled: with torch.compile.
    """
    peak = matmul_peak(setup.device, torch.bfloat16 if setup.bf16 else torch.float32)
    workload = build_workload(case.config(), case.batch, setup)
    batch = case.batch
    if compiled:
        compile_model(workload.model)
    masks = varied_masks(workload)
    ours = TrainingStep(workload, workload.model)
    plain = TrainingStep(workload, workload.textbook_forward, is_textbook=True)

    # Time
    training = training_times(ours, plain, masks, setup)
    sampling = sampling_times(workload, masks, setup)
    flops = batch * statistics.mean(mask_flops(workload, mask) for mask in masks)

    # Memory
    memory = {
        "saved plain MB": plain.saved_bytes() / 1e6,
        "saved ours MB": ours.saved_bytes() / 1e6,
        "peak plain MB": peak_bytes(plain, setup.device) / 1e6,
        "peak ours MB": peak_bytes(ours, setup.device) / 1e6,
    }

    # A static DiT of the same size
    static_config = static_twin(workload.config)
    static_time = measure_static(static_config, batch, setup, compiled)
    static_flops = batch * total_flops(architecture(static_config), TokenCounts(0, 0))
    row = {
        **case.columns,
        "train plain ms": training["plain"] * 1e3,
        "train ours ms": training["ours"] * 1e3,
        "train ratio": training["plain"] / training["ours"],
        "train DiT on 2 x 2 patches ms": static_time * 1e3,
        "the same, scaled to equal FLOPs": static_time * 1e3 * flops / static_flops,
        "a product reaches TFLOP/s": peak / 1e12,
        "MFU": FORWARDS_PER_STEP * flops / training["ours"] / peak,
        **memory,
        "sample plain ms": sampling["plain"] * 1e3,
        "sample ours ms": sampling["ours"] * 1e3,
        "sample ratio": sampling["plain"] / sampling["ours"],
        "Lite-CFG ratio": sampling["ours"] / sampling["lite"],
    }
    return [row]


def training_times(
    ours: TrainingStep, plain: TrainingStep, masks: list[torch.Tensor], setup: Setup
) -> dict[str, float]:
    """Seconds of a training step on these masks in turn, in both versions."""
    steps: dict[str, StepFunction] = {}
    for name, step in (("ours", ours), ("plain", plain)):
        steps[name] = in_turn([with_mask(step.workload, mask, step) for mask in masks])
    return medians(steps, setup.device, setup.seconds / 2)


def sampling_times(workload: Workload, masks: list[torch.Tensor], setup: Setup) -> dict[str, float]:
    """Seconds of a guided sampling step on these masks in turn: in both versions, and with Lite-CFG."""
    model = workload.sampled_model
    textbook = workload.textbook_forward
    steps = {
        "ours": in_turn([sampling_step(workload, model, mask) for mask in masks]),
        "plain": in_turn([sampling_step(workload, textbook, mask) for mask in masks]),
        "lite": in_turn([sampling_step(workload, model, mask, lite=True) for mask in masks]),
    }
    return medians(steps, setup.device, setup.seconds / 2)


def mask_flops(workload: Workload, prob: torch.Tensor) -> float:
    """FLOPs per image of a forward pass on the tokens that `prob` keeps."""
    return total_flops(architecture(workload.config), token_counts(prob))


def compile_model(model: DCDiT | DiT) -> None:
    """Compile a model as training does."""
    torch._dynamo.reset()  # earlier compilations count towards a limit
    compile_parts(model)


def static_twin(config: Config) -> Config:
    """The configuration of the static DiT of the same size on patches of 2 x 2."""
    static = copy.deepcopy(config)
    static.model.patch_size = 2
    switch_router_off(static.training)
    return static


def measure_static(config: Config, batch: int, setup: Setup, compiled: bool) -> float:
    """Seconds of a training step of a static DiT."""
    static = build_workload(config, batch, setup)
    if compiled:
        compile_model(static.model)
    step = TrainingStep(static, static.model)
    return medians({"static": step}, setup.device, setup.seconds / 4)["static"]


def measure_graph(case: Case, setup: Setup) -> list[Row]:
    """Guided sampling steps under a token budget, their kernels launched one by one and as a CUDA graph."""
    batch = case.batch
    workload = build_workload(case.config(), batch, setup)
    length = workload.prob.shape[1]
    tokens = length // int(downsampling(workload.config))
    budget = [tokens] * (2 * batch)  # both branches
    kept = keep_top(torch.rand_like(workload.prob), tokens)
    prob = torch.where(kept, 0.75, 0.25)
    graphed = GraphedDenoiser(workload.model)

    def plain_forward(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> DenoiserOutput:
        return workload.model(x, t, labels, tokens=budget)

    def graph_forward(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> DenoiserOutput:
        return graphed(x, t, labels, tokens=budget)

    plain = sampling_step(workload, plain_forward, prob)
    graph = sampling_step(workload, graph_forward, prob)
    times = medians({"plain": plain, "graph": graph}, setup.device, setup.seconds)
    row = {
        **case.columns,
        "tokens": tokens,
        "plain ms": times["plain"] * 1e3,
        "graph ms": times["graph"] * 1e3,
        "ratio": times["plain"] / times["graph"],
        "difference": largest_difference([graph()], [plain()]),
    }
    return [row]


def measure_dropping(case: Case, setup: Setup) -> list[Row]:
    """Time of a training step as tokens drop, against its FLOPs, both as shares of those without dropping."""
    workload = build_workload(case.config(), case.batch, setup)
    length = workload.prob.shape[1]
    step = TrainingStep(workload, workload.model)
    masks = {}
    for dropped in DROPPED:
        share = (1 - dropped) / downsampling(workload.config)
        masks[dropped] = fixed_probabilities(case.batch, length, share, setup.device)

    # Both as shares of the first row
    steps = {str(dropped): with_mask(workload, prob, step) for dropped, prob in masks.items()}
    times = medians(steps, setup.device, setup.seconds)
    all_time = times[str(DROPPED[0])]
    all_flops = mask_flops(workload, masks[DROPPED[0]])
    rows = []
    for dropped, prob in masks.items():
        time = times[str(dropped)]
        flops = mask_flops(workload, prob)
        rows.append(
            {
                **case.columns,
                "dropped": dropped,
                "ms": time * 1e3,
                "time": time / all_time,
                "flops": flops / all_flops,
            }
        )
    return rows


def measure_size(case: Case, setup: Setup) -> list[Row]:
    """Images per second of a training step."""
    workload = build_workload(case.config(), case.batch, setup)
    step = TrainingStep(workload, workload.model)
    time = medians({"step": step}, setup.device, setup.seconds)["step"]
    return [{**case.columns, "ms": time * 1e3, "images/s": case.batch / time}]
