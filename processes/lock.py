"""One run per folder: a lock that ends with its process, however that ends."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from config import UserError

PATIENCE = (
    40.0  # seconds: a run that was told to stop may still write its last checkpoint (launchers kill after 30)
)


class FolderLock:
    """Keeps a second run out of a folder. `acquire` takes the lock, leaving the `with` block gives it back.

    The lock is the kernel's (POSIX record lock) on `folder/.lock`, which holds host, process and time of the holder. A killed
    process loses it at once, so a file that was left behind is stale and is taken over; a child process never inherits it. NFS
    and most cluster file systems keep it between machines, too.
    """

    def __init__(self, folder: Path, option: str):
        self.path, self.option, self.file = Path(folder) / ".lock", option, None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *error) -> None:
        if self.file is not None:
            self.path.unlink(
                missing_ok=True
            )  # while it is locked: who waits for it looks whether it is still the same file
            self.file.close()
            self.file = None

    def acquire(self) -> None:
        """Take the lock; wait up to PATIENCE seconds for a run that is about to end. UserError where that is not enough."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        started, announced = time.monotonic(), False
        while not self._try():
            try:
                holder = self.path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
            except FileNotFoundError:  # the holder has just given it back
                continue
            if time.monotonic() - started > PATIENCE:
                where = f"{self.option} '{self.path.parent}'"
                raise UserError(f"{where} is in use by {holder}; stop that run or give another folder")
            if not announced:
                print(
                    f"waiting up to {PATIENCE:.0f} s for {holder}, which uses {self.path.parent}", flush=True
                )
                announced = True
            time.sleep(0.2)
        self.file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        self.file.flush()

    def _try(self) -> bool:
        """Whether the lock is ours now. A file system that knows no locks gives it to everyone, and a line says so."""
        file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 - stays open as long as the lock is held
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                return False
            print(
                f"warning: {self.path.parent} is not protected against a second run ({error.strerror})",
                flush=True,
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                self.file = file
                return True
        file.close()  # the holder removed it between our opening and locking
        return False
