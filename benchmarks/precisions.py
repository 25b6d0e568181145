"""Forward and backward pass in float32 and bfloat16, ours and the textbook version in turn, and where time goes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.meters import medians
from benchmarks.report import Row
from benchmarks.step_functions import StepFunction, training_loss
from benchmarks.workload import Case, Setup, Workload, build_workload

PRECISIONS = {"float32": False, "bfloat16": True}

# Kind -> beginnings of the names of its operations. Everything within the network's own attention is attention
KINDS = {
    "attention": ("dc_dit::attend", "aten::_scaled_dot_product"),
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear"),
    "convolutions": ("aten::convolution", "aten::mkldnn_conv", "aten::_convolution"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_"),
    "sums and products of elements": ("aten::add", "aten::mul", "aten::sum", "aten::sub", "aten::div"),
    "norms": ("aten::native_layer_norm", "aten::native_group_norm", "aten::_fused_rms_norm"),
    "GELU and SiLU": ("aten::gelu", "aten::silu"),
    "gathers and sums per sample": ("aten::index", "aten::_embedding_bag", "aten::embedding"),
}


def measure_precisions(case: Case, setup: Setup) -> list[Row]:
    """One row with milliseconds of all four in turn, and ratios textbook / ours."""
    passes = four_passes(build_workload(case.config(), case.batch, setup))
    times = medians(passes, setup.device, setup.seconds)
    row: Row = {**case.columns}
    for precision in PRECISIONS:
        plain = times["plain", precision]
        ours = times["ours", precision]
        row[f"plain {precision} ms"] = plain * 1e3
        row[f"ours {precision} ms"] = ours * 1e3
        row[f"ratio {precision}"] = plain / ours
    row["float32 / bfloat16, ours"] = times["ours", "float32"] / times["ours", "bfloat16"]
    return [row]


def list_shares(case: Case, setup: Setup) -> list[Row]:
    """Where the time of each of the four goes, on a CPU."""
    rows: list[Row] = []
    for (version, precision), run in four_passes(build_workload(case.config(), case.batch, setup)).items():
        run()  # warm-up
        rows.append({"version": version, "precision": precision, **case.columns, **shares_of(run)})
    return rows


def shares_of(run: StepFunction) -> dict[str, float]:
    """The share of every kind of operation in the time of a function on a CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    times = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiler.events():
        times[kind_of(event)] += event.self_cpu_time_total
    whole = sum(times.values())
    return {kind: time / whole for kind, time in times.items()}


def four_passes(workload: Workload) -> dict[tuple[str, str], StepFunction]:
    """(version, precision) -> a forward and a backward pass on the same weights and tokens."""
    passes: dict[tuple[str, str], StepFunction] = {}
    for precision, bf16 in PRECISIONS.items():
        chosen = replace(workload, bf16=bf16)
        passes["plain", precision] = both_passes(chosen, training_loss(chosen, chosen.textbook_forward))
        passes["ours", precision] = both_passes(chosen, training_loss(chosen, chosen.model))
    return passes


def both_passes(workload: Workload, loss: Callable[[], Tensor]) -> StepFunction:
    """A forward and a backward pass, whose gradients go nowhere."""

    def run() -> None:
        loss().backward()
        workload.model.zero_grad()

    return run


def kind_of(event: Any) -> str:
    """The kind of an event of the profiler: attention within attention, otherwise the innermost operation's."""
    found = [kind for kind in map(own_kind, lineage(event)) if kind is not None]
    if "attention" in found:
        return "attention"
    return found[0] if found else "other"


def own_kind(event: Any) -> str | None:
    """The kind that an event's name says."""
    for kind, beginnings in KINDS.items():
        if event.name.startswith(beginnings):
            return kind
    return None


def lineage(event: Any) -> Iterator[Any]:
    """An event, then those that it is part of, the innermost first."""
    while event is not None:
        yield event
        event = event.cpu_parent
