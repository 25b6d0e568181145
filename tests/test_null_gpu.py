"""CUDA code paths on a machine without a GPU: see tests/null_gpu/__init__.py.

The checks are tests of their own in tests/null_gpu, a process for each group, because a process sees the null GPU
from its start or not at all. Some of them by hand, here those of a training step:

    python tests/null_gpu/launch.py -m pytest --gpu -p null_gpu.values tests/null_gpu/check_counts.py -k training
"""

import os
import subprocess
import sys
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
    visible = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return {**visible, **variables}


def run_pytest(environment: dict[str, str], *arguments: str) -> None:
    """Run tests in a process on the null GPU; what it printed is the message if one fails."""
    command = [sys.executable, "-m", "pytest", "--gpu", "-q", "-p", "null_gpu.values", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("group", ["counts", "capabilities", "compile", "benchmarks"])
def test_checks(group, environment):
    run_pytest(environment, f"tests/null_gpu/check_{group}.py")


@pytest.mark.parametrize("group", ["scripts", "processes"])
def test_checks_that_read_values(group, environment):
    run_pytest(environment | ZEROS, f"tests/null_gpu/check_{group}.py")


def test_cuda_tests_of_the_suite(environment):
    """Those that are skipped without a GPU: they run, and compare shapes and types."""
    files = [file for file in Path(__file__).parent.glob("test_*.py") if "mark.cuda" in file.read_text()]
    run_pytest(environment, "-m", "cuda", *sorted(str(file) for file in files if file != Path(__file__)))


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
