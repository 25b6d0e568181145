"""The null GPU's counters, read from within a process that runs on it."""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Counts:
    """What the host asked of the device. The fields are the counters of counters.h, in their order."""

    launches: int = 0  # kernels, products and convolutions launched one by one
    products: int = 0  # those among them that are matrix products
    convolutions: int = 0  # those among them that are convolutions of cuDNN
    to_host: int = 0
    to_device: int = 0
    on_device: int = 0
    fills: int = 0
    waits: int = 0  # for a stream, for the device, or in a blocking copy
    event_waits: int = 0
    allocations: int = 0  # that the caching allocator could not serve
    captured: int = 0  # launches recorded into a graph
    graph_launches: int = 0
    unsafe: int = 0  # calls that a capture forbids
    kernels: dict[str, int] = field(default_factory=dict)  # launches by name, most frequent first


def library() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ["LD_PRELOAD"])


@contextmanager
def counting() -> Iterator[Counts]:
    """Count what happens in the block; the value is complete when the block has ended."""
    counts = Counts()
    library().null_gpu_reset()
    yield counts
    names = [name for name in Counts.__dataclass_fields__ if name != "kernels"]
    values = (ctypes.c_long * len(names))()
    library().null_gpu_read(values)
    for name, value in zip(names, values):
        setattr(counts, name, value)
    counts.kernels = read_kernels()


def read_kernels() -> dict[str, int]:
    """Launches of every kernel by its name in C++, most frequent first."""
    mangled, launches = ctypes.c_char_p(), ctypes.c_long()
    found: list[tuple[str, int]] = []
    place = library().null_gpu_next_kernel(0, ctypes.byref(mangled), ctypes.byref(launches))
    while place:
        found.append(((mangled.value or b"").decode(), launches.value))
        place = library().null_gpu_next_kernel(place, ctypes.byref(mangled), ctypes.byref(launches))
    text = "\n".join(name for name, _ in found)
    names = subprocess.run(["c++filt"], input=text, capture_output=True, text=True).stdout.splitlines()
    kernels: dict[str, int] = {}
    for name, (_, number) in zip(names, found):
        kernels[name] = kernels.get(name, 0) + number
    return dict(sorted(kernels.items(), key=lambda item: -item[1]))
