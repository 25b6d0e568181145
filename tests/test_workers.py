"""Loader processes: shared memory that is too small, deaths and standstills end in bounded time."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.utils.data import Dataset

from data import workers

ROOT = Path(__file__).parent.parent


class Numbers(NamedTuple):
    values: torch.Tensor
    empty: torch.Tensor
    name: str


class Source(Dataset):
    """Item i is a tensor of i with `size` columns; `fault` is called with i first."""

    def __init__(self, fault=lambda index: None, size: int = 5):
        self.fault = fault
        self.size = size

    def __getitem__(self, index):
        self.fault(index)
        return torch.full((3, self.size), float(index))


def collate(items):
    # Strides that are not the usual ones
    return Numbers(torch.stack(items).permute(0, 2, 1), torch.empty(0, 3), f"from {items[0][0, 0]:.0f}")


def read_all(source: Source, count: int) -> list[Numbers]:
    batches = [[0, 1], [2], [3, 4, 5], [6]]
    loader = workers.make_loader(source, batches, collate, count, False, "--num-workers")
    return list(workers.read(loader, "--num-workers"))


def check_equal(found: list[Numbers], expected: list[Numbers]) -> None:
    assert [batch.name for batch in found] == [batch.name for batch in expected]
    for batch, other in zip(found, expected):
        assert torch.equal(batch.values, other.values)
        assert batch.values.stride() == other.values.stride()
        assert batch.empty.shape == other.empty.shape


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_that_do_not_fit_into_shared_memory_take_another_way(monkeypatch, capsys):
    expected = read_all(Source(), 0)
    check_equal(read_all(Source(), 2), expected)
    assert capsys.readouterr().out == ""

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    check_equal(read_all(Source(), 2), expected)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: --num-workers 2: shared memory (/dev/shm, ")
    assert "too little for the batches" in line


def test_as_many_processes_as_shared_memory_has_room_for(monkeypatch, capsys):
    found = SimpleNamespace(f_bavail=16, f_frsize=4096, f_blocks=16)
    monkeypatch.setattr(os, "statvfs", lambda path: found)
    assert workers.most_workers() == 2
    found.f_bavail = 4
    check_equal(read_all(Source(), 2), read_all(Source(), 0))
    assert "warning: --num-workers 2: shared memory" in capsys.readouterr().out
    found.f_blocks = 0  # no limit
    assert workers.most_workers() > 1000


def in_a_process(code: str, *prefix: str) -> subprocess.CompletedProcess:
    """Run a program that may use this file, in bounded time. It ends with the last of its processes."""
    source = f"import os, signal, time, cli, test_workers\nfrom data import workers\n{code}"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [*prefix, sys.executable, "-c", source]
    program = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = program.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, program.returncode, stdout, stderr)


FAULTS = {
    "os.kill(os.getpid(), signal.SIGKILL)": "a loader process has died (killed by SIGKILL)",
    "time.sleep(1000)": "no batch for 1 s",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lost_loader_process_ends_the_program(fault):
    code = f"""
workers.PATIENCE = 1.0
source = test_workers.Source(lambda index: index == 3 and {fault})
cli.run(lambda: test_workers.read_all(source, 2))
"""
    result = in_a_process(code)
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"error: --num-workers 2: {FAULTS[fault]}")
    assert "run the same command again" in line
    assert "Traceback" not in result.stderr


def test_64_kilobytes_of_shared_memory():
    """A real one, where this user may mount it."""
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "sh", "-c", mount]).returncode:
        pytest.skip("needs the right to mount")
    prefix = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    result = in_a_process("print(len(test_workers.read_all(test_workers.Source(), 2)))", *prefix)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "4"
    assert "warning: --num-workers 2: shared memory (/dev/shm" in result.stdout


HALF_A_BATCH = """
import multiprocessing.connection
send = multiprocessing.connection.Connection._send
def send_half(connection, buffer):
    if len(buffer) > 100_000:
        send(connection, buffer[:70_000])
        os.kill(os.getpid(), signal.SIGKILL)
    send(connection, buffer)
multiprocessing.connection.Connection._send = send_half
def full(value):
    raise RuntimeError("shared memory is full")
workers.Tensor.share_memory_ = full
workers.POLL = 1.0
"""


def test_a_loader_process_killed_within_a_batch(tmp_path):
    """Half of the batch is in the pipe, whose other end other processes hold open."""
    code = f"""{HALF_A_BATCH}
source = test_workers.Source(lambda index: None, size=500_000)
cli.run(lambda: test_workers.read_all(source, 2))
"""
    result = in_a_process(code)
    assert result.returncode == 1, result.stderr
    killed = "error: --num-workers 2: a loader process has died (killed by SIGKILL)"
    assert result.stderr.splitlines()[-1].startswith(killed)


def test_loader_processes_end_when_the_program_is_killed():
    """Even with batches that nobody reads any more, too large for the pipe."""
    in_halves = HALF_A_BATCH.replace(
        "os.kill(os.getpid(), signal.SIGKILL)", "return send(connection, buffer[70_000:])"
    )
    code = f"""{in_halves}
workers.ORPHAN_POLL = 0.1
source = test_workers.Source(lambda index: None, size=500_000)
loader = workers.make_loader(source, [[k] for k in range(20)], test_workers.collate, 2, False, "--num-workers")
batches = workers.read(loader, "--num-workers")
next(batches)
time.sleep(1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    # The loader processes hold the pipe of the output open until they end
    assert in_a_process(code).returncode == -signal.SIGKILL


def test_loader_processes_end_when_the_program_is_killed_while_they_start():
    """By then, the parent that they see is another process."""
    code = """
begin = workers.begin_worker
def begin_late(worker):
    time.sleep(1)
    begin(worker)
workers.begin_worker = begin_late
workers.ORPHAN_POLL = 0.1
source = test_workers.Source()
loader = workers.make_loader(source, [[k] for k in range(20)], test_workers.collate, 2, False, "--num-workers")
iterator = iter(loader)
os.kill(os.getpid(), signal.SIGKILL)
"""
    # The loader processes hold the pipe of the output open until they end
    assert in_a_process(code).returncode == -signal.SIGKILL
