"""Loader processes that cannot keep the program waiting for ever.

A loader process hands batches over in shared memory (/dev/shm), of which a container often has 64 MB or less.
A batch that does not fit would be lost, and the program would wait for it. Here it takes the slower way through
a pipe. If a loader process dies, or none gives a batch for PATIENCE seconds, `read` raises NoBatch.
"""

import functools
import io
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

PATIENCE = 600.0  # seconds without a batch after which `read` raises NoBatch
POLL = 5.0  # seconds between two looks whether the loader processes live
DYING = 0.5  # seconds
ORPHAN_POLL = 1.0  # seconds between two looks of a loader process whether its parent lives
GRACE = 2.0  # seconds that loader processes have to end in order
SHARED_MEMORY = "/dev/shm"
# Semaphores of a loader process and of all together; each takes a page of shared memory.
WORKER_SEMAPHORES = 3
COMMON_SEMAPHORES = 8
PAGE = 4096


class NoBatch(SystemExit):
    """The loader cannot give another batch. Where nobody catches this, the program ends with one line, status 1."""


class Fetcher:
    """Asks an iterator for its items in a thread.

    A loader process that is killed may leave half a batch in the pipe, and reading that waits for ever. The thread
    does so, and the program can end.
    """

    def __init__(self, iterator: Iterator, patience: float):
        """`patience`: seconds after which `next` raises queue.Empty."""
        self._iterator = iterator
        self._patience = patience
        self._is_asked = False
        self._questions: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def next(self) -> Any:
        """The next item, None after the last. After queue.Empty, another call waits for the same item."""
        if not self._is_asked:
            self._questions.put(True)
            self._is_asked = True
        item, error = self._answers.get(timeout=self._patience)
        self._is_asked = False
        if error is not None:
            raise error
        return item

    def stop(self) -> None:
        """End the thread, unless it waits for an item."""
        self._questions.put(False)

    def _run(self) -> None:
        while self._questions.get():
            try:
                self._answers.put((next(self._iterator, None), None))
            except BaseException as error:  # raised where the item was asked for
                self._answers.put((None, error))


@dataclass(frozen=True)
class Piped:
    """A tensor on its way through a pipe, as torch.save wrote it."""

    content: bytes


def make_loader(
    dataset: Dataset,
    batches: Iterable[list],
    collate: Callable[[list], Any],
    workers: int,
    pin_memory: bool,
    option: str,
) -> DataLoader:
    """A loader for `read`. Its batches are named tuples of tensors and plain data, or exceptions.

    Args:
        batches: lists of keys of the data set, one list per batch.
        collate: joins the items of a batch.
        workers: loader processes; 0 reads in this process. Fewer start if shared memory is too small for all.
        pin_memory: put tensors into page-locked memory, for the copy to a GPU.
        option: what the user calls the number of loader processes, for messages.
    """
    most = most_workers()
    if workers > most:
        warn(f"{option} {workers}", f"is enough for {most} loader processes only")
        workers = most
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=functools.partial(collate_and_share, collate),
        num_workers=workers,
        pin_memory=pin_memory,
        timeout=min(POLL, PATIENCE) if workers else 0,
        worker_init_fn=begin_worker,
    )


def read(loader: DataLoader, option: str, patience: float | None = None) -> Generator[Any, None, None]:
    """The batches of a loader.

    Args:
        option: what the user calls the number of loader processes.
        patience: seconds to wait for a batch; None: PATIENCE.

    Raises:
        NoBatch: a loader process has died, or none gives a batch.
    """
    # Start the loader processes
    others = set(multiprocessing.active_children())
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    workers = set(multiprocessing.active_children()) - others
    # PyTorch's handler raises an error wherever this process is when a loader process dies, even in the middle
    # of a checkpoint. Without it, the wait for the next batch notices within seconds.
    signal.signal(signal.SIGCHLD, handler)
    has_warned = False
    fetcher = Fetcher(iterator, 2 * loader.timeout) if workers else None
    try:
        while True:
            if fetcher is None:
                batch = next(iterator, None)
            else:
                batch = next_batch(fetcher, workers, option, patience or PATIENCE)
            if batch is None:
                return
            if isinstance(batch, tuple) and any(isinstance(value, Piped) for value in batch):
                if not has_warned:
                    warn(
                        f"{option} {loader.num_workers}",
                        "is too little for the batches, which take a slower way",
                    )
                    has_warned = True
                batch = type(batch)(*map(from_pipe, batch))
            yield batch
    finally:
        if fetcher is not None:
            fetcher.stop()
            end_workers(iterator, workers)


def end_workers(iterator: Iterator, workers: set[BaseProcess]) -> None:
    """End the loader processes, in order if they answer within seconds and by force otherwise.

    A process that is killed may hold a lock for which PyTorch's own way of ending would wait for ever: that way is
    therefore tried first, and in a thread. By force, because they ignore other signals, and the interpreter would
    wait for one that hangs.
    """
    end_in_order = getattr(iterator, "_shutdown_workers", None)  # without processes there is none
    if end_in_order is not None:
        thread = threading.Thread(target=end_in_order, daemon=True)
        thread.start()
        thread.join(GRACE)
    for worker in workers:
        worker.kill()
    # The thread must not be inside of PyTorch when the interpreter ends, which would abort the process. It may wait
    # for the lock of a killed process, and then it stays where it is.
    if end_in_order is not None:
        thread.join(GRACE)


def next_batch(fetcher: Fetcher, workers: set[BaseProcess], option: str, patience: float) -> Any:
    """The next batch, None after the last. Raises NoBatch if a loader process is dead, or none answers in time."""
    deadline = time.monotonic() + patience
    problem = ""
    while not problem:
        try:
            return fetcher.next()
        except (RuntimeError, OSError, EOFError, queue.Empty) as error:
            # A batch of a dying process may be lost on its way, just before the process is seen to be dead
            if isinstance(error, (OSError, EOFError)):
                time.sleep(DYING)
            codes = [worker.exitcode for worker in workers if worker.exitcode]
            is_timeout = isinstance(error, queue.Empty) or str(error).startswith("DataLoader timed out")
            if codes:
                end = f"killed by {signal.Signals(-codes[0]).name}" if codes[0] < 0 else f"status {codes[0]}"
                problem = f"a loader process has died ({end}), perhaps for lack of memory"
            elif not is_timeout:
                raise
            elif time.monotonic() >= deadline:
                problem = f"no batch for {patience:.0f} s"
    remedy = "run the same command again, maybe with fewer loader processes"
    raise NoBatch(f"error: {option} {len(workers)}: {problem}; {remedy}")


def most_workers() -> int:
    """Loader processes whose semaphores fit into shared memory."""
    free_pages = free_shared_memory() // PAGE
    return max(0, (free_pages - COMMON_SEMAPHORES) // WORKER_SEMAPHORES)


def free_shared_memory() -> int:
    """Bytes; a huge number if there is no limit, or none that can be read."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return sys.maxsize
    return found.f_bavail * found.f_frsize if found.f_blocks else sys.maxsize


def warn(option: str, problem: str) -> None:
    """Print, from the first process, that shared memory is too small for the value of an option."""
    if int(os.environ.get("RANK", 0)) > 0:
        return
    free = free_shared_memory() / 1e6
    print(
        f"warning: {option}: shared memory ({SHARED_MEMORY}, {free:.3g} MB free) {problem}; "
        "give the container more (docker run --shm-size=1g) or use fewer loader processes",
        flush=True,
    )


# -------------------------------------------------------------------------------------- in the loader processes


def begin_worker(worker: int) -> None:
    """Keep a loader process alive through SIGTERM and SIGINT: the main process ends it when it stops.

    Without the main process, it ends by itself.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_without_parent, daemon=True).start()


def end_without_parent() -> None:
    """End this process when its parent has died. PyTorch's own way waits for somebody to read the last batches."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a loader process has a parent"
    # A parent that died before this line is noticed by its end of a pipe, which loader processes that were forked
    # later hold open until they end in turn
    process = os.getppid()
    while os.getppid() == process and parent.is_alive():
        time.sleep(ORPHAN_POLL)
    os._exit(1)


def collate_and_share(collate: Callable[[list], Any], items: list) -> Any:
    """Join items into a batch. A loader process moves its tensors to shared memory, or prepares them for a pipe."""
    batch = collate(items)
    if get_worker_info() is None or not isinstance(batch, tuple):
        return batch
    try:
        for value in batch:
            for tensor in value.values() if isinstance(value, dict) else [value]:
                if isinstance(tensor, Tensor) and tensor.numel():
                    tensor.share_memory_()
    except RuntimeError:
        # Shared memory is full. Left to PyTorch, this would happen in a thread, and the batch would be lost
        return type(batch)(*map(for_pipe, batch))
    return batch


def for_pipe(value: Any) -> Any:
    """A tensor as bytes, with its strides, also in a dictionary; anything else as it is."""
    if isinstance(value, dict):
        return {name: for_pipe(content) for name, content in value.items()}
    if not isinstance(value, Tensor):
        return value
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return Piped(buffer.getvalue())


def from_pipe(value: Any) -> Any:
    """The inverse of `for_pipe`."""
    if isinstance(value, dict):
        return {name: from_pipe(content) for name, content in value.items()}
    if not isinstance(value, Piped):
        return value
    return torch.load(io.BytesIO(value.content), weights_only=True)
