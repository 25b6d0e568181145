"""One run per folder: a lock that ends with its process, no matter how the process ends."""

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

from config import UserError

# Seconds: a run that was told to stop may still write its last checkpoint; launchers kill after 30.
PATIENCE = 40.0
POLL = 0.2  # seconds between two attempts


class FolderLock:
    """Keeps a second run out of a folder. `acquire` takes the lock; leaving the `with` block gives it back.

    The file `folder/.lock` names its holder. The lock on it is the kernel's (a POSIX record lock). A killed
    process loses it at once, so a file that is left behind protects nothing. Child processes, such as loader
    workers that outlive a killed run for some seconds, never inherit it. NFS and most cluster file systems
    keep it between machines, too.
    """

    def __init__(self, folder: Path | str, option: str):
        self.folder = Path(folder)
        self.option = option
        self.path = self.folder / ".lock"
        self.file: TextIO | None = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is not None:
            # Remove the file before closing unlocks it: otherwise the next holder might lose its own file
            self.path.unlink(missing_ok=True)
            self.file.close()
            self.file = None

    def acquire(self) -> None:
        """Take the lock. Wait up to PATIENCE seconds for a run that is about to end.

        Raises:
            UserError: the other run has not ended in this time.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + PATIENCE
        announced = False
        while not self._try():
            holder = self._holder()
            if holder is None:
                continue
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.option} '{self.folder}' is in use by {holder}; "
                    "stop that run or give another folder"
                )
            if not announced:
                print(f"waiting up to {PATIENCE:.0f} s for {holder}, which uses {self.folder}", flush=True)
                announced = True
            time.sleep(POLL)

    def _try(self) -> bool:
        """Take the lock if it is free. A file system without locks gives it to everyone, with a warning."""
        # The file stays open as long as the lock is held
        file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                return False
            print(
                f"warning: {self.folder} is not protected against a second run ({error.strerror})", flush=True
            )
        if not self._is_current(file):
            file.close()
            return False
        # Name the new holder
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        file.flush()
        self.file = file
        return True

    def _is_current(self, file: TextIO) -> bool:
        """Whether the opened file is still the one in the folder, which the last holder may have removed."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _holder(self) -> str | None:
        """Process, host and time of the holder as it wrote them. None if it has given the lock back."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        return text.strip() or "another process"
