"""The name of the machine, to stand beside what was measured on it."""

import platform
from pathlib import Path

import torch


def machine(device: torch.device) -> str:
    """Name of the machine: processor or GPU, threads, version of PyTorch."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        count = torch.get_num_threads()
        threads = "1 thread" if count == 1 else f"{count} threads"
        name = f"{processor_name()}, {threads}, {capability}"
    return f"{name}; torch {torch.__version__}"


def processor_name() -> str:
    """What Linux calls the processor; elsewhere what Python does."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()
