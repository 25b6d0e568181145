"""What a step launches, waits for and allocates, and which kernels take its time, by torch.profiler."""

from collections import Counter
from typing import Any

import torch
from torch.autograd import DeviceType

from benchmarks.meters import synchronize
from benchmarks.report import Row
from benchmarks.step_functions import StepFunction, TrainingStep, in_turn, sampling_step, with_mask
from benchmarks.workload import Case, Setup, build_workload, varied_masks

MOST_KERNELS = 20


def count_launches(case: Case, setup: Setup) -> list[Row]:
    """A row for a training step and one for a guided sampling step."""
    workload = build_workload(case.config(), case.batch, setup)
    training = TrainingStep(workload, workload.model)
    masks = varied_masks(workload)
    steps: dict[str, list[StepFunction]] = {
        "training": [with_mask(workload, mask, training) for mask in masks],
        "guided sampling": [sampling_step(workload, workload.model, mask) for mask in masks],
    }
    rows = []
    for name, variants in steps.items():
        forget_memory(setup)
        step = in_turn(variants)
        counts = Counter(kind_of(event) for event in profile_events(step, setup))
        memory = {"allocated MB": 0.0, "reserved MB": 0.0}
        if setup.device.type == "cuda":
            memory["allocated MB"] = torch.cuda.max_memory_allocated(setup.device) / 1e6
            memory["reserved MB"] = torch.cuda.max_memory_reserved(setup.device) / 1e6
        rows.append(
            {
                "step": name,
                "model": case.model,
                "batch": case.batch,
                "operations": counts["operation"],
                "launches": counts["kernel"],
                "waits": counts["wait"],
                "reads by the host": counts["read"],
                "other copies": counts["copy"],
                **memory,
            }
        )
    return rows


def forget_memory(setup: Setup) -> None:
    """Give back what PyTorch's allocator holds, so that the next step's memory is its own."""
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setup.device)


def list_kernels(case: Case, setup: Setup) -> list[Row]:
    """The kernels that take most time in a training step; on a CPU the operations."""
    workload = build_workload(case.config(), case.batch, setup)
    step = TrainingStep(workload, workload.model)
    step()  # warm-up
    with torch.profiler.profile() as profiler:
        step()
        synchronize(setup.device)
    averages = profiler.key_averages()
    # Kernels, where there are any
    kinds = {average.device_type for average in averages}
    kind = DeviceType.CUDA if DeviceType.CUDA in kinds else DeviceType.CPU
    times = {}
    for average in averages:
        if average.device_type == kind and not average.is_user_annotation:
            time = average.self_cpu_time_total if kind == DeviceType.CPU else average.self_device_time_total
            times[average.key] = (time / 1e3, average.count)
    whole = sum(time for time, _ in times.values()) or 1.0
    longest = sorted(times.items(), key=lambda item: item[1], reverse=True)[:MOST_KERNELS]
    rows: list[Row] = []
    for name, (time, calls) in longest:
        rows.append({"name": name[:100], "calls": calls, "ms": time, "share": time / whole})
    return rows


def profile_events(step: StepFunction, setup: Setup) -> list[Any]:
    """The profiler's events of one step, after a warm-up."""
    step()
    synchronize(setup.device)
    with torch.profiler.profile() as profiler:
        step()
    return list(profiler.events())


def kind_of(event: Any) -> str:
    """What an event of the profiler is."""
    name = event.name
    if event.is_user_annotation:
        return "annotation"
    if event.device_type == DeviceType.CUDA:
        if name.startswith("Memcpy DtoH"):
            return "read"
        return "copy" if name.startswith(("Memcpy", "Memset")) else "kernel"
    if name.startswith("cuda"):
        return "wait" if name.endswith("Synchronize") else "call"
    return "operation" if event.cpu_parent is None else "part of an operation"
