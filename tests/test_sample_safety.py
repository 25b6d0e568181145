"""Samplers and odd models: EMAs that are still young, values that are not finite, classes without a name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cli
import sample
import sample_ddp
import train
from config import Config, UserError, config_from_dict, load_config, to_dict
from data.autoencoder import Autoencoder
from data.features import open_features
from evaluation.image_sets import open_source
from figures import elastic_grid, kept_tokens
from figures.chunking import as_pixels
from models import build_model
from sampling import accounting, hub
from sampling.budgets import Budget
from sampling.generate import SamplingOptions, generate_images, load_trained
from sampling.load import warn_of_untrained_labels
from sampling.pipeline import DCDiTPipeline
from training import sample_grids
from training.checks import label_ranges
from weights import convert
from weights.checkpoint import list_checkpoints, save_checkpoint

FEW_STEPS = ["--num-sampling-steps", "2"]


def save_model(config_file: Path, folder: Path, *changes: str, step: int = 100, **entries) -> Path:
    """A checkpoint whose trained weights are 0.01 above those of the EMA."""
    config = load_config(config_file, changes)
    torch.manual_seed(0)
    ema = {name: tensor + 0.01 for name, tensor in build_model(config).state_dict().items()}
    store = open_features(config.data.feature_path, 32)
    state = {
        "step": step,
        "config": to_dict(config),
        "autoencoder": store.autoencoder,
        "features": store.fingerprint(),
        "class_names": store.class_names,
        "model": {name: tensor + 0.01 for name, tensor in ema.items()},
        "ema": ema,
        "optimizer": {},
    }
    return save_checkpoint(folder, state | entries, keep=0)


@pytest.fixture
def checkpoint(tiny_config, tmp_path) -> Path:
    return save_model(tiny_config, tmp_path / "checkpoints")


# ---------------------------------------------------------------------------------------------- keys of a fork


def test_keys_of_a_fork_are_left_out_with_one_warning(tiny_config, checkpoint, tmp_path, capsys):
    config = to_dict(load_config(tiny_config))
    config["model"]["hnet"]["gates"] = 2
    config["swin"] = {"windows": [4]}
    fork = save_model(tiny_config, tmp_path / "fork", config=config)
    trained = load_trained(fork)
    printed = capsys.readouterr().out.splitlines()
    warning = f"warning: --ckpt '{fork}' has keys of another version, which have no effect here: "
    assert [line for line in printed if "another version" in line] == [f"{warning}model.hnet.gates, swin"]
    assert trained.fingerprint == load_trained(checkpoint).fingerprint
    sample.main(
        ["--ckpt", str(fork), *FEW_STEPS, "--no-visualize", "--classes", "0", "--output", str(tmp_path)]
    )
    sample.main(["--ckpt", str(fork), "--list-classes"])
    # A key that is typed must be right, and so must those of a run that resumes
    with pytest.raises(UserError, match="unknown key 'swin.windows'|unknown key 'swin'"):
        load_trained(fork, overrides=["swin.windows=3"])
    with pytest.raises(UserError, match="unknown key"):
        config_from_dict(config)
    # A checkpoint without them prints nothing
    capsys.readouterr()
    load_trained(checkpoint)
    assert "another version" not in capsys.readouterr().out


# -------------------------------------------------------------------------------------------- EMA or raw weights


def test_the_trained_weights_are_an_option_everywhere(checkpoint, tmp_path, capsys):
    ema = load_trained(checkpoint)
    model = load_trained(checkpoint, weights="model")
    difference = model.model.state_dict()["norm.weight"] - ema.model.state_dict()["norm.weight"]
    torch.testing.assert_close(difference, torch.full_like(difference, 0.01))
    assert model.fingerprint != ema.fingerprint

    # As commands, and through the files that are made of them
    chosen = ["--ckpt", str(checkpoint), "--weights", "model"]
    pictures = ["--no-visualize", "--classes", "0", "1", *FEW_STEPS]
    sample.main([*chosen, *pictures, "--output", str(tmp_path / "raw")])
    sample.main(["--ckpt", str(checkpoint), *pictures, "--output", str(tmp_path / "ema")])
    assert (tmp_path / "raw" / "sample.png").read_bytes() != (tmp_path / "ema" / "sample.png").read_bytes()
    convert.main([str(checkpoint), str(tmp_path / "raw.safetensors"), "--weights", "model"])
    hub.main([*chosen, "--output", str(tmp_path / "hub")])
    assert "Trained weights after 100 steps" in (tmp_path / "hub" / "README.md").read_text()
    for source in (tmp_path / "raw.safetensors", tmp_path / "hub"):
        for weights in ("ema", "model"):  # the file has one, whatever is asked for
            assert load_trained(source, weights=weights).fingerprint == model.fingerprint


def test_a_weights_file_has_no_trained_weights(checkpoint, tmp_path):
    for name in ("ema.safetensors", "ema.pt"):
        convert.main([str(checkpoint), str(tmp_path / name)])
        with pytest.raises(UserError, match="holds the EMA weights only, so --weights model has nothing"):
            load_trained(tmp_path / name, weights="model")


@pytest.mark.parametrize(
    "decay, step, share", [(0.9999, 1400, "87%"), (0.9, 20, "12%"), (0.9, 22, None), (0.9999, 0, None)]
)
def test_an_ema_that_has_not_caught_up(tiny_config, tmp_path, capsys, decay, step, share):
    """Converted weights, at step 0, were not trained here."""
    path = save_model(tiny_config, tmp_path, f"training.ema_decay={decay}", step=step)
    load_trained(path)
    printed = capsys.readouterr().out
    assert ("warning: " in printed) == (share is not None)
    if share:
        assert f"{share} of the EMA weights is still what training started with" in printed
        assert "--weights model takes the trained weights" in printed
    load_trained(path, weights="model")
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------- values not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(tiny_config, tmp_path, value):
    config = load_config(tiny_config)
    ema = build_model(config).state_dict()
    ema["blocks.0.mlp.fc1.weight"][3, 4] = value
    path = save_model(tiny_config, tmp_path, ema=ema)
    with pytest.raises(
        UserError, match="has non-finite values in its weights blocks.0.mlp.fc1.weight; give an"
    ):
        load_trained(path)
    load_trained(path, weights="model")


def test_samples_that_overflow_end_the_program(checkpoint, tmp_path, capsys):
    """With status 1 and the sample and the step; nothing black is written."""
    for script, output in ((sample, "--output"), (sample_ddp, "--output-dir")):
        argv = ["--ckpt", str(checkpoint), "--cfg-scale", "1e38", *FEW_STEPS, output, str(tmp_path / "out")]
        with pytest.raises(SystemExit) as caught:
            cli.run(lambda script=script, argv=argv: script.main(argv))
        assert str(caught.value.code).startswith("error: sample 0 is not finite from step ")
        assert "of 2 (t = " in str(caught.value.code)
    assert not list((tmp_path / "out").glob("*.png"))


def test_images_that_overflow_end_the_program(checkpoint, tmp_path, monkeypatch):
    """Finite latents and an autoencoder that makes infinite pixels of the second sample."""
    decode = Autoencoder.decode_pixels

    def overflow(self, latents, bf16=False):
        pixels = decode(self, latents, bf16)
        pixels[1, 0, 3, 3] = float("inf")
        return pixels

    monkeypatch.setattr(Autoencoder, "decode_pixels", overflow)
    for script, output in ((sample, "--output"), (sample_ddp, "--output-dir")):
        argv = ["--ckpt", str(checkpoint), *FEW_STEPS, output, str(tmp_path / "out")]
        if script is sample_ddp:
            argv += ["--num-fid-samples", "4", "--per-proc-batch-size", "2"]
        with pytest.raises(SystemExit) as caught:
            cli.run(lambda script=script, argv=argv: script.main(argv))
        assert str(caught.value.code).startswith(
            "error: sample 1 has finite latents, but its decoded image is"
        )
    assert not list((tmp_path / "out").glob("*.png"))
    with pytest.raises(FloatingPointError, match="sample 1 has finite latents"):
        DCDiTPipeline(load_trained(checkpoint))([0, 1], num_inference_steps=1)


def test_the_picture_of_the_chunking_does_not_fail(checkpoint):
    """It is drawn after the work, also of estimates that no decoder takes."""
    latents = torch.tensor([3e38, float("nan")]).view(2, 1, 1, 1).expand(2, 4, 8, 8)
    assert as_pixels(load_trained(checkpoint).autoencoder, latents).shape == (2, 32, 32, 3)


def test_training_outlives_samples_that_overflow(tiny_config, tmp_path, monkeypatch, capsys):
    def overflow(*arguments):
        raise FloatingPointError("sample 0 is not finite")

    monkeypatch.setattr(sample_grids, "generate_images", overflow)
    changes = ["training.max_steps=2", "logging.sample_every=1"]
    words = [word for change in changes for word in ("--set", change)]
    train.main(["--config", str(tiny_config), "--output", str(tmp_path), *words])
    printed = capsys.readouterr().out
    assert "warning: no sample grid at step 1: sample 0 is not finite" in printed
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 1


# ---------------------------------------------------------------------------------------- classes without a name


@pytest.fixture
def many_classes(tiny_config, tmp_path) -> Path:
    """A model of 12 classes whose features name three."""
    return save_model(tiny_config, tmp_path / "many", "data.num_classes=12")


def test_reports_fall_back_to_the_number(many_classes, tmp_path):
    argv = ["--ckpt", str(many_classes), *FEW_STEPS]
    sample.main([*argv, "--classes", "1", "11", "--output", str(tmp_path / "few")])
    rows = json.loads((tmp_path / "few" / "summary.json").read_text())["kept_by_class"]
    assert [row["name"] for row in rows] == ["b", "11"]
    grid = tmp_path / "grid.png"
    elastic_grid.main([*argv, "--classes", "1", "11", "--fractions", "0", "0.5", "--output", str(grid)])
    assert Image.open(grid).size[0] > 100
    sample_ddp.main(
        [*argv, "--num-fid-samples", "12", "--labels", "balanced", "--output-dir", str(tmp_path / "m")]
    )
    rows = json.loads((tmp_path / "m" / "summary.json").read_text())["kept_by_class"]
    assert [row["name"] for row in rows] == ["a", "b", "c", *map(str, range(3, 12))]


def test_the_picture_of_kept_tokens(checkpoint, many_classes, tmp_path, monkeypatch):
    """A block per model, with the first and the middle step; a list of classes for each."""
    drawn = []
    draw = kept_tokens.draw
    monkeypatch.setattr(kept_tokens, "draw", lambda models, path: (drawn.extend(models), draw(models, path)))
    argv = [str(checkpoint), str(many_classes), "--num-sampling-steps", "3"]
    argv += ["--output", str(tmp_path / "kept.png")]
    kept_tokens.main([*argv, "--classes", "a,c", "--classes", "b,1,11"])
    assert [model.names for model in drawn] == [["a", "c"], ["b", "b", "11"]]
    for model in drawn:
        assert [step.t for step in model.trace.steps[:2]] == [999, 500]
        assert all(len(step.keep) == len(model.images) == len(model.names) for step in model.trace.steps)
    width, height = Image.open(tmp_path / "kept.png").size
    assert height > 1.5 * width

    # The unconditional branch drops 80% of its tokens
    assert checkpoint.name in drawn[0].title and "100 training steps" in drawn[0].title
    lite = SamplingOptions(2.0, num_sampling_steps=3, sampler="ddim", seed=1, uncond=Budget.fraction(0.8))
    images = generate_images(load_trained(checkpoint), [0, 2], lite)
    assert np.array_equal(drawn[0].images, images.permute(0, 2, 3, 1).numpy())
    with pytest.raises(UserError, match="1 lists for 2 models"):
        kept_tokens.main([*argv, "--classes", "a"])


def test_images_are_kept_if_the_report_fails(checkpoint, tmp_path, monkeypatch):
    def fail(*arguments):
        raise IndexError("a fault in the report")

    monkeypatch.setattr(accounting, "class_name", fail)
    monkeypatch.setattr(elastic_grid, "image_tflop", fail)
    argv = ["--ckpt", str(checkpoint), *FEW_STEPS]
    with pytest.raises(IndexError):
        sample.main([*argv, "--output", str(tmp_path)])
    with pytest.raises(IndexError):
        elastic_grid.main([*argv, "--fractions", "0", "0.5", "--output", str(tmp_path / "grid.png")])
    with pytest.raises(IndexError):
        sample_ddp.main([*argv, "--num-fid-samples", "3", "--output-dir", str(tmp_path / "set")])
    assert Image.open(tmp_path / "sample.png").size[0] > 100
    assert Image.open(tmp_path / "grid.png").size[0] == 2 * 32 + 6
    assert np.load(tmp_path / "set.npz")["arr_0"].shape == (3, 32, 32, 3)


def test_training_says_that_classes_have_no_images(tiny_config, tmp_path, capsys):
    argv = ["--config", str(tiny_config), "--output", str(tmp_path), "--set", "training.max_steps=1"]
    train.main([*argv, "--set", "data.num_classes=5"])
    printed = capsys.readouterr().out
    said = "data.num_classes is 5, but the features have images of 3 classes; labels 3 to 4 are never trained; for"
    assert f"warning: {said}" in printed
    assert "classes: 0 'a', 1 'b', 2 'c'\n" in printed


def test_sampling_says_that_labels_had_no_images(capsys):
    config = Config()
    config.data.num_classes = 5
    warn_of_untrained_labels(["a", "b", "c"], config)
    printed = capsys.readouterr().out
    assert printed.startswith(
        "warning: data.num_classes is 5, but the model was trained on features of 3 classes; "
    )
    for names in (None, list("abcde")):
        warn_of_untrained_labels(names, config)
    assert capsys.readouterr().out == ""


def test_labels_between_others_that_have_no_images():
    assert label_ranges([1]) == "1"
    assert label_ranges([1, 3, 4, 5, 999]) == "1, 3 to 5, 999"
    assert label_ranges(list(range(0, 20, 2))) == "0, 2, 4, 6, ..., 18"


def test_fewer_images_than_before_are_said(checkpoint, tmp_path, capsys):
    argv = ["--ckpt", str(checkpoint), *FEW_STEPS, "--output-dir", str(tmp_path / "set")]
    argv += ["--per-proc-batch-size", "2", "--num-fid-samples"]
    sample_ddp.main([*argv, "5"])
    assert "note: " not in capsys.readouterr().out
    sample_ddp.main([*argv, "2"])
    assert f"note: {tmp_path / 'set'} holds 3 more images of an earlier" in capsys.readouterr().out
    assert np.load(tmp_path / "set.npz")["arr_1"].shape == (2,)
    # A comparison of the folder says it again
    (note,) = open_source(tmp_path / "set", "SAMPLES").notes
    assert note.endswith(f"all 5 images are compared; '{tmp_path / 'set'}.npz' has the 2 of the last call")
    (tmp_path / "set" / "summary.json").unlink()
    (note,) = open_source(tmp_path / "set", "SAMPLES").notes
    assert "sampling is unfinished" in note


@pytest.mark.parametrize("name", ["sample.png", "summary.json"])
def test_files_of_other_programs_stay(checkpoint, tmp_path, name):
    (tmp_path / name).write_text('{"rows": []}')
    with pytest.raises(UserError, match=f"{name}': exists and is no .*; give another"):
        sample.main(["--ckpt", str(checkpoint), "--output", str(tmp_path)])
    assert (tmp_path / name).read_text() == '{"rows": []}'


def test_the_images_of_a_finite_model_are_images(checkpoint):
    """The models above do not sample rubbish."""
    images = generate_images(load_trained(checkpoint), [0, 1], SamplingOptions(num_sampling_steps=2))
    assert images.float().std() > 1


# ------------------------------------------------------------------------------------------------ damaged folders


@pytest.fixture
def sample_set(checkpoint, tmp_path) -> Path:
    """A folder of five samples in batches of two."""
    sample_five(checkpoint, tmp_path / "set")
    return tmp_path / "set"


def sample_five(checkpoint: Path, folder: Path) -> None:
    argv = ["--ckpt", str(checkpoint), *FEW_STEPS, "--output-dir", str(folder), "--num-fid-samples", "5"]
    sample_ddp.main([*argv, "--per-proc-batch-size", "2"])


def pictures(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.png"))}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def zero(file: Path) -> None:
    """What a power cut may leave on some file systems."""
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2].ljust(size, b"\0"))


@pytest.mark.parametrize("damage", [cut, empty, zero])
def test_damaged_samples_are_drawn_again(checkpoint, sample_set, capsys, damage):
    before = pictures(sample_set)
    damage(sample_set / "000001.png")
    damage(sample_set / "records" / "000004.npz")
    sample_five(checkpoint, sample_set)
    printed = capsys.readouterr().out
    assert f"{sample_set}: 2 damaged files, such as 000001.png; their batches are drawn again\n" in printed
    assert pictures(sample_set) == before
    sample_five(checkpoint, sample_set)
    assert "damaged files" not in capsys.readouterr().out


def test_a_power_cut_that_emptied_every_file(checkpoint, sample_set):
    before = pictures(sample_set)
    for file in sample_set.rglob("*.*"):
        if file.is_file():
            empty(file)
    sample_five(checkpoint, sample_set)
    assert pictures(sample_set) == before
    assert np.load(sample_set.with_suffix(".npz"))["arr_0"].shape == (5, 32, 32, 3)


@pytest.mark.parametrize(
    "text", ["", '{"seed": 0', "[]", '{"seed": 0}', '{"chosen": {"budget": 1, "uncond": null}}']
)
def test_damaged_settings_of_samples(checkpoint, sample_set, text):
    before = pictures(sample_set)
    (sample_set / "settings.json").write_text(text)
    with pytest.raises(
        UserError, match="set': settings.json is damaged, .* remove the folder and set.npz to draw"
    ):
        sample_five(checkpoint, sample_set)
    assert pictures(sample_set) == before


def test_an_npz_of_other_origin_is_not_overwritten(checkpoint, tmp_path):
    reference = tmp_path / "set.npz"
    reference.write_text("a reference batch")
    with pytest.raises(UserError, match="set.npz would be overwritten; remove it or give another folder"):
        sample_five(checkpoint, tmp_path / "set")
    assert reference.read_text() == "a reference batch"
    assert not (tmp_path / "set").exists()


def test_a_larger_set_draws_its_last_batch_again_without_a_complaint(checkpoint, sample_set, capsys):
    capsys.readouterr()
    argv = ["--ckpt", str(checkpoint), *FEW_STEPS, "--output-dir", str(sample_set), "--num-fid-samples", "6"]
    sample_ddp.main([*argv, "--per-proc-batch-size", "2"])
    assert "damaged files" not in capsys.readouterr().out
    assert json.loads((sample_set / "summary.json").read_text())["images"] == 6
