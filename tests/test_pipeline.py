"""Images to samples as users run it: extraction, training under real launchers, resuming, and both samplers."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import sample_ddp
from config import UserError, config_from_dict, load_config, to_dict
from figures import cost
from models import build_model
from processes import group
from sampling.accounting import image_tflop
from sampling.budgets import ALL, Budget
from sampling.generate import SamplingOptions, draw_labels, generate, load_trained, replace_cost_limits
from training import schedules

ROOT = Path(__file__).parent.parent
STEPS = 8  # of the tiny configuration
WRITTEN = ["chunk_maps.png", "chunking_summary.png", "chunking_viz.png", "sample.png", "summary.json"]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",  # sums in one order, whatever the machine
    "CUDA_VISIBLE_DEVICES": "",  # on the CPU, as a machine without a GPU finds its way
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


@pytest.fixture(autouse=True, scope="module")
def on_one_thread_of_the_cpu():
    """What runs in this process computes exactly like the subprocesses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "default_device", lambda local_rank=0: torch.device("cpu"))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


def launch(command: list, **options) -> subprocess.CompletedProcess:
    command = [str(part) for part in command]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def trained(tiny_config) -> Path:
    """The folder of an uninterrupted run under `accelerate launch`, with sample grids on the way."""
    folder = tiny_config.parent / "whole"
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    done = launch(
        [
            *accelerate,
            "train.py",
            "--config",
            tiny_config,
            "--output",
            folder,
            "--set",
            "logging.sample_every=4",
        ]
    )
    assert f"finished at step {STEPS} of {STEPS}: {folder}" in done.stdout
    return folder


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("*.pt"))


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensors(state: dict, *keys: str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint under flat names."""
    flat = {}
    for key in keys or state:
        value = state[key]
        if isinstance(value, dict):
            flat.update({f"{key}.{name}": tensor for name, tensor in tensors(value).items()})
        elif isinstance(value, torch.Tensor):
            flat[str(key)] = value
    return flat


def assert_same_run(one: Path, other: Path) -> None:
    """Bitwise the same weights, EMA, optimizer and metrics."""
    states = [torch.load(newest(folder), weights_only=True) for folder in (one, other)]
    assert states[0]["step"] == states[1]["step"]
    ours, theirs = (tensors(state, "model", "ema", "optimizer") for state in states)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()


# --------------------------------------------------------------------------------------------------- training


def test_what_a_run_leaves_behind(trained, tiny_config, tiny_vae):
    names = {path.name for path in trained.iterdir()}
    pictures = {"by_timestep.png", "samples"}
    assert names == {"checkpoints", "config.yaml", "log.txt", "metrics.jsonl", *pictures}
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == [
        "0000003.pt",
        "0000006.pt",
        "0000008.pt",
    ]
    assert load_config(trained / "config.yaml") == load_config(tiny_config, ["logging.sample_every=4"])
    state = torch.load(newest(trained), weights_only=True)
    assert state["class_names"] == ["a", "b", "c"] and state["autoencoder"]["name"] == str(tiny_vae)
    assert state["config"]["training"]["learning_rate"] == 1e-3

    config, rows = load_config(tiny_config).training, read_metrics(trained)
    assert [row["step"] for row in rows] == [4, 8]
    for row in rows:
        done = row["step"] - 1
        assert row["drop_fraction"] == schedules.drop_fraction(done, config)
        assert row["downsample_factor"] == schedules.downsample_factor(done, config)
        assert row["learning_rate"] == schedules.learning_rate(done, config)
        assert row["loss"] == pytest.approx(row["mse"] + row["vb"] + 0.03 * row["ratio_loss"], rel=1e-5)
        assert row["kept_effective_mean"] <= row["kept_natural_mean"] <= 1
        assert row["kept_natural_min"] <= row["kept_natural_mean"] <= row["kept_natural_max"]
        assert 0 < row["grad_norm"] < 1e3 and row["tflop_per_image"] > 0
        assert not any(key.endswith("_per_sec") for key in row)  # the clock would make equal runs differ
    assert rows[0]["mse"] == pytest.approx(1, abs=0.2)  # the first output is zero

    for step in (4, 8):
        grid = np.asarray(Image.open(trained / "samples" / f"{step:07d}.png"))
        assert grid.shape == (2 * 34 + 2, 8 * 34 + 2, 3) and grid.std() > 1


IN_ONE_PROCESS = """
import os, shutil, signal, sys
from pathlib import Path
import train
from training import launch, schedules

config, folder = sys.argv[1], Path(sys.argv[2])

def run(output, *changes):
    changes = [part for change in changes for part in ("--set", change)]
    train.main(["--config", config, *(["--output", str(folder / output)] if output else []), *changes])

rate = schedules.learning_rate
def interrupted(step, training):
    if step == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return rate(step, training)

schedules.learning_rate = interrupted
try:
    run("stopped")
except SystemExit as stopped:
    assert stopped.code == 128 + signal.SIGTERM
schedules.learning_rate = rate
shutil.copytree(folder / "stopped", folder / "copied")
run("stopped", "data.num_workers=1")

run("pieces", "training.max_steps=4", "logging.ckpt_every=100")
run("pieces", "training.max_steps=4", "logging.ckpt_every=100")
train.main(["--resume", str(folder / "pieces"), "--set", f"training.max_steps={STEPS}"])

once = ["training.max_steps=1"]
run(None, *once)
os.makedirs(folder / "results" / "007-mine")
run(None, *once)
run("branch", "training.max_steps=5", f"training.resume_from_ckpt={folder}/copied/checkpoints/0000003.pt")
start = f"training.resume_from_ckpt={folder}/copied/checkpoints/0000003.pt"
run("changed", start, "training.max_steps=4", "training.learning_rate=1e-2", "training.global_batch_size=2")
run("tracked", "training.max_steps=1", "logging.trackers=[wandb]")
run("tracked", "training.max_steps=2", "logging.trackers=[wandb]")
launch.total_peak_flops = lambda accelerator: 1e9
run("measured", "training.max_steps=1")
"""


@pytest.fixture(scope="module")
def in_one_process(tiny_config) -> subprocess.CompletedProcess:
    """Many runs in one process; `tiny_config.parent` holds their folders."""
    script = tiny_config.parent / "in_one_process.py"
    script.write_text(IN_ONE_PROCESS.replace("{STEPS}", str(STEPS)))
    return launch([sys.executable, script, tiny_config, tiny_config.parent])


def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on_bitwise(in_one_process, trained, tiny_config):
    """The signal falls into the middle of a log window and between two regular checkpoints."""
    stopped = tiny_config.parent / "stopped"
    assert f"stopped by SIGTERM at step 5 of {STEPS}: {stopped}" in in_one_process.stdout
    assert (
        max(path.name for path in (tiny_config.parent / "copied" / "checkpoints").iterdir()) == "0000005.pt"
    )
    assert "resuming from step 5" in (stopped / "log.txt").read_text()
    assert_same_run(stopped, trained)


def test_a_run_in_pieces_is_the_same_run(in_one_process, trained, tiny_config):
    """First with fewer steps, then the finished run again, then the rest with --resume, which needs no --config."""
    pieces = tiny_config.parent / "pieces"
    lines = [line for line in in_one_process.stdout.splitlines() if line.endswith(str(pieces))]
    assert lines == [
        f"finished at step 4 of 4: {pieces}",
        f"already finished at step 4 of 4: {pieces}",
        f"finished at step {STEPS} of {STEPS}: {pieces}",
    ]
    assert_same_run(pieces, trained)


CHOSEN_PRECISION = """
import os, sys
import train
from training import launch

config, folder = sys.argv[1:]
del os.environ["ACCELERATE_MIXED_PRECISION"]
launch.BF16_WIDTH = 0

def run(output, steps, has_bf16):
    launch.has_bf16_products = lambda: has_bf16
    train.main(["--config", config, "--output", f"{folder}/{output}", "--set", f"training.max_steps={steps}"])

run("half", 4, True)
run("half", {STEPS}, False)
run("half_at_once", {STEPS}, True)
"""


def test_a_run_in_bfloat16_resumes_in_it_on_a_processor_without(tiny_config):
    script = tiny_config.parent / "chosen_precision.py"
    script.write_text(CHOSEN_PRECISION.replace("{STEPS}", str(STEPS)))
    done = launch([sys.executable, script, tiny_config, tiny_config.parent])
    assert done.stdout.count("precision: bfloat16; --set training.precision=fp32 trains a new run in") == 3
    half = tiny_config.parent / "half"
    assert torch.load(newest(half), weights_only=True)["precision"] == "bf16"
    assert_same_run(half, tiny_config.parent / "half_at_once")


def test_new_runs_are_numbered_after_the_highest(in_one_process, tiny_config):
    names = sorted(path.name for path in (tiny_config.parent / "results").iterdir())
    assert names == ["000-tiny", "007-mine", "008-tiny"]


def test_ema_of_the_first_step(in_one_process, tiny_config):
    config = load_config(tiny_config)
    torch.manual_seed(config.training.seed)
    start = build_model(config).state_dict()
    state = torch.load(newest(tiny_config.parent / "results" / "000-tiny"), weights_only=True)
    assert state["step"] == 1
    for name, value in state["model"].items():
        torch.testing.assert_close(state["ema"][name], 0.9 * start[name] + 0.1 * value, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(start[name], value) for name, value in state["model"].items())


def test_a_new_run_from_a_checkpoint(in_one_process, tiny_config):
    """It starts at the checkpoint's step, and so arrives where the run that was stopped at step 5 was."""
    branch, copied = (tiny_config.parent / name for name in ("branch", "copied"))
    states = [torch.load(newest(folder), weights_only=True) for folder in (branch, copied)]
    ours, theirs = (tensors(state, "model", "ema", "optimizer") for state in states)
    assert len(ours) > 100 and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "resuming from step 3" in (branch / "log.txt").read_text()


def test_training_continues_with_another_learning_rate_and_batch(in_one_process, tiny_config):
    """As the refusal of the same changes in the folder of the run says."""
    changed = tiny_config.parent / "changed"
    assert "resuming from step 3" in (changed / "log.txt").read_text()
    assert torch.load(newest(changed), weights_only=True)["step"] == 4


def test_wandb_offline(in_one_process, tiny_config):
    """One wandb run over both pieces: the second has the id of the first."""
    folder = tiny_config.parent / "tracked"
    identity = (folder / "wandb_id.txt").read_text().strip()
    runs = [
        path.name.split("-")[3] for path in (folder / "wandb").glob("offline-run-*")
    ]  # behind it, some versions count
    assert runs and set(runs) == {identity}
    assert [row["step"] for row in read_metrics(folder)] == [1, 2]


def test_utilisation_of_a_known_peak(in_one_process, trained, tiny_config):
    """In the log, beside the speed that it follows from; nowhere where the peak is not known."""
    folder = tiny_config.parent / "measured"
    (line,) = [line for line in (folder / "log.txt").read_text().splitlines() if "loss=" in line]
    row = {name: float(value) for name, value in re.findall(r"(\w+)=(\S+)", line)}
    want = row["images_per_sec"] * row["tflop_per_image"] * 1e12 / 1e9
    assert row["model_flop_utilisation"] == pytest.approx(want, rel=2e-3)
    assert "utilisation" not in (folder / "metrics.jsonl").read_text() + (trained / "log.txt").read_text()


ON_TWO_PROCESSES = """
import sys
from accelerate import Accelerator
import cli
import train

config, folder = sys.argv[1:]
Accelerator.end_training = lambda self: None  # it ends the process group, which the next run needs

def all_runs():
    for output in ("two", "copied"):
        train.main(["--config", config, "--output", f"{folder}/{output}"])
    endless = ["--set", "training.max_steps=1000000", "--set", "logging.ckpt_every=1000000"]
    endless += ["--set", "logging.log_every=5"]
    train.main(["--config", config, "--output", f"{folder}/endless", *endless])

cli.run(all_runs)
"""


def test_two_processes(in_one_process, trained, tiny_config, tmp_path):
    """torchrun with gloo: the losses of one process, also from its checkpoint, and a stop on SIGTERM."""
    folder, script = tiny_config.parent, tmp_path / "on_two_processes.py"
    script.write_text(ON_TWO_PROCESSES)
    with open(tmp_path / "output", "w") as output:
        command = [*TORCHRUN, "--nproc_per_node=2", script, tiny_config, folder]
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT
        )
        patience = time.monotonic() + 200
        while (
            not (folder / "endless" / "metrics.jsonl").exists()
            and process.poll() is None
            and time.monotonic() < patience
        ):
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)  # torchrun passes it on
        process.wait(60)
    printed = (tmp_path / "output").read_text()
    for name in ("two", "copied"):
        assert f"finished at step {STEPS} of {STEPS}: {folder / name}" in printed, printed[-4000:]
        rows, alone = read_metrics(folder / name), read_metrics(trained)
        assert len(rows) == len(alone)
        for row, other in zip(rows, alone):
            assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert "2 x cpu" in (folder / "two" / "log.txt").read_text()
    checkpoints = list((folder / "endless" / "checkpoints").iterdir())
    assert len(checkpoints) == 1 and int(checkpoints[0].stem) >= 5
    last = (folder / "endless" / "log.txt").read_text().splitlines()[-1]
    assert f"stopped by SIGTERM at step {int(checkpoints[0].stem)} of 1000000" in last


# --------------------------------------------------------------------------------------------------- sampling


LITE = ["--lite-cfg", "--uncond-tail-dropping-fraction", "0.5"]


@pytest.mark.parametrize(
    "extra", [[], LITE, ["--sampler", "ddim", "--precision", "bf16"]], ids=["plain", "lite", "ddim"]
)
def test_sample_writes_its_pictures(trained, tmp_path, capsys, extra):
    fixed = [
        "--ckpt",
        str(newest(trained)),
        "--num-sampling-steps",
        "5",
        "--classes",
        "0",
        "1",
        "2",
        "--output",
        str(tmp_path),
    ]
    sample.main([*fixed, "--cfg-scale", "2", *extra])
    assert sorted(os.listdir(tmp_path)) == WRITTEN
    pixels = np.asarray(Image.open(tmp_path / "sample.png"))
    assert pixels.shape == (36, 3 * 34 + 2, 3) and pixels.std() > 1
    printed = capsys.readouterr().out
    assert "unconditional branch" in printed and "TFLOP per image over 5 steps" in printed


def test_sample_without_pictures_of_the_chunking(trained, tmp_path, tiny_config):
    """--config may repeat what the checkpoint knows. Without guidance there is one branch; one step is enough."""
    options = ["--cfg-scale", "1", "--num-sampling-steps", "1", "--no-visualize", "--output", str(tmp_path)]
    sample.main(["--config", str(tiny_config), "--ckpt", str(newest(trained)), *options])
    assert sorted(os.listdir(tmp_path)) == ["sample.png", "summary.json"]


def test_the_options_of_the_official_script(trained, tmp_path, capsys):
    """--count-flops is always on, and --profile writes the trace of a step."""
    trace = tmp_path / "new" / "trace.json"
    fixed = [
        "--ckpt",
        str(newest(trained)),
        "--num-sampling-steps",
        "3",
        "--classes",
        "0",
        "--output",
        str(tmp_path),
    ]
    sample.main([*fixed, "--no-visualize", "--count-flops", "--profile", "--profile-trace-path", str(trace)])
    printed = capsys.readouterr().out
    assert "--count-flops: the costs above are always counted" in printed
    assert f"trace of a sampling step in {trace}" in printed
    events = json.loads(trace.read_text())["traceEvents"]
    assert any(event["name"] == "aten::convolution" for event in events)


def test_scale_0_draws_samples_without_a_class(trained, tmp_path):
    run = load_trained(newest(trained))
    options = SamplingOptions(num_sampling_steps=2, cfg_scale=0.0, seed=5)

    def images(label, scale):
        (batch,) = generate(run, [0], [label], dataclasses.replace(options, cfg_scale=scale))
        step = batch.kept[0]
        assert (step.conditional is None) == (scale == 0) and (step.unconditional is None) == (scale == 1)
        return batch.images.float()

    without = images(0, 0.0)
    assert torch.equal(without, images(1, 0.0))
    table = run.model.y_embedder.table.weight.data
    table[:3] = table[3]  # every class like the null label
    assert torch.equal(without, images(1, 1.0))

    few = ["--num-fid-samples", "2", "--num-sampling-steps", "1", "--cfg-scale", "0"]
    sample_ddp.main(["--ckpt", str(newest(trained)), *few, "--output-dir", str(tmp_path / "s")])
    assert np.load(tmp_path / "s.npz").files == ["arr_0"]
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert list(summary["tflop_by_branch"]) == ["unconditional"] and summary["kept_by_class"] == []
    assert {row["conditional"] for row in summary["kept_by_step"]} == {None}


def test_pictures_of_samples_without_a_class(trained, tmp_path, capsys):
    """They show the only branch there is, and name no class."""
    scale_0 = f"--ckpt {newest(trained)} --cfg-scale 0 --num-sampling-steps 2 --classes 2 0 --output".split()
    sample.main([*scale_0, str(tmp_path), "--tflops-per-image", "1"])
    printed = capsys.readouterr().out
    assert "--classes: give only the number of images" in printed
    assert "unconditional branch: " in printed and "\nconditional branch" not in printed
    assert (tmp_path / "chunking_viz.png").is_file() and (tmp_path / "chunking_summary.png").is_file()
    cost.main([str(tmp_path / "summary.json")])
    assert not (tmp_path / "kept_by_class.png").exists() and (tmp_path / "cost_by_component.png").is_file()
    sample.main([*scale_0, str(tmp_path), "--dry-run"])
    assert "2 without a class" in capsys.readouterr().out


@pytest.mark.parametrize("bf16_vae", [False, True])
def test_the_autoencoder_has_its_own_precision(trained, monkeypatch, bf16_vae):
    run = load_trained(newest(trained))
    seen = []
    decode = run.autoencoder.decode

    def record(latents, bf16=False):
        seen.append(bf16)
        return decode(latents, bf16)

    monkeypatch.setattr(run.autoencoder, "decode", record)
    options = SamplingOptions(num_sampling_steps=1, bf16=True, bf16_vae=bf16_vae)
    list(generate(run, [0], [0], options))
    assert seen == [bf16_vae]


@pytest.mark.parametrize("switch", ["training.tf32=true", "model.hnet.fp32_router_dechunk=tf32", None])
def test_one_switch_allows_tf32_in_all_products(trained, switch):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = switch is None  # the opposite
    run = load_trained(newest(trained))
    config = config_from_dict(to_dict(run.config), [switch] if switch else [])
    list(generate(run._replace(config=config), [0], [0], SamplingOptions(num_sampling_steps=1)))
    assert [backend.allow_tf32 for backend in backends] == [switch is not None] * 2
    for backend, allowed in zip(backends, before):
        backend.allow_tf32 = allowed


def test_a_sample_is_a_function_of_seed_and_number(trained):
    """It does not depend on its batch; budgets share the noise; `on_step` sees the conditional branch."""
    run = load_trained(newest(trained))
    options = SamplingOptions(num_sampling_steps=3, cfg_scale=2.0, seed=5)
    labels = draw_labels(5, list(range(5)), 3)

    def images(index, batch_size, options=options):
        batches = list(generate(run, index, [labels[i] for i in index], options, batch_size))
        assert [i for batch in batches for i in batch.indices] == index
        return torch.cat([batch.images for batch in batches]).float()

    whole = images([0, 1, 2, 3, 4], 5)
    assert whole.shape == (5, 3, 32, 32)
    for same in (images([0, 1, 2, 3, 4], 2), images([4, 3, 2, 1, 0], 3).flip(0)):
        assert (whole - same).abs().max() <= 1  # a level, where rounding falls the other way
    assert (whole[0] - whole[1]).abs().max() > 10
    other = images([0], 1, SamplingOptions(num_sampling_steps=3, cfg_scale=2.0, seed=6))
    assert (whole[0] - other[0]).abs().max() > 10

    shown = []
    (batch,) = generate(
        run, [0, 1], labels[:2], options, on_step=lambda step, routing: shown.append((step, routing))
    )
    assert [step.t for step, _ in shown] == [999, 500, 0] == [kept.t for kept in batch.kept]
    for (_, routing), kept in zip(shown, batch.kept):
        assert routing.keep.sum(1).tolist() == kept.conditional.tolist() and len(kept.unconditional) == 2


def test_budgets_change_the_kept_tokens(trained):
    """A dropped share for both branches, and with Lite-CFG one of its own for the unconditional branch."""
    run = load_trained(newest(trained))
    run.model.router.residual_scorer[-1].bias.data.fill_(20.0)  # keep all 64 tokens

    def kept(**changes):
        options = SamplingOptions(num_sampling_steps=1, cfg_scale=2.0, **changes)
        (batch,) = generate(run, [0], [0], options)
        return batch.kept[0].conditional.item(), batch.kept[0].unconditional.item()

    assert kept() == (64, 64)
    assert kept(budget=Budget.fraction(0.5)) == (32, 32)
    assert kept(uncond=Budget.fraction(0.75)) == (64, 16)
    assert kept(budget=Budget.fraction(0.25), uncond=ALL) == (48, 64)


def test_budgets_in_every_unit(trained, tmp_path, capsys):
    """Token budgets are exact, a schedule follows t, branches may differ in kind, an interval leaves one out."""
    run = load_trained(newest(trained))
    run.model.router.residual_scorer[-1].bias.data.fill_(20.0)  # keep all 64 tokens

    def kept(**changes):
        (batch,) = generate(
            run, [0, 1], [0, 1], SamplingOptions(num_sampling_steps=3, cfg_scale=2.0, **changes)
        )
        assert [step.t for step in batch.kept] == [999, 500, 0]
        rows = [[x if x is None else x.tolist() for x in step[1:]] for step in batch.kept]
        assert all(len(set(counts)) == 1 for row in rows for counts in row if counts)
        return [tuple(counts and counts[0] for counts in row) for row in rows]

    assert kept(budget=Budget.tokens(9)) == [(9, 9)] * 3
    assert kept(budget=Budget.tokens(9), uncond=Budget.tokens(4)) == [(9, 4)] * 3
    assert kept(budget=Budget.schedule("999:0.5,500:0.25,0:0")) == [(32, 32), (48, 48), (64, 64)]
    assert kept(budget=Budget.fraction(0.5), uncond=Budget.tokens(4)) == [(32, 4)] * 3
    assert kept(uncond=Budget.schedule("999:0.5,0:0")) == [(64, 32), (64, 48), (64, 64)]
    assert kept(guidance_interval=(300, 600)) == [(64, None), (64, 64), (64, None)]


def test_a_limit_on_the_cost(trained):
    """Where the router keeps every token whatever it sees, the prediction is exact."""
    run = load_trained(newest(trained))
    run.model.router.residual_scorer[-1].bias.data.fill_(20.0)

    def cost(**changes):
        (batch,) = generate(run, [0], [1], SamplingOptions(num_sampling_steps=12, cfg_scale=2.0, **changes))
        return float(image_tflop(run.config, batch.kept)[0]), batch.kept

    full, _ = cost()
    least, _ = cost(budget=Budget.fraction(0.999))
    limit = (full + least) / 2
    limited = SamplingOptions(cfg_scale=2.0, num_sampling_steps=12, budget=Budget.tflops(limit))
    options, prediction = replace_cost_limits(run, [0], [1], limited)
    assert options.budget.unit == "fraction" and options.uncond is None
    dropped = options.budget.value
    chosen, _ = cost(budget=options.budget)
    assert prediction.total == pytest.approx(chosen, rel=1e-9) and least < chosen <= limit
    assert cost(budget=Budget.tflops(limit))[0] == chosen
    one_token_more, _ = cost(budget=Budget.fraction(dropped - 0.017))
    assert one_token_more > limit
    assert cost(budget=Budget.tflops(2 * full))[0] == full
    # What the unconditional branch saves goes to the conditional one
    narrow, kept = cost(budget=Budget.tflops(limit), guidance_interval=(0, 300))
    assert narrow <= limit and kept[0].conditional.item() > 64 * (1 - dropped)


def content(folder: Path) -> dict[str, bytes]:
    """All files that equal runs leave equal: those without times."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name not in ("records", "summary.json")
    }


def account(folder: Path) -> dict:
    """What a run of sample_ddp.py says that its samples cost, without times and memory."""
    summary = json.loads((folder / "summary.json").read_text())
    assert min(summary.pop("seconds_per_image").values()) > 0
    assert summary.pop("ms_per_image") > 0 and summary.pop("peak_memory_mb") > 0
    return summary


def test_many_samples_on_one_two_and_three_processes(trained, tmp_path):
    count, options = (
        7,
        ["--ckpt", str(newest(trained)), "--num-sampling-steps", "3", "--num-fid-samples", "7"],
    )
    options += ["--per-proc-batch-size", "2", "--cfg-scale", "1.5", "--seed", "3"]
    one = tmp_path / "one"
    sample_ddp.main([*options, "--output-dir", str(one)])
    whole, npz, costs = content(one), (tmp_path / "one.npz").read_bytes(), account(one)
    assert whole.keys() == {"settings.json", *(f"{i:06d}.png" for i in range(count))}
    with np.load(tmp_path / "one.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
        assert json.loads(str(arrays["dcdit_class_names"])) == ["a", "b", "c"]
    assert images.shape == (count, 32, 32, 3) and images.dtype == np.uint8
    for i in range(count):
        assert np.array_equal(images[i], np.asarray(Image.open(one / f"{i:06d}.png")))
    assert labels.dtype == np.int64 and labels.tolist() == draw_labels(3, list(range(count)), 3)

    for processes in (2, 3):
        other = tmp_path / f"on_{processes}"
        launch([*TORCHRUN, f"--nproc_per_node={processes}", "sample_ddp.py", *options, "--output-dir", other])
        assert content(other) == whole and account(other) == costs
        assert other.with_suffix(".npz").read_bytes() == npz

    for name in ("000000.png", "000003.png", "000006.png"):
        (one / name).unlink()
    (tmp_path / "one.npz").unlink()
    kept = {
        path.name: path.stat().st_mtime_ns
        for path in one.iterdir()
        if path.name in ("000004.png", "000005.png")
    }
    sample_ddp.main([*options, "--output-dir", str(one)])
    assert content(one) == whole and (tmp_path / "one.npz").read_bytes() == npz and account(one) == costs
    assert kept == {
        name: (one / name).stat().st_mtime_ns for name in kept
    }  # a whole batch is not sampled again


def test_an_interrupted_run_keeps_the_fraction_that_it_chose(trained, tmp_path, capsys):
    fixed = [
        "--ckpt",
        str(newest(trained)),
        "--num-sampling-steps",
        "2",
        "--num-fid-samples",
        "3",
        "--cfg-scale",
        "1",
    ]
    fixed += ["--per-proc-batch-size", "1", "--output-dir", str(tmp_path / "images"), "--tflops-per-image"]
    sample_ddp.main([*fixed, "1"])
    assert "budget: drops 0 of the kept tokens; predicted" in capsys.readouterr().out
    note = tmp_path / "images" / "settings.json"
    settings = json.loads(note.read_text())
    assert settings["budget"] == {"unit": "tflops", "value": 1.0}
    assert settings["chosen"] == {"budget": {"unit": "fraction", "value": 0.0}, "uncond": None}
    settings["chosen"]["budget"]["value"] = 0.75
    note.write_text(json.dumps(settings))
    for name in ("000001.png", "000002.png"):
        (tmp_path / "images" / name).unlink()
    sample_ddp.main([*fixed, "1"])
    assert account(tmp_path / "images")["options"]["budget"] == {"unit": "fraction", "value": 0.75}
    assert "budget:" not in capsys.readouterr().out  # nothing is predicted again
    with pytest.raises(UserError, match="holds samples of another budget; give another folder"):
        sample_ddp.main([*fixed, "2"])


def test_balanced_labels(trained, tmp_path):
    fixed = [
        "--ckpt",
        str(newest(trained)),
        "--num-sampling-steps",
        "1",
        "--num-fid-samples",
        "5",
        "--cfg-scale",
        "1",
    ]
    sample_ddp.main([*fixed, "--labels", "balanced", "--output-dir", str(tmp_path / "images")])
    with np.load(tmp_path / "images.npz") as arrays:
        assert arrays["arr_1"].tolist() == [0, 1, 2, 0, 1]


def test_a_moved_run_still_samples(trained, tiny_vae, tmp_path):
    """A checkpoint is one file that knows its configuration; only the autoencoder must be found."""
    shutil.copy(newest(trained), tmp_path / "model.pt")
    run = load_trained(tmp_path / "model.pt", vae=str(tiny_vae))
    assert run.step == STEPS and run.class_names == ["a", "b", "c"] and not run.model.training
    state = torch.load(newest(trained), weights_only=True)
    assert all(torch.equal(value, state["ema"][name]) for name, value in run.model.state_dict().items())
