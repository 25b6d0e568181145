"""The folder that sample_ddp.py fills, so that the same command resumes and another one is refused.

settings.json        what decides the samples; `chosen`: the budgets, with fractions in place of limits on the cost
NNNNNN.png           sample NNNNNN
records/NNNNNN.npz   kept tokens, time and peak memory of the batch that begins with sample NNNNNN
summary.json         what all samples cost
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from config import UserError
from data.files import write_json
from processes.lock import FolderLock
from sampling.budgets import Budget
from sampling.options import SamplingOptions

SETTINGS = "settings.json"


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
        if not file.is_file():
            self._refuse_other_files()
            options = dataclasses.asdict(choose_budgets())
            chosen = {"budget": options["budget"], "uncond": options["uncond"]}
        lock.acquire()
        if file.is_file():
            earlier = self._settings()
            changed = [key for key in settings if settings[key] != earlier.get(key)]
            if changed:
                keys = ", ".join(changed)
                raise UserError(
                    f"--output-dir '{self.path}' holds samples of another {keys}; give another folder"
                )
        else:
            write_json(file, {**settings, "chosen": chosen})
        (self.path / "records").mkdir(exist_ok=True)
        return [start for start in self.starts if not self._is_done(start)]

    def count_other_images(self) -> int:
        """Images in the folder beyond the first `count`, which an earlier call was asked for."""
        numbers = [int(file.stem) for file in self.path.glob("*.png") if file.stem.isdigit()]
        return sum(number >= self.count for number in numbers)

    def chosen_budgets(self) -> tuple[Budget, Budget | None]:
        """The budgets of both branches that were chosen when the folder was made."""
        chosen = self._settings()["chosen"]
        budget = Budget(**chosen["budget"])
        if chosen["uncond"] is None:
            return budget, None
        return budget, Budget(**chosen["uncond"])

    def _settings(self) -> dict:
        return json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))

    def _refuse_other_files(self) -> None:
        if not self.path.is_dir():
            return
        for file in self.path.iterdir():
            # A run that was killed while it wrote the settings leaves the temporary file
            if not file.name.startswith(".") and file.name != f"{SETTINGS}.tmp":
                others = "files that this script did not write"
                raise UserError(f"--output-dir '{self.path}' holds {others}; give another folder")

    def _is_done(self, start: int) -> bool:
        """Whether a batch has its record and all images; a power cut may leave empty files."""
        files = [self.record(start)]
        files += [self.png(i) for i in self.batch(start)]
        return all(file.exists() and file.stat().st_size > 0 for file in files)
