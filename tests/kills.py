"""Kills the scripts with SIGKILL at random moments, starts them again, and compares the results.

    PYTHONPATH=. python tests/kills.py --folder DIR --kills 20 --seed 0

prints a table. What a killed script leaves in the end must equal what an uninterrupted one leaves. Every attempt
is a fork of one process that has imported everything, because importing takes seconds. The forks run the
scripts' own main functions with the environment of torchrun. The tests call the same functions with few kills.
"""

import argparse
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from conftest import save_tiny_config, save_tiny_images, save_tiny_vae

import cli
import extract_features
import sample_ddp
import train
from processes import group
from training import launch
from training.resume import CommandLine
from weights import checkpoint

FORK = multiprocessing.get_context("fork")  # of a process without threads of its own; see `calm`
STEPS = 60
# What every checkpoint has
EMPTY = {
    "config": {},
    "model": {},
    "ema": {},
    "autoencoder": None,
    "class_names": None,
}
# What must not differ between a run that was interrupted and one that was not
COMPARED = ["step", "model", "ema", "optimizer", "terms", "posthoc", "weight_averages", "averages", "skipped"]
DEADLINE = 180  # seconds for one attempt: nothing may hang
TRAINING = ["training.gradient_accumulation_steps=1", f"training.max_steps={STEPS}", "logging.ckpt_every=3",
            "logging.ckpt_keep=2", "logging.log_every=4"]  # fmt: skip


def calm() -> None:
    """Use one thread: results do not depend on the machine, and forks need no pool of threads."""
    torch.set_num_threads(1)
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    group.default_device = lambda local_rank=0: torch.device("cpu")


# ------------------------------------------------------------------------------------------------ one attempt


def die_after(seconds: float) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def arm(place: Callable, seconds: float) -> Callable:
    """`place` that starts the clock of a kill when it is first called."""

    def armed(*args, **kwargs):
        die_after(seconds)
        return place(*args, **kwargs)

    return armed


class DyingStream:
    """A file that kills its process after a number of bytes."""

    def __init__(self, stream, left: int):
        self.stream = stream
        self.left = left

    def write(self, data) -> int:
        self.left -= len(data)
        if self.left < 0:
            self.stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.stream.write(data)

    def flush(self) -> None:
        self.stream.flush()


def die_in_checkpoint(count: int, share: float) -> None:
    """Kill in the middle of writing checkpoint number `count`, counted from here."""
    save = torch.save
    left = [count]

    def dying(state, stream):
        left[0] -= 1
        if left[0] == 0:
            stream = DyingStream(stream, int(share * 1_500_000))
        save(state, stream)

    checkpoint.torch.save = dying


def child(
    main: Callable, argv: list[str], output: Path, environment: dict[str, str], kill: Callable | None
) -> None:
    """What a fork does: become a fresh process, arrange its end, and run `main(argv)`."""
    os.environ.update(environment)
    # Forget the parent's Accelerator, and make PyTorch's pool of threads anew before several ask for it
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    # Print into a file
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    if kill is not None:
        kill()
    cli.run(lambda: main(argv))
    sys.stdout.flush()
    os._exit(0)


def free_port() -> str:
    """A port of this machine on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def overrides(changes: Sequence[str]) -> list[str]:
    """The changes of a configuration as words of a command line."""
    words = []
    for change in changes:
        words += ["--set", change]
    return words


def typed(folder: Path) -> CommandLine:
    """The command line of a run in this folder, on one process."""
    return CommandLine("--output", folder, folder / "config.yaml", [], processes=1)


def attempt(
    main: Callable, argv: list, output: Path, kills: list[Callable | None], grace: float = 15
) -> list[int]:
    """Run `main(argv)` on one process per entry of `kills`, and return the exit codes.

    A process calls its entry first, which may arrange its end. As under launchers, the others have `grace`
    seconds after one has failed. AssertionError if all hang.
    """
    # Start
    words = [str(word) for word in argv]
    port = free_port()
    processes = []
    for rank, kill in enumerate(kills):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        if len(kills) > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(kills))}
        process = FORK.Process(target=child, args=(main, words, output, environment, kill))
        process.start()
        processes.append(process)
    # Wait
    end = time.monotonic() + DEADLINE
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        time.sleep(0.02)
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + grace)
    # End those that hang
    hanging = [process for process in processes if process.exitcode is None]
    failed = any(process.exitcode for process in processes)
    for process in hanging:
        process.kill()
        process.join()
    assert failed or not hanging, f"after {DEADLINE} s still running:\n{output.read_text()[-3000:]}"
    return [process.exitcode for process in processes]


# --------------------------------------------------------------------------------------------------- training


class Campaign:
    """Runs that are killed again and again, in one folder.

    Args:
        main, argv: the command; `argv` lacks the output.
        place: a function of the code that an attempt reaches when its work begins, as (owner, name).
    """

    def __init__(self, folder: Path, main: Callable, argv: list, option: str, place: tuple, seed: int):
        self.folder = folder
        self.main = main
        self.argv = argv
        self.option = option
        self.place = place
        self.random = np.random.default_rng(seed)
        self.log = folder / "output.txt"
        self.kills = 0
        self.half_written = 0
        self.runs = 0
        self.seconds = 0.0  # within which a kill comes
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, kills: list[Callable | None]) -> list[int]:
        return attempt(self.main, [*self.argv, self.option, self.folder / name], self.log, kills, grace=1)

    def whole(self, world: int) -> None:
        """The uninterrupted run."""
        started = time.monotonic()
        assert self.run("whole", [None] * world) == [0] * world, self.log.read_text()[-3000:]
        self.seconds = 0.8 * (time.monotonic() - started)

    def next_name(self) -> str:
        self.runs += 1
        return f"killed-{self.runs}"

    def left_half(self) -> set[tuple[Path, int]]:
        """Files whose write was cut off, each with its time."""
        return {(path, path.stat().st_mtime_ns) for path in self.folder.rglob("*.tmp")}

    def random_kill(self, in_checkpoint: bool) -> Callable:
        if in_checkpoint and self.random.random() < 0.5:
            return partial(die_in_checkpoint, int(self.random.integers(1, 4)), self.random.random())
        delay, (owner, name) = self.random.random() * self.seconds, self.place
        return lambda: setattr(owner, name, arm(getattr(owner, name), delay))

    def killed(self, name: str, kills: int, worlds: list[int], in_checkpoint=False) -> None:
        """Kill a run `kills` times, each time on one of `worlds` processes, then let it finish."""
        while kills:
            world = int(self.random.choice(worlds))
            plans = [self.random_kill(in_checkpoint), *(self.random_kill(False) for _ in range(world - 1))]
            before = self.left_half()
            codes = self.run(name, plans)
            # A process that loses another one ends with status 1
            allowed = {0, -signal.SIGKILL} if world == 1 else {0, 1, -signal.SIGKILL}
            is_good = set(codes) <= allowed and (set(codes) == {0} or -signal.SIGKILL in codes)
            assert is_good, (codes, self.log.read_text()[-3000:])
            if set(codes) == {0}:
                self.seconds *= 0.7  # it finished before its time came
                break
            kills -= 1
            self.kills += 1
            self.half_written += bool(self.left_half() - before)
        world = worlds[0]
        assert self.run(name, [None] * world) == [0] * world, self.log.read_text()[-3000:]


def training_campaign(
    folder: Path, config: Path, kills: int, worlds: list[int], seed: int, rounds: int = 5
) -> Campaign:
    """Kill training runs; assert that they end like the one that was left alone."""
    argv = ["--config", config, *overrides(TRAINING)]
    campaign = Campaign(folder, train.main, argv, "--output", (launch, "make_accelerator"), seed)
    campaign.whole(worlds[0])
    while campaign.kills < kills:
        name = campaign.next_name()
        campaign.killed(name, min(rounds, kills - campaign.kills), worlds, in_checkpoint=True)
        if len(set(worlds)) == 1:
            assert_same_training(folder / "whole", folder / name)
        else:
            assert_close_metrics(folder / "whole", folder / name)
    return campaign


def assert_same_training(one: Path, other: Path) -> None:
    """Bitwise the same weights, EMA, optimizer state and metrics, and the same files."""
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (one, other)]
    assert files[0] == files[1], files
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    states = [torch.load(checkpoint.list_checkpoints(folder / "checkpoints")[-1]) for folder in (one, other)]
    for key in COMPARED:
        assert_equal(states[0][key], states[1][key], key)


def assert_equal(one, other, where: str) -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other)):
            assert_equal(*pair, f"{where}.{number}")
    else:
        assert one == other, where


def assert_close_metrics(one: Path, other: Path) -> None:
    """With another number of processes sums round differently, and later steps multiply the difference."""
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (one, other)]
    rows, others = ([json.loads(line) for line in part] for part in lines)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, same in zip(rows, others):
        assert abs(row["loss"] - same["loss"]) <= 0.01 * row["loss"], (row["step"], row["loss"], same["loss"])


# ------------------------------------------------------------------------------------ extraction and sampling


def content(folder: Path) -> dict[str, bytes]:
    """All files but those that say how long something took."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "records"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "summary.json"}


def extraction_campaign(
    folder: Path, images: Path, vae: Path, kills: int, worlds: list[int], seed: int
) -> Campaign:
    argv = ["--data-path", images, "--vae", vae, "--image-size", 16, "--shard-size", 1, "--num-workers", 0]
    argv += ["--global-batch-size", 24]
    campaign = Campaign(
        folder, extract_features.main, argv, "--features-path", (extract_features, "read_shards"), seed
    )
    campaign.whole(1)
    while campaign.kills < kills:
        name = campaign.next_name()
        campaign.killed(name, min(4, kills - campaign.kills), worlds)
        assert content(folder / name) == content(folder / "whole")
        manifest = json.loads((folder / name / "manifest.json").read_text())
        assert [(shard["first"], shard["stop"]) for shard in manifest["shards"]] == [
            (i, i + 1) for i in range(10)
        ]
    return campaign


def sampling_campaign(folder: Path, ckpt: Path, kills: int, worlds: list[int], seed: int) -> Campaign:
    argv = ["--ckpt", ckpt, "--num-sampling-steps", 4, "--num-fid-samples", 24, "--per-proc-batch-size", 3]
    campaign = Campaign(folder, sample_ddp.main, argv, "--output-dir", (sample_ddp, "sample_missing"), seed)
    campaign.whole(1)
    while campaign.kills < kills:
        name = campaign.next_name()
        campaign.killed(name, min(4, kills - campaign.kills), worlds)
        ours, whole = content(folder / name), content(folder / "whole")
        for left in [file for file in ours if file.endswith(".tmp")]:
            del ours[left]
        assert ours == whole
        assert (folder / f"{name}.npz").read_bytes() == (folder / "whole.npz").read_bytes()
    return campaign


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder for everything")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", default="", help="rows with this beginning, e.g. training (sampling needs the first row)"
    )
    args = parser.parse_args()
    calm()
    folder, kills, seed = args.folder.resolve(), args.kills, args.seed
    vae, images = save_tiny_vae(folder / "vae"), save_tiny_images(folder / "images")
    config = save_tiny_config(folder, images, vae)
    ckpt = folder / "training-1" / "whole" / "checkpoints" / f"{STEPS:07d}.pt"  # of the first row
    table = {
        "training, one process": lambda: training_campaign(folder / "training-1", config, kills, [1], seed),
        "training, two processes": lambda: training_campaign(
            folder / "training-2", config, kills // 2, [2], seed
        ),
        "training, one and two": lambda: training_campaign(
            folder / "training-12", config, kills // 2, [1, 2], seed
        ),
        "extraction, one process": lambda: extraction_campaign(
            folder / "store-1", images, vae, kills, [1], seed
        ),
        "extraction, one to three": lambda: extraction_campaign(
            folder / "store-3", images, vae, kills, [1, 2, 3], seed
        ),
        "sampling, one process": lambda: sampling_campaign(folder / "samples-1", ckpt, kills, [1], seed),
        "sampling, one and two": lambda: sampling_campaign(folder / "samples-2", ckpt, kills, [1, 2], seed),
    }
    for name, campaign in table.items():
        if not name.startswith(args.only):
            continue
        started = time.monotonic()
        done = campaign()
        counts = f"{done.kills:3d} kills ({done.half_written} of them in the write of a file)"
        seconds = time.monotonic() - started
        print(f"{name:<26} {counts}, {done.kills:3d} survived, {seconds:4.0f} s", flush=True)


if __name__ == "__main__":
    main()
