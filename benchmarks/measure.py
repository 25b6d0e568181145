"""Measuring: medians of interleaved repeats in one process, memory kept for backward, peak memory, tables and JSON."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from config import UserError
from data.files import write_file

Variants = dict[str, Callable[[], Tensor]]  # name -> forward pass


def medians(
    functions: dict[str, Callable[[], object]], device: torch.device, seconds: float, least: int = 3
) -> dict[str, float]:
    """Median time of each function in seconds; they run in turn for about `seconds`: drifts of the machine hit all alike."""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    end, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or rounds < least:
        rounds += 1
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def saved_bytes(function: Callable[[], object], known: list[Tensor]) -> int:
    """Memory that a forward pass keeps for its backward pass, beyond the tensors `known` (weights and inputs)."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()  # noqa: F841  keeps the graph, and so the addresses
    return sum(storages.values()) - sum(
        storages.get(x.untyped_storage().data_ptr(), 0) for x in unique(known)
    )


def unique(tensors: list[Tensor]) -> list[Tensor]:
    return list({x.untyped_storage().data_ptr(): x for x in tensors}.values())


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Largest growth of allocated memory while a function runs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        function()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def compare(
    variants: Variants, inputs: list[Tensor], module: nn.Module | None, device: torch.device, seconds: float
) -> dict:
    """Time and memory of forward, and of forward + backward, of several ways to compute the same.

    Gradients go to `inputs` (those that require them) and to the module's parameters.

    Returns:
        name -> {"forward_ms", "both_ms", "saved_mb", "peak_mb"}; and under "error" the largest difference of outputs and
        gradients from the first variant's, relative to their largest value.
    """
    wanted = [x for x in [*inputs, *(module.parameters() if module else ())] if x.requires_grad]
    known = [*inputs, *(module.parameters() if module else ()), *(module.buffers() if module else ())]

    def both(function):
        output = function()
        return [output, *torch.autograd.grad(output, wanted, gradient)]

    with torch.no_grad():
        gradient = torch.randn_like(next(iter(variants.values()))())
        forward = medians(variants, device, seconds / 3)
    training = {name: (lambda function=function: both(function)) for name, function in variants.items()}
    passes = medians(training, device, seconds * 2 / 3)
    results = {
        name: {
            "forward_ms": forward[name] * 1e3,
            "both_ms": passes[name] * 1e3,
            "saved_mb": saved_bytes(variants[name], known) / 1e6,
            "peak_mb": peak_bytes(training[name], device) / 1e6,
        }
        for name in variants
    }
    first, *others = (function() for function in training.values())
    return results | {"error": max(difference(first, other) for other in others)}


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    pairs = [(a.float(), b.float()) for a, b in zip(ours, theirs)]
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-20)).item() for a, b in pairs)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of several: what MFU is a share of."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def machine(device: torch.device) -> str:
    """The machine in words."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpu = Path("/proc/cpuinfo")
        lines = cpu.read_text().splitlines() if cpu.exists() else []
        name = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
            platform.processor(),
        )
        name += f", {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return f"{name}; torch {torch.__version__}"


def print_table(title: str, rows: list[dict]) -> None:
    """Rows with the same keys as a Markdown table; numbers with three figures."""
    text = [[value if isinstance(value, str) else f"{value:.3g}" for value in row.values()] for row in rows]
    print(f"\n{title}\n")
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    print("\n".join("| " + " | ".join(line) + " |" for line in text), flush=True)


def read_json(path: Path) -> dict[str, dict[str, list[dict]]]:
    """Machine -> title -> rows of an earlier measurement; empty where there is no file.

    Raises:
        UserError: the file holds something else.
    """
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
        if not all(isinstance(tables, dict) for tables in content.values()):
            raise ValueError
    except (OSError, ValueError, AttributeError):
        raise UserError(f"--output '{path}': holds no measurements to add to; give another file") from None
    return content


def add_to_json(path: Path, title: str, rows: list[dict], device: torch.device) -> None:
    """Add a table to a file; it replaces the table with this title of this machine, and no other."""
    content = read_json(path)
    content.setdefault(machine(device), {})[title] = rows
    write_file(path, lambda stream: stream.write(json.dumps(content, indent=1).encode()))
