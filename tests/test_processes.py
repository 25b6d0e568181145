"""Many processes: one run per folder, no waiting for the dead, the same start for all, and sharded weights."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import kills
import pytest
import torch

import extract_features
import sample_ddp
import train
from config import UserError
from data.features import FeatureStore
from processes import lock, threads, watch
from processes.lock import FolderLock
from training import resume
from training.batches import Samples
from training.trainer import Trainer
from weights.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


# ------------------------------------------------------------------------------------------------------ locks


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
    refusal = pytest.raises(
        UserError, match=rf"--output '.*run' is in use by process {holder.pid} on .*; stop that run"
    )
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


def test_a_lock_that_is_given_back_while_it_is_looked_at(tmp_path, monkeypatch):
    attempts = [False, True]  # refused once, and the file is gone before its holder's name is read
    take = FolderLock._try
    monkeypatch.setattr(FolderLock, "_try", lambda own: take(own) if attempts.pop() is False else False)
    with FolderLock(tmp_path / "run", "--output") as second:
        second.acquire()
    assert attempts == []


def test_who_waited_goes_on_from_the_other_runs_last_checkpoint(run, whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    newer = tmp_path / "run" / "checkpoints" / "0000008.pt"
    newer.rename(tmp_path / newer.name)

    def write_while_waiting():
        acquire = FolderLock.acquire
        FolderLock.acquire = lambda own: (shutil.copy(tmp_path / newer.name, newer), acquire(own))

    codes, printed = run("run", plans=[write_while_waiting])
    assert codes == [0] and "resuming from step 8" in printed
    kills.assert_same_training(whole_run, tmp_path / "run")


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


# -------------------------------------------------------------------------------------------------- processes


def lose(number: int) -> None:
    """A signal to this process in its third step."""
    step = Trainer.optimizer_step

    def lost(trainer, batches):
        if trainer.step == 2:
            os.kill(os.getpid(), number)
        step(trainer, batches)

    Trainer.optimizer_step = lost


@pytest.mark.parametrize(
    "number, reason", [(signal.SIGKILL, "is gone"), (signal.SIGSTOP, "has not answered for 6 s")]
)
def test_a_lost_process_ends_the_others_and_is_named(run, number, reason):
    """One that dies, and one that stops; nobody but the processes themselves ends them here within 30 s."""
    started = time.monotonic()
    grace = 30 if number == signal.SIGKILL else 1
    patience = 20 if number == signal.SIGKILL else 6  # what is gone need not be waited for
    codes, printed = run(
        "run", f"training.rank_timeout={patience}", plans=[None, partial(lose, number)], grace=grace
    )
    assert codes == [1, -signal.SIGKILL] and time.monotonic() - started < 30, printed
    named = [line for line in printed.splitlines() if line.startswith("error: process 1 on ")]
    assert len(named) == 1 and reason in named[0]


def test_a_loop_that_hangs_is_named(monkeypatch):
    """Every thread lives, but all loops stand still: the one that is furthest behind holds the others up."""
    ends, clock = [], [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    watcher = watch.ProcessWatch(0, 1, patience=10)
    watcher.world = 3
    watcher._end = lambda ranks, reason: ends.append((ranks, reason))
    for second in range(25):
        clock[0] = float(second)
        places = (
            [[7, "training"], [7, "reading images"], [7, "training"]]
            if second > 9
            else [[second, "training"]] * 3
        )
        watcher._read_signs([[second, place] for place in places])
        assert not ends or second > 20
    assert ends[0] == ({1}, "is reading images of step 7 for 10 s")
    ends.clear()
    for second in range(25, 60):  # outside of a step, as while a checkpoint is written, nobody is hurried
        clock[0] = float(second)
        watcher._read_signs([[second, None]] * 3)
    assert not ends


def test_processes_that_start_unlike_are_refused(run):
    def differ():
        load = train.load_config
        train.load_config = lambda path, overrides=(): load(path, [*overrides, "training.learning_rate=0.5"])
        FeatureStore.fingerprint = lambda store: "others"
        # The other process must not have written its configuration when this one looks
        look = resume.starting_files
        resume.starting_files = lambda folder: (time.sleep(0.5), look(folder))[1]
        torch.manual_seed = lambda seed: torch.default_generator.manual_seed(seed + 1)

    codes, printed = run("run", plans=[None, differ])
    host = os.uname().nodename
    assert codes == [2, 2] and printed.count("error: ") == 1
    assert (
        f"error: process 1 on {host} differs from process 0 on {host} in configuration, features, weights;"
        in printed
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_the_mistake_of_one_process_is_told_by_it(run, workers):
    def damage():
        def damaged(samples, micro_step, image):
            raise UserError("shard-00003.npy: is damaged; extract it again")

        Samples.draw = damaged

    codes, printed = run("run", f"data.num_workers={workers}", plans=[None, damage], grace=1)
    assert codes[1] == 2 and "Traceback" not in printed.split("error: process")[0]
    assert printed.count("error: shard-00003.npy: is damaged; extract it again\n") == 1


def test_extraction_does_not_wait_for_a_lost_process(tiny_images, tiny_vae, tmp_path):
    def prepare(place, lost):
        watch.ProcessWatch.__init__.__defaults__ = (3.0,)
        if lost:
            setattr(extract_features, place, lambda *args: os.kill(os.getpid(), signal.SIGSTOP))

    argv = [
        "--data-path",
        tiny_images,
        "--vae",
        tiny_vae,
        "--image-size",
        16,
        "--shard-size",
        1,
        "--num-workers",
        0,
    ]
    plans = [partial(prepare, "extract", lost) for lost in (False, True)]
    argv += ["--features-path", tmp_path / "store"]
    codes = kills.attempt(extract_features.main, argv, tmp_path / "printed", plans, grace=1)
    assert codes == [1, -signal.SIGKILL]
    assert "error: process 1 on " in (tmp_path / "printed").read_text()


SCRIPT = """
import os, time
from processes import group

group.follow_launcher()
print("started", os.getpid(), flush=True)
time.sleep(60)
"""


def test_processes_end_with_their_launcher(tmp_path):
    """A SIGKILL to torchrun, which cannot tell its processes."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        tmp_path / "script.py",
    ]
    with open(tmp_path / "printed", "w") as output:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        launcher = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    read = (tmp_path / "printed").read_text
    wait_until(lambda: read().count("started ") == 2, 120)
    launcher.kill()
    launcher.wait()
    processes = [int(line.split()[1]) for line in read().splitlines() if line.startswith("started ")]
    wait_until(lambda: not any(is_alive(process) for process in processes), 20)
    assert read().count("error: the launcher is gone; run the same command again to resume") == 2


def wait_until(happened, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.1)


def is_alive(process: int) -> bool:
    """Nobody may have waited for it yet, so that its number is still taken."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


# ---------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize(
    "used, expected", [([2.0, 5.0, 1.0, 3.0], 4), ([100.0, 4.0, 1.0, 2.0], 3), ([97.0, 98.0, 97.0, 99.0], 1)]
)
def test_busy_cores_are_left_to_others(monkeypatch, used, expected):
    chosen = []
    monkeypatch.setattr(threads, "MOST", 4)
    monkeypatch.setattr(threads.psutil, "cpu_percent", lambda interval, percpu: used)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    # A choice of the user stays
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    threads.leave_busy_cores()
    assert chosen == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads.leave_busy_cores()
    assert chosen == [expected]


# ------------------------------------------------------------------------------------------------------- FSDP


def shard() -> None:
    os.environ.update(
        ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP"
    )
    os.environ.update(
        FSDP_TRANSFORMER_CLS_TO_WRAP="DiTBlock", FSDP_CPU_RAM_EFFICIENT_LOADING="true"
    )  # as the launcher does


def test_sharded_training_is_the_same_run_and_mixes_with_every_other(run, whole_run, tmp_path):
    """Half of the weights on each process, but for two steps in the middle, which one process does."""
    for steps, plans in ((3, [shard, shard]), (5, [None]), (8, [shard, shard])):
        codes, printed = run("sharded", f"training.max_steps={steps}", plans=plans)
        assert codes == [0] * len(plans), printed
    ours, theirs = (
        load_checkpoint(folder / "checkpoints" / "0000008.pt") for folder in (whole_run, tmp_path / "sharded")
    )
    for key in ("model", "ema"):
        assert ours[key].keys() == theirs[key].keys()
        for name in ours[key]:
            torch.testing.assert_close(theirs[key][name], ours[key][name], rtol=1e-2, atol=1e-3)


def test_sharded_training_in_bf16_goes_on_with_several_learning_rates(run, tmp_path):
    """Weights and router stay in float32. The optimizer numbers parameters by group, not as the model does."""
    changes = "training.precision=bf16", "training.lr_scales={router: 0.5}", "training.learning_rate=1e-4"
    assert run("alone", *changes, "training.max_steps=6")[0] == [0]
    for steps in (3, 6):
        codes, printed = run("sharded", *changes, f"training.max_steps={steps}", plans=[shard, shard])
        assert codes == [0, 0], printed
    ours, theirs = (
        load_checkpoint(tmp_path / name / "checkpoints" / "0000006.pt") for name in ("alone", "sharded")
    )
    for name, value in ours["model"].items():
        assert theirs["model"][name].dtype == torch.float32
        torch.testing.assert_close(theirs["model"][name], value, rtol=1e-2, atol=1e-3)
    own, other = (
        {k: x["exp_avg_sq"] for k, x in state["optimizer"]["state"].items()} for state in (ours, theirs)
    )
    assert {k: x.shape for k, x in own.items()} == {k: x.shape for k, x in other.items()}
    own, other = (torch.cat([x.flatten() for x in moments.values()]) for moments in (own, other))
    torch.testing.assert_close(other.sum(), own.sum(), rtol=0.3, atol=0)
