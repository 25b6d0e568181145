"""Many processes: one run per folder, no waiting for the dead, the same start for all, and weights cut over them."""

import os
import signal
import time
from functools import partial
from types import SimpleNamespace

import kills
import pytest
import torch

import extract_features
import sample_ddp
import train
from config import UserError
from data import lock
from data.features import FeatureStore
from data.lock import FolderLock
from training import watch
from training.checkpoint import load_checkpoint
from training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


# ----------------------------------------------------------------------------------------------------------------- locks


def test_a_second_run_is_refused_while_the_first_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.5)
    ready, done = kills.FORK.Event(), kills.FORK.Event()

    def hold():
        with FolderLock(tmp_path / "run", "--output") as held:
            held.acquire()
            ready.set()
            done.wait()

    holder = kills.FORK.Process(target=hold)
    holder.start()
    assert ready.wait(10)
    refusal = pytest.raises(UserError, match=rf"--output '.*run' is in use by process {holder.pid} on .*; stop that run")
    with FolderLock(tmp_path / "run", "--output") as second, refusal:
        second.acquire()
    assert (tmp_path / "run" / ".lock").exists()  # still the first one's
    holder.kill()
    holder.join()
    assert f"process {holder.pid} on" in (tmp_path / "run" / ".lock").read_text()  # left behind, and stale
    with FolderLock(tmp_path / "run", "--output") as second:
        second.acquire()
        assert f"process {os.getpid()} on" in (tmp_path / "run" / ".lock").read_text()
    assert os.listdir(tmp_path / "run") == []


@pytest.mark.parametrize("script", ["train", "extract", "sample"])
def test_every_script_locks_its_folder(script, tiny_config, tiny_images, tiny_vae, run, tmp_path):
    commands = {
        "train": (train.main, ["--config", tiny_config, "--output"]),
        "extract": (
            extract_features.main,
            ["--data-path", tiny_images, "--vae", tiny_vae, "--image-size", 16, "--features-path"],
        ),
        "sample": (sample_ddp.main, ["--num-fid-samples", 2, "--num-sampling-steps", 2, "--output-dir"]),
    }
    main, argv = commands[script]
    if script == "sample":
        assert run("run", "training.max_steps=1")[0] == [0]
        argv = ["--ckpt", tmp_path / "run" / "checkpoints" / "0000001.pt", *argv]

    def refuse():
        lock.PATIENCE = 0.0

    with FolderLock(tmp_path / "out", "") as first:
        first.acquire()
        assert kills.attempt(main, [*argv, tmp_path / "out"], tmp_path / "printed", [refuse]) == [2]
        assert f"is in use by process {os.getpid()} on" in (tmp_path / "printed").read_text()
    assert kills.attempt(main, [*argv, tmp_path / "out"], tmp_path / "printed", [refuse]) == [0]


# ------------------------------------------------------------------------------------------------------------- processes


def lose(number: int) -> None:
    """A signal to this process in its third step."""
    step = Trainer.optimizer_step

    def lost(trainer, batches):
        if trainer.step == 2:
            os.kill(os.getpid(), number)
        step(trainer, batches)

    Trainer.optimizer_step = lost


@pytest.mark.parametrize("number, reason", [(signal.SIGKILL, "is gone"), (signal.SIGSTOP, "has not answered for 6 s")])
def test_a_lost_process_ends_the_others_and_is_named(run, number, reason):
    """One that dies, and one that stops; nobody but the processes themselves ends them here within 30 s."""
    started = time.monotonic()
    grace = 30 if number == signal.SIGKILL else 1
    patience = 20 if number == signal.SIGKILL else 6  # what is gone need not be waited for
    codes, printed = run("run", f"training.rank_timeout={patience}", plans=[None, partial(lose, number)], grace=grace)
    assert codes == [1, -signal.SIGKILL] and time.monotonic() - started < 30, printed
    named = [line for line in printed.splitlines() if line.startswith("error: process 1 on ")]
    assert len(named) == 1 and reason in named[0]


def test_a_loop_that_hangs_is_named(monkeypatch):
    """Every thread lives, but all loops stand still: the one that is furthest behind holds the others up."""
    ends, clock = [], [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    watcher = watch.ProcessWatch(SimpleNamespace(process_index=0, num_processes=1), patience=10)
    watcher.world, watcher._end = 3, lambda ranks, reason: ends.append((ranks, reason))
    for second in range(25):
        clock[0] = float(second)
        places = [[7, "training"], [7, "reading images"], [7, "training"]] if second > 9 else [[second, "training"]] * 3
        watcher._look([[second, place] for place in places])
        assert not ends or second > 20
    assert ends[0] == ([1], "is reading images of step 7 for 10 s")
    ends.clear()
    for second in range(25, 60):  # outside of a step, as while a checkpoint is written, nobody is hurried
        clock[0] = float(second)
        watcher._look([[second, None]] * 3)
    assert not ends


def test_processes_that_start_unlike_are_refused(run):
    def differ():
        load = train.load_config
        train.load_config = lambda path, overrides=(): load(path, [*overrides, "training.learning_rate=0.5"])
        FeatureStore.fingerprint = lambda store: "others"
        torch.manual_seed = lambda seed: torch.default_generator.manual_seed(seed + 1)

    codes, printed = run("run", plans=[None, differ])
    host = os.uname().nodename
    assert codes == [2, 2] and printed.count("error: ") == 1
    assert f"error: process 1 on {host} differs from process 0 on {host} in configuration, features, weights;" in printed


# ------------------------------------------------------------------------------------------------------------------ FSDP


def shard() -> None:
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP")
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "DiTBlock"


def test_sharded_training_is_the_same_run_and_mixes_with_every_other(run, whole_run, tmp_path):
    """Half of the weights on each process, but for two steps in the middle, which one process does."""
    for steps, plans in ((3, [shard, shard]), (5, [None]), (8, [shard, shard])):
        codes, printed = run("sharded", f"training.max_steps={steps}", plans=plans)
        assert codes == [0] * len(plans), printed
    ours, theirs = (load_checkpoint(folder / "checkpoints" / "0000008.pt") for folder in (whole_run, tmp_path / "sharded"))
    for key in ("model", "ema"):
        assert ours[key].keys() == theirs[key].keys()
        for name in ours[key]:
            torch.testing.assert_close(theirs[key][name], ours[key][name], rtol=1e-2, atol=1e-3)
