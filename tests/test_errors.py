"""Mistakes on the command line: one line on stderr, exit status 2, no traceback, and nothing written."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cli
import quickstart
import sample
import sample_ddp
import train
from config import load_config, to_dict, to_yaml
from data.features import open_features
from models import build_model
from weights.checkpoint import save_checkpoint

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tiny_config, tmp_path_factory) -> Path:
    """A folder to be wrong in: run/ of an untrained model, and files that are not what they seem."""
    folder, config = tmp_path_factory.mktemp("errors"), load_config(tiny_config)
    state = build_model(config).state_dict()
    store = open_features(config.data.feature_path, 32)
    common = {"autoencoder": store.autoencoder, "class_names": store.class_names, "optimizer": {}, "step": 1}
    save_checkpoint(
        folder / "run" / "checkpoints",
        common | {"config": to_dict(config), "model": state, "ema": state},
        keep=0,
    )
    (folder / "run" / "config.yaml").write_text(to_yaml(config))

    bad = {name: value * torch.nan if name == "x_embedder.bias" else value for name, value in state.items()}
    save_checkpoint(folder / "nan", common | {"config": to_dict(config), "model": bad, "ema": bad}, keep=0)

    config.training.class_dropout_prob = 0.0
    state = build_model(config).state_dict()
    save_checkpoint(
        folder / "unguided", common | {"config": to_dict(config), "model": state, "ema": state}, keep=0
    )

    (folder / "broken" / "checkpoints").mkdir(parents=True)
    whole = (folder / "run" / "checkpoints" / "0000001.pt").read_bytes()
    (folder / "broken" / "checkpoints" / "0000002.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty").mkdir()
    (folder / "project").mkdir()
    (folder / "project" / "config.yaml").write_text("colour: blue")
    (folder / "photos").mkdir()
    (folder / "photos" / "holiday.png").touch()
    (folder / "a_file").write_text("not a checkpoint, not a folder")
    return folder


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def refusal(script, argv, capsys) -> str:
    """Run a script's main as its command line does; the one line it prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: script.main([str(part) for part in argv]))
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


TRAIN = [
    ("", "--config is missing; give a file of configs/, or --resume with the folder of a run"),
    ("--config {place}/nowhere.yaml", "nowhere.yaml' cannot be read (No such file or directory)"),
    ("--config {place}", "cannot be read (Is a directory)"),
    ("--config {config} --bogus", "unknown option --bogus; see --help"),
    ("--conf {config}", "unknown option --conf; did you mean --config?; see --help"),
    ("--config {config} --same-wandb true", "unknown option --same-wandb; did you mean --same_wandb?"),
    ("--config", "argument --config: expected one argument"),
    ("--config {config} --set training.seed", "must have the form section.key=value"),
    ("--config {config} --set training.sed=1", "unknown key 'training.sed'; did you mean 'training.seed'?"),
    ("--config {config} --same_wandb maybe", "'maybe' is neither true nor false"),
    ("--resume {place}/nowhere",
     "is not the folder of a run (it has no config.yaml); start one with --config"),
    ("--resume {place}/empty", "is not the folder of a run"),
    ("--resume {place}/run --output {place}/run", "both name the run's folder; give one"),
    ("--config {config} --set data.feature_path={place}/nowhere",
     "nowhere is not a folder; make features with"),
    ("--config {config} --set data.feature_path={place}/empty",
     "holds no 32-pixel features; make features with"),
    ("--config {config} --set data.feature_path={place}/a_file", "a_file is not a folder"),
    ("--config {config} --set data.image_size=64", "data.image_size: 64, but"),
    ("--config {config} --set data.latent_stride=8",
     "holds latents of shape (4, 8, 8), but image_size, latent_stride"),
    ("--config {config} --set data.num_classes=2", "data.num_classes: 2 is too small for label 2"),
    ("--config {config} --set training.global_batch_size=16", "16 is more than the 10 images of"),
    ("--config {config} --set training.ratio_batch_size=3",
     "ratio_batch_size: 3 does not divide the local batch of 4"),
    ("--config {config} --set training.max_steps=null --set training.epochs=1 "
     "--set training.gradient_accumulation_steps=3",
     "training.epochs: no optimizer step fits into the run"),
    ("--config {config} --set logging.trackers=[notebook]", "logging.trackers: notebook is not one of all, "),
    ("--config {config} --output {place}/a_file",
     "--output '{place}/a_file': '{place}/a_file' is not a folder"),
    ("--config {config} --output {place}/a_file/run", "'{place}/a_file' is not a folder"),
    ("--config {config} --set logging.results_dir={place}/a_file",
     "logging.results_dir '{place}/a_file': '{place}/a_file' is not a folder"),
    ("--config {config} --output {place}/run --set training.seed=1",
     "--output '{place}/run' was started with a different training.seed; start a new run from it with `python "
     "train.py --config {config} --output {place}/run-2 --set training.seed=1 "
     "--set training.resume_from_ckpt={ckpt}`"),
    ("--resume {place}/run --set training.seed=1",
     "--resume '{place}/run' was started with a different training.seed; start a new run from it with `python "
     "train.py --config {place}/run/config.yaml --output {place}/run-2 --set training.seed=1"),
    ("--config {config} --output {place}/project",
     "'{place}/project/config.yaml' cannot be used (it is incomplete); choose another folder, or remove the file"),
    ("--config {config} --output {place}/run --set training.lr_scales.router=0.5",
     "--set training.init_from={ckpt}"),
    ("--config {config} --output {place}/run --set training.global_batch_size=2 --set training.ratio_batch_size=4",
     "was started with a different training.global_batch_size, training.ratio_batch_size; start a new run"),
    ("--config {config} --output {place}/run --set model.mlp_ratio=2",
     "was started with a different model.mlp_ratio; choose another folder"),
    ("--config {config} --set training.resume_from_ckpt={ckpt} --set training.max_steps=1",
     "training.resume_from_ckpt: '{ckpt}' is of step 1, but the run ends at step 1; set training.max_steps "
     "above 1, or start at step 0 from its weights with training.init_from"),
    ("--config {config} --set training.resume_from_ckpt={place}/nan/0000001.pt",
     "nan/0000001.pt' has non-finite values in x_embedder.bias; give an earlier checkpoint"),
    ("--config {config} --set training.init_from={place}/nan/0000001.pt",
     "nan/0000001.pt' has non-finite values in x_embedder.bias; give an earlier checkpoint"),
    ("--config {config} --output {place}/broken",
     "0000002.pt' is not a readable checkpoint of this repository"),
    ("--config {config} --set training.resume_from_ckpt=nowhere.pt",
     "training.resume_from_ckpt 'nowhere.pt' does not exist"),
    ("--config {config} --set training.resume_from_ckpt={ckpt} --set model.mlp_ratio=2",
     "in the configured network; see model.mlp_ratio"),
    ("--config {config} --set training.resume_from_ckpt={ckpt} --set training.class_dropout_prob=0",
     "see training.class_dropout_prob"),
    ("--config {config} --set training.resume_from_ckpt={ckpt} --set model.hnet.num_heads=[4,4]",
     "'{ckpt}' was trained with another model.hnet.num_heads; add --set 'model.hnet.num_heads=[2, 2]'"),
    ("--config {config} --set training.resume_from_ckpt={ckpt} --set model.timestep_divisor=2",
     "'{ckpt}' was trained with another model.timestep_divisor; add --set model.timestep_divisor="),
    ("--config {config} --output {place}/run --set model.hnet.num_heads=[4,4]",
     "was started with a different model.hnet.num_heads; choose another folder"),
]  # fmt: skip

# What both samplers refuse.
SAMPLING = [
    ("", "--ckpt is missing; give a checkpoint of train.py"),
    ("--config {config}", "--ckpt is missing"),
    ("--ckpt {place}/nowhere.pt",
     "--ckpt '{place}/nowhere.pt' does not exist; give the path of a checkpoint"),
    ("--ckpt {place}/a_file", "is not a readable checkpoint of this repository"),
    ("--ckpt {place}", "is a folder without weights; give the path of a checkpoint"),
    ("--ckpt {place}/run", "is a folder of checkpoints; give one of them, such as '{ckpt}'"),
    ("--ckpt {ckpt} --bogus 1", "unknown option --bogus; see --help"),
    ("--ckpt {ckpt} --cfg_scale 2", "unknown option --cfg_scale; did you mean --cfg-scale?"),
    ("--ckpt {ckpt} --num-sample-steps=5", "did you mean --num-sampling-steps?"),
    ("--ckpt {ckpt} --uncond-tail-dropping-fraction 0.5",
     "--uncond-tail-dropping-fraction 0.5: needs --lite-cfg"),
    ("--ckpt {ckpt} --tail-dropping-fraction 1", "--tail-dropping-fraction 1.0: must be in [0, 1)"),
    ("--ckpt {ckpt} --tail-dropping-fraction nan", "--tail-dropping-fraction nan: must be in [0, 1)"),
    ("--ckpt {ckpt} --lite-cfg --uncond-tail-dropping-fraction -0.1", "-fraction -0.1: must be in [0, 1)"),
    ("--ckpt {ckpt} --token-budget 1",
     "--token-budget 1: must be from 2 (the first and last token) to 64 (all)"),
    ("--ckpt {ckpt} --token-budget 65",
     "--token-budget 65: must be from 2 (the first and last token) to 64 (all)"),
    ("--ckpt {ckpt} --cuda-graph",
     "--cuda-graph: needs a number of tokens that is known in advance; add --token-budget"),
    ("--ckpt {ckpt} --cuda-graph --token-budget 9",
     "--cuda-graph: needs a CUDA device, and the model is on cpu"),
    ("--ckpt {ckpt} --token-budget 3.5", "argument --token-budget: invalid int value: '3.5'"),
    ("--ckpt {ckpt} --tflops-per-image 0", "--tflops-per-image 0.0: must be a positive number"),
    ("--ckpt {ckpt} --num-sampling-steps 2 --tflops-per-image 1e-9",
     "--tflops-per-image 1e-09: must be at least"),
    ("--ckpt {ckpt} --cfg-scale 2 --lite-cfg --num-sampling-steps 2 --uncond-tflops-per-image 1e-9",
     "--uncond-tflops-per-image 1e-09: must be at least"),
    ("--ckpt {ckpt} --budget-schedule 1000:0.6,0",
     "--budget-schedule '1000:0.6,0': must be pairs t:fraction, e.g. 1000:0.6"),
    ("--ckpt {ckpt} --tail-dropping-fraction 0 --token-budget 9",
     "--tail-dropping-fraction and --token-budget: are two budgets for the same tokens; give one"),
    ("--ckpt {ckpt} --lite-cfg --uncond-token-budget 9 --uncond-budget-schedule 0:0",
     "--uncond-token-budget and --uncond-budget-schedule: are two budgets for the same tokens; give one"),
    ("--ckpt {ckpt} --uncond-token-budget 9", "--uncond-token-budget 9: needs --lite-cfg"),
    ("--ckpt {ckpt} --guidance-interval 500 100",
     "--guidance-interval 500 100: must be two timesteps from 0 to 1000"),
    ("--ckpt {ckpt} --guidance-interval 0 nan", "must be two timesteps from 0 to 1000, the lower first"),
    ("--ckpt {ckpt} --guidance-interval 0", "argument --guidance-interval: expected 2 arguments"),
    ("--ckpt {ckpt} --cfg-scale 1 --guidance-interval 0 500",
     "--cfg-scale 1 is no guidance; raise the scale"),
    ("--ckpt {ckpt} --cfg-scale 0.9",
     "--cfg-scale 0.9: must be a number of at least 1 (1 is no guidance), or 0 for samples without a class"),
    ("--ckpt {ckpt} --cfg-scale nan", "--cfg-scale nan: must be a number of at least 1"),
    ("--ckpt {ckpt} --cfg-scale strong", "argument --cfg-scale: invalid float value: 'strong'"),
    ("--ckpt {place}/unguided/0000001.pt --cfg-scale 2",
     "the model was trained without class dropout; use 1"),
    ("--ckpt {place}/unguided/0000001.pt --cfg-scale 0", "without class dropout; use 1"),
    ("--ckpt {ckpt} --num-sampling-steps 0", "--num-sampling-steps 0: must be from 1 to 1000"),
    ("--ckpt {ckpt} --num-sampling-steps 1001", "--num-sampling-steps 1001: must be from 1 to 1000"),
    ("--ckpt {ckpt} --sampler plms",
     "the model was trained with diffusion.objective gaussian; use one of ddpm, ddim, dpm++"),
    ("--ckpt {ckpt} --seed -1", "--seed -1: must be 0 or greater"),
    ("--ckpt {ckpt} --seed 9223372036854775808", "and below 2**63"),
    ("--ckpt {ckpt} --vae {place}/nowhere", "neither ema, mse nor the folder of a diffusers"),
    ("--ckpt {ckpt} --set model.hnet.num_heads=[4,4]",
     "differs from the checkpoint's configuration in model.hnet.num_heads"),
    ("--ckpt {ckpt} --config {config} --set model.hnet.dechunk_kernel_sigma=2",
     "--config differs from the checkpoint's configuration in model.hnet.dechunk_kernel_sigma; leave it out"),
    ("--ckpt {ckpt} --config {config} --set diffusion.noise_schedule=squaredcos_cap_v2 "
     "--set data.num_classes=5",
     "in data.num_classes, diffusion.noise_schedule; leave it out"),
]  # fmt: skip


@pytest.fixture
def fill(place, tiny_config):
    """Put paths into an entry of the tables."""
    names = {"place": place, "config": tiny_config, "ckpt": place / "run" / "checkpoints" / "0000001.pt"}
    return lambda text: text.format(**names)


def check(script, fill, place, capsys, line: str, part: str) -> None:
    before = files(place)
    assert fill(part) in refusal(script, fill(line).split(), capsys)
    assert files(place) == before


@pytest.mark.parametrize("line, part", TRAIN, ids=[line or "nothing" for line, _ in TRAIN])
def test_train(fill, place, capsys, line, part):
    check(train, fill, place, capsys, line, part)


@pytest.mark.parametrize("line, part", SAMPLING, ids=[line or "nothing" for line, _ in SAMPLING])
@pytest.mark.parametrize("script", [sample, sample_ddp], ids=["sample", "sample_ddp"])
def test_both_samplers(fill, place, capsys, script, line, part, monkeypatch):
    monkeypatch.chdir(place / "empty")  # where the default output folders would be
    check(script, fill, place, capsys, line, part)


@pytest.mark.parametrize(
    "line, part",
    [
        ("--ckpt {ckpt} --classes 3", "--classes 3: the model knows labels 0 to 2"),
        ("--ckpt {ckpt} --classes 0 -1", "--classes -1: the model knows labels 0 to 2"),
        ("--ckpt {ckpt} --classes", "argument --classes: expected at least one argument"),
        (
            "--ckpt {ckpt} --output {place}/a_file",
            "--output '{place}/a_file': '{place}/a_file' is not a folder",
        ),
    ],
)
def test_sample(fill, place, capsys, line, part):
    check(sample, fill, place, capsys, line, part)


@pytest.mark.parametrize(
    "line, part",
    [
        ("--per-proc-batch-size 0", "--per-proc-batch-size 0: must be at least 1"),
        ("--num-fid-samples 0", "--num-fid-samples 0: must be at least 1"),
        ("--labels sorted", "argument --labels: invalid choice: 'sorted'"),
        (
            "--output-dir {place}/photos",
            "--output-dir '{place}/photos' holds files that this script did not write; give another",
        ),
        ("--output-dir {place}/a_file", "--output-dir '{place}/a_file': '{place}/a_file' is not a folder"),
    ],
)
def test_sample_ddp(fill, place, capsys, line, part):
    check(sample_ddp, fill, place, capsys, f"--ckpt {{ckpt}} {line}", part)


def test_samples_of_other_settings_are_not_mixed(fill, tmp_path, capsys):
    few = fill("--ckpt {ckpt} --num-fid-samples 2 --num-sampling-steps 1 --output-dir").split()
    sample_ddp.main([*few, str(tmp_path / "images")])
    before = files(tmp_path)
    for change, key in (
        ("--seed 1", "seed (0, not 1)"),
        ("--cfg-scale 2", "cfg_scale (1.5, not 2.0)"),
        ("--labels balanced", "labels (uniform, not balanced)"),
        ("--token-budget 5", "budget"),
        ("--per-proc-batch-size 5", "per_proc_batch_size (32, not 5)"),
    ):
        line = refusal(sample_ddp, [*few, tmp_path / "images", *change.split()], capsys)
        assert f"holds samples of another {key}; give another folder" in line
    assert files(tmp_path) == before


def test_quickstart(capsys):
    assert "unknown option --fast" in refusal(quickstart, ["--fast"], capsys)


def test_batches_are_checked_against_the_launcher(fill, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = refusal(train, fill("--config {config}").split(), capsys)
    assert "training.global_batch_size: 4 is not a multiple of the 3 processes; try 6" in line


def test_only_the_first_process_of_a_machine_speaks(fill, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: train.main([]))
    assert caught.value.code == 2 and capsys.readouterr().err == ""


def test_dry_runs_print_and_write_nothing(fill, place, capsys, monkeypatch):
    monkeypatch.chdir(place / "empty")
    before = files(place)
    train.main(fill("--config {config} --dry-run --set data.feature_path=not_needed_yet").split())
    printed = capsys.readouterr().out
    parameters = sum(value.numel() for value in build_model(load_config(fill("{config}"))).parameters())
    for part in (
        f"parameters    {parameters:,}",
        "tokens        64 per image (8 x 8)",
        "local batch   4 of 4",
        "effective     8",
    ):
        assert part in printed
    assert "not_needed_yet" in printed
    sample.main(fill("--ckpt {ckpt} --dry-run").split())
    assert "samples       8 of classes [0, 1, 2, 0, 1, 2, 0, 1]" in capsys.readouterr().out
    sample_ddp.main(fill("--ckpt {ckpt} --dry-run").split())
    assert "samples       50000 into samples" in capsys.readouterr().out
    assert files(place) == before


@pytest.mark.parametrize("script", [sample, sample_ddp], ids=["sample", "sample_ddp"])
def test_a_model_without_a_null_label_is_sampled_without_guidance(fill, capsys, script):
    script.main(fill("--ckpt {place}/unguided/0000001.pt --lite-cfg --dry-run").split())
    printed = capsys.readouterr().out
    assert "--cfg-scale 1: is used, because the model was trained without class dropout" in printed
    assert "--lite-cfg: has no effect at --cfg-scale 1" in printed
    script.main(fill("--ckpt {ckpt} --dry-run").split())
    assert "--cfg-scale" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, part",
    [
        (
            "--cfg-scale 1 --lite-cfg --uncond-tail-dropping-fraction 0.5",
            "--lite-cfg: has no effect at --cfg-scale 1",
        ),
        ("--cfg-scale 2 --lite-cfg", "--lite-cfg: without a budget it is plain guidance"),
        ("--cfg-scale 2 --uncond-tail-dropping-fraction 0.0", ""),
    ],
)
def test_official_options_without_an_effect_are_accepted(fill, capsys, line, part):
    sample.main(fill(f"--ckpt {{ckpt}} --dry-run {line}").split())
    notes = [row for row in capsys.readouterr().out.splitlines() if row.startswith("--")]
    assert len(notes) == bool(part) and part in "".join(notes)


COMMANDS = {
    "train.py": "--config is missing",
    "sample.py": "--ckpt is missing",
    "sample_ddp.py": "--ckpt is missing",
    "extract_features.py": "the following arguments are required: --data-path",
}


@pytest.mark.parametrize("script", COMMANDS)
def test_scripts_report_their_own_mistakes(script, capsys, monkeypatch):
    """What `python script.py` runs, without waiting for its imports again."""
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    lines = capsys.readouterr().err.splitlines()
    assert (
        caught.value.code == 2
        and len(lines) == 1
        and lines[0].startswith("error: ")
        and COMMANDS[script] in lines[0]
    )


def test_a_real_command():
    done = subprocess.run([sys.executable, "train.py"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: --config is missing")


def test_the_untrained_checkpoint_is_sound(place, fill):
    """The other tests are about what is wrong with the command, so nothing may be wrong with the file."""
    state = torch.load(fill("{ckpt}"), weights_only=True)
    assert state["step"] == 1 and state["config"]["model"]["name"] == "tiny"


@pytest.mark.parametrize("given, kept", [(None, cli.ONEDNN_PRIMITIVES), ("7", "7")])
def test_a_command_line_bounds_the_code_that_onednn_keeps(given, kept, monkeypatch):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, given or "")  # the test's end restores what was there before
    if given is None:
        monkeypatch.delenv(name)
    seen = []
    cli.run(lambda: seen.append(os.environ[name]))
    assert seen == [kept]


def test_an_interrupted_program_is_one_line(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    for rank, printed in (("0", "\nstopped by Ctrl-C\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as caught:
            cli.run(interrupted)
        assert caught.value.code == 130 and capsys.readouterr().err == printed


@pytest.mark.parametrize(
    "command, line",
    [
        (["toy.shapes", "--output", "{0}/x", "--seed", str(2**63)], f"--seed {2**63}: must be 0 or greater"),
        (["data.features", "--verify", "{0}/x"], "--verify '{0}/x': does not exist"),
        (["figures.cost", "{0}/x.json", "--output", "{0}"], "'{0}/x.json': does not exist"),
        (["figures.ema_lengths", "{0}", "--reference", "r"], "'{0}': has no checkpoint"),
    ],
)  # fmt: skip
def test_modules_name_what_is_wrong(command, line, tmp_path):
    words = [word.format(tmp_path) for word in command]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {line.format(tmp_path)}"), done.stderr
