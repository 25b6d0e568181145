"""The folder that sample_ddp.py fills, so that the same command resumes and another one is refused.

settings.json        what decides the samples; `chosen`: the budgets, with fractions in place of limits on the cost
NNNNNN.png           sample NNNNNN
records/NNNNNN.npz   kept tokens, time and peak memory of the batch that begins with sample NNNNNN
summary.json         what all samples cost
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from config import UserError
from data.files import write_json
from data.images import is_whole_png
from processes.lock import FolderLock
from sampling.accounting import count_recorded
from sampling.budgets import Budget
from sampling.options import SamplingOptions

SETTINGS = "settings.json"
READERS = 16  # threads that look for damaged files


class SampleFolder:
    """The files of `count` samples, which are made in batches of `batch_size`."""

    def __init__(self, path: Path, count: int, batch_size: int):
        self.path = path
        self.count = count
        self.batch_size = batch_size
        self.starts = range(0, count, batch_size)  # the first sample of every batch
        self.summary = path / "summary.json"
        # The .npz lies beside the folder and has its name
        whole = path.resolve()
        self.npz = whole.with_suffix(whole.suffix + ".npz")

    def png(self, index: int) -> Path:
        """Picture of one sample."""
        return self.path / f"{index:06d}.png"

    def record(self, start: int) -> Path:
        """Record of the batch that begins with sample `start`."""
        return self.path / "records" / f"{start:06d}.npz"

    def batch(self, start: int) -> list[int]:
        """Indices of the samples in a batch."""
        return list(range(start, min(start + self.batch_size, self.count)))

    def prepare(
        self, settings: dict, lock: FolderLock, choose_budgets: Callable[[], SamplingOptions]
    ) -> list[int]:
        """Write the settings, or check those of the run to resume; returns the starts of the missing batches.

        Args:
            settings: what decides the samples; plain data.
            lock: of this folder; it is taken here, after the checks that need no folder.
            choose_budgets: replaces limits on the cost; called for a new folder only, before it is made.

        Raises:
            UserError: the folder holds other files or samples of other settings, or another run uses it.
        """
        settings = json.loads(json.dumps(settings))  # as it will be read back: tuples become lists
        file = self.path / SETTINGS
        chosen: dict | None = None
        if self._read_settings() is None:
            self._refuse_other_files()
            options = choose_budgets().plain()
            chosen = {"budget": options["budget"], "uncond": options["uncond"]}
        lock.acquire()
        earlier = self._read_settings()
        if earlier is None:
            write_json(file, {**settings, "chosen": chosen})
        else:
            changed = [key for key in settings if settings[key] != earlier.get(key)]
            if changed:
                differences = ", ".join(
                    describe_change(key, earlier.get(key), settings[key]) for key in changed
                )
                raise UserError(
                    f"--output-dir '{self.path}' holds samples of another {differences}; give another folder"
                )
        (self.path / "records").mkdir(exist_ok=True)
        return self._missing()

    def count_other_images(self) -> int:
        """Images in the folder beyond the first `count`, which an earlier call was asked for."""
        numbers = [int(file.stem) for file in self.path.glob("*.png") if file.stem.isdigit()]
        return sum(number >= self.count for number in numbers)

    def chosen_budgets(self) -> tuple[Budget, Budget | None]:
        """The budgets of both branches that were chosen when the folder was made."""
        settings = self._read_settings()
        assert settings is not None, "the folder is prepared"
        return budgets_of(settings["chosen"])

    def _read_settings(self) -> dict | None:
        """The settings of the run to resume, or None for a folder without samples.

        Raises:
            UserError: the settings of existing samples are damaged.
        """
        file = self.path / SETTINGS
        if not file.is_file():
            return None
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            budgets_of(settings["chosen"])
        except (ValueError, KeyError, TypeError, RecursionError):
            # Without samples, nothing is lost with the settings
            if not any(png.stat().st_size for png in self.path.glob("*.png")):
                return None
            raise UserError(
                f"--output-dir '{self.path}': {SETTINGS} is damaged, so nothing says how its samples were drawn; "
                f"remove the folder and {self.npz.name} to draw them again, or give another folder"
            ) from None
        return settings

    def _refuse_other_files(self) -> None:
        """UserError for a new folder that holds anything but what a killed run left of its settings.

        A file with the name of the .npz is not overwritten either.
        """
        if (self.path / SETTINGS).is_file():
            return
        if self.npz.exists():
            raise UserError(
                f"--output-dir '{self.path}': {self.npz} would be overwritten; remove it or give another folder"
            )
        if not self.path.is_dir():
            return
        for file in self.path.iterdir():
            # A run that was killed while it wrote the settings leaves the temporary file
            if not file.name.startswith(".") and file.name != f"{SETTINGS}.tmp":
                others = "files that this script did not write"
                raise UserError(f"--output-dir '{self.path}' holds {others}; give another folder")

    def _missing(self) -> list[int]:
        """The starts of the batches that lack their record or an image. Damaged files are named and removed."""
        with ThreadPoolExecutor(READERS) as readers:
            damaged_by_batch = list(readers.map(self._damaged_files, self.starts))
        damaged = [file for files in damaged_by_batch for file in files]
        if damaged:
            example = damaged[0].relative_to(self.path)
            print(
                f"{self.path}: {len(damaged)} damaged files, such as {example}; their batches are drawn again"
            )
        for file in damaged:
            file.unlink()
        return [start for start in self.starts if not self._is_done(start)]

    def _is_done(self, start: int) -> bool:
        """Whether a batch, whose files are whole, has a record of all its images and the images."""
        images = self.batch(start)
        has_record = count_recorded(self.record(start)) >= len(images)
        return has_record and all(self.png(i).exists() for i in images)

    def _damaged_files(self, start: int) -> list[Path]:
        """Files of a batch that exist and cannot be read; a power cut may leave empty ones."""
        damaged = []
        for png in map(self.png, self.batch(start)):
            if png.exists() and not is_whole_png(png):
                damaged.append(png)
        record = self.record(start)
        if record.exists() and not count_recorded(record):
            damaged.append(record)
        return damaged


def describe_change(key: str, earlier: object, asked: object) -> str:
    """A setting that differs, with both values where they are short, such as "seed (0, not 1)"."""
    name = "per_proc_batch_size" if key == "batch" else key
    if key in ("model", "vae") or isinstance(earlier, (dict, list)) or isinstance(asked, (dict, list)):
        return name
    return f"{name} ({earlier}, not {asked})"


def budgets_of(chosen: dict) -> tuple[Budget, Budget | None]:
    """The budgets of both branches from their entry in the settings."""
    uncond = chosen["uncond"]
    return Budget(**chosen["budget"]), None if uncond is None else Budget(**uncond)
