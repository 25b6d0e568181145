"""CUDA code paths on a machine without a GPU: see tests/null_gpu/__init__.py.

The checks are tests of their own in tests/null_gpu, a process for each group, because a process sees the null GPU
from its start or not at all. Some of them by hand, here those of a training step:

    python tests/null_gpu/launch.py -m pytest --gpu -p null_gpu.values tests/null_gpu/check_counts.py -k training
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from null_gpu import build

ROOT = Path(__file__).parent.parent
TIMEOUT = 300  # seconds for one group

# Scripts read losses and gradients back. Without the caching allocator, all memory that nobody wrote is zero.
ZEROS = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Variables of a process that sees the null GPU; skips where it cannot be built."""
    try:
        variables = build.environment()
    except build.CannotBuild as reason:
        pytest.skip(str(reason))
    of_the_cpu = ("CUDA_VISIBLE_DEVICES", "ACCELERATE_MIXED_PRECISION")
    inherited = {name: value for name, value in os.environ.items() if name not in of_the_cpu}
    return {**inherited, "OMP_NUM_THREADS": "1", **variables}


def run_pytest(environment: dict[str, str], *arguments: str) -> None:
    """Run tests in a process on the null GPU; what it printed is the message if one fails."""
    command = [sys.executable, "-m", "pytest", "--gpu", "-q", "-p", "null_gpu.values", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def check(group: str) -> str:
    return f"tests/null_gpu/check_{group}.py"


def files_with_cuda_tests() -> list[str]:
    files = [file for file in Path(__file__).parent.glob("test_*.py") if "mark.cuda" in file.read_text()]
    return sorted(str(file) for file in files if file != Path(__file__))


# Name -> arguments of pytest, and variables. "tests" are those of the suite that are skipped without a GPU: they
# run, and compare shapes and types
GROUPS: dict[str, tuple[list[str], dict[str, str]]] = {
    "counts": ([check("counts")], {}),
    "compile": ([check("compile")], {}),
    "scripts": ([check("scripts")], ZEROS),
    "processes": ([check("processes")], ZEROS),
    "capabilities": ([check("capabilities")], {}),
    "benchmarks": ([check("benchmarks")], {}),
    "tests": (["-m", "cuda", *files_with_cuda_tests()], {}),
}


@pytest.fixture(scope="module")
def running(environment) -> Iterator[dict[str, Future]]:
    """All groups, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        futures = {}
        for name, (arguments, variables) in GROUPS.items():
            futures[name] = pool.submit(run_pytest, environment | variables, *arguments)
        yield futures


@pytest.mark.parametrize("group", GROUPS)
def test_on_the_null_gpu(group, running):
    running[group].result()


@pytest.mark.parametrize(
    "missing, reason",
    [
        ("cc", "needs a C compiler"),
        ("nm", "needs nm"),
        ("cuda", "needs PyTorch for CUDA 13, and this one is for no CUDA"),
        ("headers", "needs driver_types.h"),
    ],
)
def test_a_machine_that_cannot_build_it(missing, reason, monkeypatch):
    tools = {"cc": "/bin/cc", "gcc": None, "nm": "/bin/nm"}
    if missing in tools:
        tools[missing] = None
    monkeypatch.setattr(build.shutil, "which", tools.get)
    monkeypatch.setattr(build, "cuda_version", lambda: None if missing == "cuda" else "13.0")
    monkeypatch.setattr(build, "find_headers", lambda: None if missing == "headers" else ROOT)
    with pytest.raises(build.CannotBuild, match=reason):
        build.build()
