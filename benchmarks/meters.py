"""Meters: time in seconds, memory kept for the backward pass and at the peak in bytes, differences."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

LEAST_ROUNDS = 3

Key = TypeVar("Key", bound=Hashable)  # names what is measured

# ------------------------------------------------------------------------------------------------ time


def medians(
    functions: Mapping[Key, Callable[[], object]], device: torch.device, seconds: float
) -> dict[Key, float]:
    """Median time of each function in seconds.

    The functions take turns for about `seconds`, so that a drift of the machine affects all of them alike.
    """
    times: dict[Key, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()  # warm-up
    end = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < end or rounds < LEAST_ROUNDS:
        rounds += 1
        for name, function in functions.items():
            times[name].append(time_once(function, device))
    return {name: statistics.median(values) for name, values in times.items()}


def time_once(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of five: the rate that MFU is a share of."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    times = [time_once(lambda: a @ b, device) for _ in range(5)]
    return 2 * size**3 / min(times)


# ------------------------------------------------------------------------------------------------ memory


def saved_bytes(function: Callable[[], object], known: Sequence[Tensor]) -> int:
    """Memory that a forward pass keeps for its backward pass, beyond `known` weights and inputs."""
    sizes: dict[int, int] = {}  # identity of a storage -> bytes

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()  # fake tensors have storages, too, but no addresses
        # The tensor itself would hold the graph that holds it, and neither would ever be freed
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    known_storages = {tensor.untyped_storage()._cdata for tensor in known}
    del output  # until here it kept the graph alive, and so every storage
    return sum(size for storage, size in sizes.items() if storage not in known_storages)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Largest growth of allocated memory while a function runs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before

    # On a CPU the profiler reports every allocation and release
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    level = 0
    peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


# ------------------------------------------------------------------------------------------------ results


def largest_difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of corresponding tensors, relative to the largest value that is expected."""
    differences = []
    for ours, wanted in zip(results, expected):
        error = (ours.float() - wanted.float()).abs().max()
        scale = wanted.float().abs().max().clamp(min=1e-20)
        differences.append((error / scale).item())
    return max(differences)
