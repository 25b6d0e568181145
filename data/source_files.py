"""Which image files a store was made of, to notice that they have changed since.

sources.npz    names    file names relative to the folder of images, each followed by a zero byte
               states   (n, 3) int64: size, time of the last change in ns, CRC-32 of the content
"""

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.files import write_file

# Threads that look at files: a file server answers many at once.
READERS = 16
# In place of a checksum: the content was not read.
NOT_READ = -1


class FileState(NamedTuple):
    """What tells whether a file has changed."""

    size: int
    modified: int  # ns
    checksum: int  # CRC-32 of the content, or NOT_READ


MISSING = FileState(-1, -1, NOT_READ)


class SourceFiles(NamedTuple):
    """The images of a store in source order, undecodable ones included."""

    names: list[str]
    states: list[FileState]


@dataclass(frozen=True)
class SourceChanges:
    """What has happened to the images of a store since it was written. False if nothing has."""

    states: list[FileState]  # as stored, in the store's order
    in_place: list[bool]  # in the store's order: the image is unchanged and has the same index
    new: list[str]
    gone: list[str]
    changed: list[str]

    def __bool__(self) -> bool:
        return bool(self.new or self.gone or self.changed)

    def __str__(self) -> str:
        example = [*self.changed, *self.new, *self.gone][0]
        counts = (
            f"{len(self.new):,} new, {len(self.changed):,} replaced and {len(self.gone):,} missing images"
        )
        return f"{counts} since the last extraction, such as {example!r}"


def glance(file: Path) -> FileState:
    """Size and time of a file, whose content is not read."""
    try:
        found = file.stat()
    except OSError:
        return MISSING
    return FileState(found.st_size, found.st_mtime_ns, NOT_READ)


def read_state(file: Path) -> FileState:
    """The state of a file with its checksum, as far as it can be read."""
    state = glance(file)
    # Opening a pipe would wait for ever.
    if not file.is_file():
        return state
    try:
        return state._replace(checksum=zlib.crc32(file.read_bytes()))
    except OSError:
        return state


def is_unchanged(file: Path, state: FileState) -> bool:
    """Whether a file is what it was. A copy with another time counts as the same if its content is."""
    now = glance(file)
    if now[:2] == state[:2]:
        return True
    if now.size != state.size or state.checksum == NOT_READ:
        return False
    return read_state(file).checksum == state.checksum


def find_unchanged(root: Path, names: Sequence[str], states: Sequence[FileState]) -> list[bool]:
    """`is_unchanged` of many files below `root`."""
    files = [root / name for name in names]
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(is_unchanged, files, states))


def compare_sources(root: Path, names: Sequence[str], stored: SourceFiles) -> SourceChanges:
    """Compare the files of a store with those that are below `root` now, whose names are given in order."""
    found = find_unchanged(root, stored.names, stored.states)
    unchanged = dict(zip(stored.names, found))
    present = set(names)
    in_place = [old == name and unchanged[old] for old, name in zip(stored.names, names)]
    new = [name for name in names if name not in unchanged]
    gone = [name for name in stored.names if name not in present]
    changed = [name for name in stored.names if name in present and not unchanged[name]]
    return SourceChanges(stored.states, in_place, new, gone, changed)


def write_sources(path: Path, sources: SourceFiles) -> None:
    """Write sources.npz."""
    joined = b"".join(os.fsencode(name) + b"\0" for name in sources.names)
    names = np.frombuffer(joined, np.uint8)
    states = np.array(sources.states, np.int64).reshape(-1, 3)
    write_file(path, lambda stream: np.savez_compressed(stream, names=names, states=states))


def read_sources(path: Path) -> SourceFiles | None:
    """Read sources.npz. None if there is none, as in older stores, or if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            joined = arrays["names"].tobytes()
            rows = arrays["states"].astype(np.int64).tolist()
        names = [os.fsdecode(name) for name in joined.split(b"\0")[:-1]]
        states = [FileState(*row) for row in rows]
    except Exception:  # NumPy and zipfile raise many kinds on damaged files
        return None
    return SourceFiles(names, states) if len(names) == len(states) else None
