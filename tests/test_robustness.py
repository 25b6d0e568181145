"""Promises about long runs, each broken on purpose: kills, signals, full disks, numbers that are none.

`kills.py` holds the machinery and, as a command, the long campaigns.
"""

import contextlib
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import kills
import numpy as np
import pytest
import torch

import sample_ddp
import train
from config import UserError, load_config
from data import files
from processes import stop
from training import sample_grids
from training.batches import Samples
from training.guard import FiniteGuard, nan_gradients_if_not_finite
from training.trainer import Trainer
from weights import checkpoint
from weights.checkpoint import list_checkpoints, load_checkpoint

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


# ------------------------------------------------------------------------------------------------------ kills


def test_killed_training_is_the_same_training(tiny_config, tmp_path):
    assert kills.training_campaign(tmp_path, tiny_config, 3, [1], seed=1, rounds=3).kills == 3


@pytest.mark.parametrize("keep, left", [(2, [6, 8]), (1, [4, 6, 8])])
def test_a_finished_run_removes_what_a_kill_has_left(run, tmp_path, keep, left):
    """An old checkpoint, but none if the run is started again with another number to keep."""

    def die_at_the_last():
        remove = checkpoint.remove_old

        def dying(folder, keep):
            if (folder / "0000008.pt").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            remove(folder, keep)

        checkpoint.remove_old = dying

    codes, printed = run("run", "logging.ckpt_every=2", "logging.ckpt_keep=2", plans=[die_at_the_last])
    assert codes == [-signal.SIGKILL], printed
    codes, printed = run("run", "logging.ckpt_every=2", f"logging.ckpt_keep={keep}")
    assert codes == [0] and "already finished" in printed
    assert [int(path.stem) for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == left


def test_training_killed_on_two_processes(tiny_config, tmp_path):
    assert kills.training_campaign(tmp_path, tiny_config, 2, [2], seed=1, rounds=2).kills == 2


def test_killed_extraction_is_complete(tiny_images, tiny_vae, tmp_path):
    assert kills.extraction_campaign(tmp_path, tiny_images, tiny_vae, 3, [1, 2], seed=1).kills == 3


def test_killed_sampling_is_complete(whole_run, tmp_path):
    ckpt = list_checkpoints(whole_run / "checkpoints")[-1]
    assert kills.sampling_campaign(tmp_path / "samples", ckpt, 3, [1, 2], seed=1).kills == 3


@pytest.mark.parametrize("call", range(4))
def test_sampling_killed_in_the_write_of_its_settings(whole_run, tmp_path, call):
    """Before and after the content is on the disk, the file has its name, and so has the folder."""

    def die(number):
        left = [number]

        def dying(function, *args):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        replaced = {name: partial(dying, getattr(os, name)) for name in ("fsync", "replace", "close")}
        files.os = SimpleNamespace(**vars(os) | replaced)

    ckpt = list_checkpoints(whole_run / "checkpoints")[-1]
    argv = [
        "--ckpt",
        ckpt,
        "--num-sampling-steps",
        1,
        "--num-fid-samples",
        1,
        "--output-dir",
        tmp_path / "out",
    ]
    assert kills.attempt(sample_ddp.main, argv, tmp_path / "printed", [partial(die, call)]) == [
        -signal.SIGKILL
    ]
    assert kills.attempt(sample_ddp.main, argv, tmp_path / "printed", [None]) == [0], (
        tmp_path / "printed"
    ).read_text()


def test_grid_and_metrics_that_a_kill_prevented_follow_on_resume(run, tmp_path):
    def fake_hooks(dies: str = ""):
        def grid(pictures, path, columns):
            path.parent.mkdir(exist_ok=True)
            os.kill(os.getpid(), signal.SIGKILL) if dies == "grid" else path.touch()

        def evaluation(model, step):
            os.kill(os.getpid(), signal.SIGKILL) if dies == "metrics" else None
            return {"fid": step}

        sample_grids.generate_images = lambda *args: None
        sample_grids.save_grid = grid
        train.Evaluation = lambda *args: evaluation

    changes = "logging.ckpt_every=4", "logging.sample_every=4", "evaluation.every=4", "evaluation.reference=x"
    for dies, code in (("grid", -9), ("metrics", -9), ("", 0), ("", 0)):
        codes, printed = run("run", *changes, plans=[partial(fake_hooks, dies)])
        assert codes == [code], printed
    assert sorted(os.listdir(tmp_path / "run" / "samples")) == ["0000004.png", "0000008.png"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert rows == [{"step": 4, "fid": 4}, {"step": 8, "fid": 8}]


def test_a_skipped_evaluation_leaves_no_row(run, tmp_path):
    def skip():
        train.Evaluation = lambda *args: lambda model, step: {}
        train.sample_grids.load_decoder = lambda *args: object()

    codes, printed = run("run", "evaluation.every=4", "evaluation.reference=x", plans=[skip])
    assert codes == [0], printed
    assert not (tmp_path / "run" / "evaluation.jsonl").exists()


# ---------------------------------------------------------------------------------------------------- signals


def signalled(number: int, *delays: float):
    """Arrange for signals to this process, counted from its second optimizer step."""
    step = Trainer.optimizer_step

    def slow(trainer, batches):
        if trainer.step == 1:
            for delay in delays:
                kills.threading.Timer(delay, os.kill, (os.getpid(), number)).start()
            time.sleep(3 if len(delays) > 1 else 0.3)
        step(trainer, batches)

    Trainer.optimizer_step = slow


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_its_status(run, tmp_path, number):
    codes, printed = run("run", plans=[partial(signalled, number, 0.1)])
    assert codes == [128 + number]
    last = printed.splitlines()[-1]
    folder = tmp_path / "run"
    assert f"stopped by {number.name} at step 2 of 8: {folder}; resume by python train.py" in last
    assert last.endswith(f" --resume {folder}")
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["0000002.pt"]


def test_a_second_signal_quits(run, tmp_path):
    """At once, in the middle of a step; the same signal again within a second is what launchers send."""
    codes, _ = run("run", plans=[partial(signalled, signal.SIGTERM, 0.1, 0.2, 1.5)])
    assert codes == [-signal.SIGTERM] and list_checkpoints(tmp_path / "run" / "checkpoints") == []


# ---------------------------------------------------------------------------------------- loaders that fail


def fail_in_loader(fail, signal_after: float | None = None):
    """Arrange that a loader process fails at the third step's second batch, and perhaps a signal after that."""
    draw = Samples.draw

    def failing(samples, micro_step, image):
        if micro_step == 5:
            fail()
        return draw(samples, micro_step, image)

    Samples.draw = failing
    stop.GRACE = 0.5
    if signal_after is not None:
        kills.threading.Timer(signal_after, os.kill, (os.getpid(), signal.SIGTERM)).start()


def hang() -> None:
    time.sleep(600)


def run_out_of_memory() -> None:
    """As the kernel ends a process when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "plan, changes, code, line",
    [
        (
            partial(fail_in_loader, hang),
            ["training.rank_timeout=2"],
            1,
            "has given no batch for",
        ),
        (partial(fail_in_loader, hang, 2.5), [], 143, "has given no batch for"),
        (
            partial(fail_in_loader, run_out_of_memory),
            [],
            1,
            "error: data.num_workers 2: a loader process has died (killed by SIGKILL)",
        ),
    ],
    ids=["hangs", "hangs and is stopped", "killed"],
)
def test_a_loader_that_fails_ends_the_run_with_a_checkpoint(
    run, whole_run, tmp_path, plan, changes, code, line
):
    started = time.monotonic()
    codes, printed = run("run", "data.num_workers=2", *changes, plans=[plan])
    assert codes == [code] and time.monotonic() - started < 20, printed
    assert line in printed and "Traceback" not in printed
    # A process that is killed takes batches with it that it has read ahead
    (saved,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert saved.name in ("0000001.pt", "0000002.pt")
    # The half of a step that was done leaves no trace
    assert run("run")[0] == [0]
    saved.unlink()
    kills.assert_same_training(whole_run, tmp_path / "run")


def test_a_killed_loader_ends_two_processes(run):
    plans = [None, partial(fail_in_loader, run_out_of_memory)]
    codes, printed = run("run", "data.num_workers=1", "training.rank_timeout=20", plans=plans, grace=20)
    assert codes == [1, 1] and printed.count("error: data.num_workers 1: a loader process has died") == 1, (
        printed
    )


# ------------------------------------------------------------------------------------------------- full disks


def test_a_snapshot_that_does_not_fit_ends_the_run_with_one_line(run):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    codes, printed = run("run", "training.posthoc_ema_stds=[0.05]", "logging.ckpt_every=1", plans=[limit])
    assert codes == [1] and "Traceback" not in printed
    assert "0000001-0.05.pt could not be written (File too large)" in printed


def test_a_write_that_fails_ends_the_run_and_keeps_what_is_there(run, whole_run, tmp_path):
    """A limit on the size of files, which any user may set: the checkpoint of step 3 does not fit."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    assert run("run", plans=[partial(signalled, signal.SIGTERM, 0.1)])[0] == [143]
    codes, printed = run("run", plans=[limit])
    assert codes == [1] and printed.splitlines()[-1].startswith("error: ") and "Traceback" not in printed
    assert "0000003.pt could not be written (File too large); earlier checkpoints are intact" in printed
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["0000002.pt"]
    assert run("run")[0] == [0]
    (tmp_path / "run" / "checkpoints" / "0000002.pt").unlink()
    kills.assert_same_training(whole_run, tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 3 MiB, where the system lets us make one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place]
    made = subprocess.run(command, capture_output=True) if shutil.which("mount") else None
    if made is None or made.returncode:
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_ends_the_run_and_keeps_what_is_there(run, small_disk):
    codes, printed = run("disk/run")
    names = [path.name for path in list_checkpoints(small_disk / "run" / "checkpoints")]
    assert codes == [1] and "No space left on device" in printed and "Traceback" not in printed and names
    assert all(checkpoint.find_damage(small_disk / "run" / "checkpoints" / name) is None for name in names)
    assert not list(small_disk.rglob("*.tmp"))
    codes, printed = run(
        "disk/run", "logging.ckpt_keep=1", "logging.ckpt_every=100"
    )  # nor does anything else fit by itself
    assert codes == [1] and f"resuming from step {int(names[-1][:7])}" in printed


def test_a_full_disk_under_the_log(run, small_disk):
    def fill():
        """All but a few bytes, once the run has begun."""
        start = Trainer.run_steps

        def filled(trainer):
            with contextlib.suppress(OSError), open(small_disk / "filler", "wb") as filler:
                while True:
                    filler.write(bytes(4096))
            start(trainer)

        Trainer.run_steps = filled

    codes, printed = run("disk/run", plans=[fill])
    assert codes == [1] and "No space left on device" in printed and "Traceback" not in printed
    (small_disk / "filler").unlink()
    assert run("disk/run", "logging.ckpt_every=100")[0] == [0]


# ------------------------------------------------------------------------------------------- runs of no steps


def test_a_finished_run_may_be_started_again_and_is_never_shortened(run, tmp_path):
    codes, printed = run("run")
    assert codes == [0] and printed.splitlines()[-1].startswith("finished at step 8 of 8")
    codes, printed = run("run")
    assert codes == [0] and printed.splitlines()[-1].startswith("already finished at step 8 of 8")
    codes, printed = run("run", "training.max_steps=7")
    assert codes == [2]
    assert "has a checkpoint of step 8, but the run ends at step 7; set training.max_steps above 8" in printed
    # Ten images make one step of two batches of four in an epoch
    newest = tmp_path / "run" / "checkpoints" / "0000008.pt"
    epochs = "training.max_steps=null", "training.epochs=8"
    codes, printed = run("new", f"training.resume_from_ckpt={newest}", *epochs)
    assert codes == [2] and not (tmp_path / "new").exists()
    assert f"'{newest}' is of step 8, but the run ends at step 8; raise training.epochs (8)" in printed
    # Both remedies work
    codes, _ = run("new", f"training.resume_from_ckpt={newest}", *epochs, "training.epochs=9")
    assert codes == [0]
    assert run("weights", f"training.init_from={newest}", *epochs)[0] == [0]


@pytest.fixture
def follow(tmp_path):
    """follow(printed) runs the command that an error line prints as a shell would; exit codes and output."""

    def follow(printed: str) -> tuple[list[int], str]:
        (line,) = {line for line in printed.splitlines() if line.startswith("error: ")}
        words = shlex.split(line.split("`")[1])
        script = words.index("train.py")
        launcher = {("python",): 1, ("torchrun", "--nproc_per_node=2"): 2}
        processes = launcher[tuple(words[:script])]
        (tmp_path / "printed").unlink()
        codes = kills.attempt(train.main, words[script + 1 :], tmp_path / "printed", [None] * processes)
        return codes, (tmp_path / "printed").read_text()

    return follow


@pytest.mark.parametrize(
    "before, after, start",
    [
        ((), ["training.learning_rate=5e-4"], "resuming from step 3"),
        ((), ["training.lr_scales={router: 0.5, blocks.0: 0.1}"], "starting"),
        ((), ["training.learning_rate=5e-4", "training.max_steps=3"], "starting"),
        ((), ["data.num_classes=5"], "starting"),
        (("training.ratio_batch_size=4",), ["training.global_batch_size=2"], "resuming from step 3"),
    ],
    ids=["learning rate", "groups", "at the last step", "classes", "ratio batch"],
)
def test_a_new_value_starts_a_new_run_from_the_checkpoint(run, follow, before, after, start):
    """With a folder whose name a shell splits."""
    assert run("it's a run", *before, "training.max_steps=3")[0] == [0]
    codes, printed = run("it's a run", *before, *after)
    assert codes == [2] and "was started with a different" in printed
    codes, printed = follow(printed)
    assert codes == [0] and start in printed, printed


def test_a_run_that_started_from_weights_has_one_source(run, follow, whole_run):
    source = f"training.init_from={list_checkpoints(whole_run / 'checkpoints')[-1]}"
    assert run("run", source, "training.max_steps=3")[0] == [0]
    codes, printed = run("run", source, "training.learning_rate=5e-4")
    assert codes == [2]
    codes, printed = follow(printed)
    assert codes == [0] and "resuming from step 3" in printed, printed


def test_batch_sizes_for_more_processes_start_a_new_run(run, follow, tmp_path):
    whole_batch = "training.ratio_batch_size=4"
    assert run("run", whole_batch, "training.max_steps=3")[0] == [0]
    codes, printed = run("run", whole_batch, plans=[None, None])
    assert codes == [2, 2] and "try 2 in a new run; a resumed run keeps its batch sizes" in printed
    assert f"so resume '{tmp_path / 'run'}' on 1 process, or" in printed
    codes, printed = follow(printed)
    assert codes == [0, 0] and "resuming from step 3" in printed, printed
    assert run("run", whole_batch)[0] == [0]


# -------------------------------------------------------------------------------------------------------- EMA


def test_an_ema_that_holds_the_first_weights_is_told(run, whole_run, tmp_path):
    """The tiny run ends with 0.9^8 = 43 % of them. With the warmup it does not, and resumes exactly."""
    line = "steps the EMA, which samples are drawn from, holds 43% of the initial weights; use training.ema_warmup"
    assert line in (whole_run / "log.txt").read_text()
    warmup = "training.ema_warmup=true"
    codes, printed = run("warm", warmup)
    assert codes == [0] and "initial weights" not in printed
    for steps in (5, 8):
        assert run("parts", warmup, f"training.max_steps={steps}")[0] == [0]
    one, other = (
        load_checkpoint(tmp_path / name / "checkpoints" / "0000008.pt") for name in ("warm", "parts")
    )
    kills.assert_equal(other["ema"], one["ema"], "ema")


# --------------------------------------------------------------------------------------------------- trackers


def test_an_unreachable_tracker_is_one_line_and_the_run_can_go_on_without(run):
    def online():
        nowhere = {
            "WANDB_BASE_URL": "http://127.0.0.1:9",
            "WANDB_API_KEY": "0" * 40,
            "WANDB_INIT_TIMEOUT": "2",
        }
        os.environ.update(nowhere, WANDB_MODE="online")

    codes, printed = run("run", "logging.trackers=[wandb]", plans=[online])
    assert codes == [2] and "Traceback" not in printed
    assert "error: logging.trackers: cannot start (" in printed and "set WANDB_MODE=offline" in printed
    codes, printed = run(
        "run", "logging.trackers=[wandb]", plans=[lambda: os.environ.update(WANDB_MODE="offline")]
    )
    assert codes == [0], printed


# ----------------------------------------------------------------------------------------- non-finite numbers


def test_a_step_with_a_bad_loss_leaves_no_trace():
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    seen = []
    guard = FiniteGuard(3, seen.append, lambda step: seen.append(f"stop {step}"))

    def step(number: int, factor: float) -> dict:
        loss = (weight * factor).square().sum()
        nan_gradients_if_not_finite(loss).backward()
        guard.update(optimizer, torch.nn.utils.clip_grad_norm_([weight], 1.0), number)
        optimizer.zero_grad()
        return {
            "weight": weight.detach().clone(),
            **{k: v.clone() for k, v in optimizer.state[weight].items()},
        }

    before = step(0, 1.0)
    for number, factor in ((1, float("nan")), (2, float("inf"))):
        kills.assert_equal(step(number, factor), before, "state")
    after = step(3, 1.0)
    assert not torch.equal(after["weight"], before["weight"]) and after["step"] == 2
    assert seen == [1, 2] and guard.state_dict() == {"total": 2, "in_a_row": 0}
    step(4, float("nan")), step(5, float("nan"))
    with pytest.raises(SystemExit) as caught:
        step(6, float("nan"))
    assert caught.value.code == 1 and seen[2:] == [4, 5, 6, "stop 6"]


def test_a_bad_loss_shows_in_every_gradient_and_a_good_one_is_untouched():
    weights = torch.randn(5, requires_grad=True)
    (plain,) = torch.autograd.grad((weights**3).sum(), weights)
    (same,) = torch.autograd.grad(nan_gradients_if_not_finite((weights**3).sum()), weights)
    assert torch.equal(plain, same)
    (bad,) = torch.autograd.grad(nan_gradients_if_not_finite(weights[0] + float("inf")), weights)
    assert bad[0].isnan()


@pytest.fixture
def poisoned(tiny_config, tmp_path):
    """poisoned(images) returns a configuration whose features hold NaN for these images."""

    def make(images: list[int]) -> Path:
        config = load_config(tiny_config)
        features = shutil.copytree(config.data.feature_path, tmp_path / f"features{len(images)}")
        shard = np.load(features / "shard-00000.npy")
        shard[images] = np.nan
        np.save(features / "shard-00000.npy", shard)
        text = tiny_config.read_text().replace(config.data.feature_path, str(features))
        (tmp_path / "poisoned.yaml").write_text(text)
        return tmp_path / "poisoned.yaml"

    return make


def test_bad_steps_are_skipped_counted_and_named(run, poisoned, tmp_path):
    config, single = poisoned([7]), "training.gradient_accumulation_steps=1"
    codes, printed = run("run", single, "logging.log_every=1", config=config)
    assert codes == [0]
    lines = [line.split("images ")[1] for line in printed.splitlines() if "update skipped" in line]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    culprits = [line.split("; not finite in the features: ") for line in lines]
    assert all(culprit.startswith("image 7 (") for _, culprit in culprits)
    lines = [line for line, _ in culprits]
    assert lines and all("7" in line.split(", ") and len(line.split(", ")) == 4 for line in lines)
    assert rows[-1]["skipped_steps"] == len(lines) < 8
    assert sum(row["loss"] is None for row in rows) == len(lines)  # NaN is no JSON
    state = load_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert state["skipped"]["total"] == len(lines) and all(
        value.isfinite().all() for value in state["ema"].values()
    )
    assert state["optimizer"]["state"][0]["step"] == 8 - len(lines)
    codes, _ = run(
        "two", single, "logging.log_every=1", config=config, plans=[None, None]
    )  # the image is on one of them
    others = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert codes == [0, 0] and [row["skipped_steps"] for row in others] == [
        row["skipped_steps"] for row in rows
    ]


def test_a_file_that_cannot_be_read_costs_no_steps(run, tmp_path, monkeypatch):
    """The steps since the last checkpoint are saved, and the same command resumes once the file is back."""
    keys = "logging.ckpt_every=100", "logging.ckpt_keep=1", "data.num_workers=0"
    assert run("whole", *keys)[0] == [0]
    draw = Samples.draw

    def fail_late(self, micro_step, image):
        if micro_step >= 11:  # the second half of step 6
            raise UserError("shard-00000.npy: cannot be read")
        return draw(self, micro_step, image)

    monkeypatch.setattr(Samples, "draw", fail_late)
    codes, printed = run("parts", *keys)
    assert codes == [2] and "error: shard-00000.npy: cannot be read" in printed and "Traceback" not in printed
    monkeypatch.undo()
    codes, printed = run("parts", *keys)
    assert codes == [0] and "resuming from step 5" in printed
    kills.assert_same_training(tmp_path / "whole", tmp_path / "parts")


def test_too_many_bad_steps_end_the_run(run, poisoned, tmp_path):
    assert run("run", "training.max_steps=3")[0] == [0]
    config = poisoned(list(range(10)))
    last = tmp_path / "run" / "checkpoints" / "0000003.pt"
    codes, printed = run(
        "run",
        "training.max_skipped_steps=4",
        "training.max_steps=100",
        "logging.ckpt_every=100",
        config=config,
    )
    assert codes == [1] and printed.count("update skipped") == 4 and "Traceback" not in printed
    assert (
        f"error: 4 steps in a row up to 7 had a non-finite loss or gradient; the last good checkpoint is {last}"
        in printed
    )
    assert "the features named above are to blame" in printed


def test_steps_that_fail_on_good_images_blame_the_weights(run):
    codes, printed = run("run", "training.learning_rate=1e38", "training.max_skipped_steps=2")
    assert codes == [1] and "; all their latents are finite" in printed
    assert "the latents are finite, so the weights are to blame: " in printed
