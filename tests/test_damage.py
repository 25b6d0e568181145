"""Damaged checkpoints, features and images: found, named, and never the end of a run."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import kills
import numpy as np
import pytest
import torch

import extract_features
import train
from config import UserError, load_config
from data.features import damaged_files, open_features
from data.images import ImageFolder
from sampling.load import load_known_autoencoder
from training import resume, sample_grids, tracking
from weights import checkpoint
from weights.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_cpu_thread")


def flip_bit(file: Path, position: int) -> None:
    with open(file, "r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 16]))


# ---------------------------------------------------------------------------------------- damaged checkpoints


def test_no_flipped_bit_is_ever_loaded(tmp_path):
    state = kills.EMPTY | {"step": 1, "config": {"a": [1, "x"]}, "model": {"w": torch.randn(2000)}}
    path = save_checkpoint(tmp_path, state, keep=0)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        # Half of the bits are in the archive's index, at the end
        in_index = random.random() >= 0.5
        position = len(whole) - 1 - random.integers(1500) if in_index else random.integers(len(whole))
        path.write_bytes(whole)
        flip_bit(path, int(position))
        try:
            loaded = load_checkpoint(path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:  # a bit that says nothing: padding, a time stamp
            kills.assert_equal({key: loaded[key] for key in state}, state, "state")
    assert refused > 200
    for length in random.integers(len(whole), size=50):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is not a readable checkpoint"):
            load_checkpoint(path)


@pytest.mark.parametrize("kind", ["flipped", "truncated", "foreign", "of another run"])
def test_resume_falls_back_to_the_checkpoint_before(run, whole_run, tmp_path, kind):
    shutil.copytree(whole_run, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "0000008.pt"
    if kind == "flipped":
        flip_bit(newest, newest.stat().st_size // 2)
    elif kind == "truncated":
        os.truncate(newest, newest.stat().st_size - 100)
    elif kind == "foreign":
        torch.save({"epoch": 3, "weights": torch.zeros(3)}, newest)
    else:
        state = load_checkpoint(newest)
        state["config"]["training"]["seed"] = 5
        save_checkpoint(tmp_path / "other", state, keep=0)
        shutil.copy(tmp_path / "other" / newest.name, newest)
    codes, printed = run("run")
    assert codes == [0]
    assert f"warning: --output '{newest}'" in printed
    assert "resuming from step 6" in printed
    assert "warning: " in (tmp_path / "run" / "log.txt").read_text()
    kills.assert_same_training(whole_run, tmp_path / "run")


def test_a_checkpoint_older_than_a_key_is_of_the_same_run(whole_run, tiny_config, tmp_path):
    config = load_config(tiny_config)
    state = load_checkpoint(whole_run / "checkpoints" / "0000008.pt")
    del state["config"]["training"]["max_grad_norm"]
    save_checkpoint(tmp_path / "checkpoints", state, keep=0)
    start = resume.find_start(config, kills.typed(tmp_path), open_features(config.data.feature_path, 32))
    assert start.state["step"] == 8 and start.warnings == []


def test_pruning_keeps_the_last_readable_checkpoint(tmp_path, monkeypatch):
    state = kills.EMPTY
    save_checkpoint(tmp_path, {**state, "step": 1}, keep=1)

    def write_rubbish(state, stream):
        stream.write(b"what a broken disk returns")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.torch, "save", write_rubbish)
        save_checkpoint(tmp_path, {**state, "step": 2}, keep=1)
        save_checkpoint(tmp_path, {**state, "step": 3}, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["0000001.pt", "0000002.pt", "0000003.pt"]
    assert load_checkpoint(tmp_path / "0000001.pt")["step"] == 1
    save_checkpoint(tmp_path, {**state, "step": 4}, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["0000004.pt"]


def test_what_a_kill_left_of_a_checkpoint_is_removed(tmp_path):
    (tmp_path / "0000001.pt.tmp").write_bytes(b"half")
    save_checkpoint(tmp_path, {**kills.EMPTY, "step": 2}, keep=0)
    assert os.listdir(tmp_path) == ["0000002.pt"]


# ---------------------------------------------------------------------------------- other files of a run


DAMAGED_CONFIGS = {
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "cut between two lines": lambda content: content[: content.index(b"logging:")],
    "cut within a list": lambda content: content[: content.index(b"- 32") + 1],
    "a byte that is not UTF-8": lambda content: content.replace(b"tiny", b"t\xffny"),
    "a list": lambda content: b"- 1\n",
}


@pytest.mark.parametrize("kind", DAMAGED_CONFIGS)
def test_a_damaged_configuration_is_named_and_can_be_removed(whole_run, tiny_config, tmp_path, kind, capsys):
    """Not taken for a run with other values. The checkpoints hold the configuration, too."""
    folder = shutil.copytree(whole_run, tmp_path / "a run")
    file = folder / "config.yaml"
    file.write_bytes(DAMAGED_CONFIGS[kind](file.read_bytes()))
    before = file.read_bytes()
    again = ["--config", str(tiny_config), "--output", str(folder)]
    for words in (again, ["--resume", str(folder)]):
        with pytest.raises(UserError) as caught:
            train.main(words)
        message = str(caught.value)
        assert f"{words[-2]} '{folder}': '{file}' cannot be used (" in message and "\n" not in message
        assert (
            "; remove it and run the same command again: checkpoints hold the configuration, too" in message
        )
        assert file.read_bytes() == before
    for words in (again, ["--resume", str(folder)]):
        file.unlink()
        train.main(words)
        assert "already finished at step 8 of 8" in capsys.readouterr().out
        assert file.read_text() == (whole_run / "config.yaml").read_text()


def test_damaged_rows_of_metrics_are_removed(run, whole_run, tmp_path):
    """The run resumes with all rows that can be read, and writes later ones again."""
    folder = shutil.copytree(whole_run, tmp_path / "run")
    (folder / "checkpoints" / "0000008.pt").unlink()
    rows = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert len(rows) == 2
    bad = b'\xff{"step": 1}\n', b"[" * 10**5 + b"\n", b'{"loss": 1}\n', b"[1]\n", bytes(20) + b"\n"
    (folder / "metrics.jsonl").write_bytes(b"".join([*bad, rows[0], *bad, rows[1][:20]]))
    (folder / "evaluation.jsonl").write_bytes(b"\x80\n")
    codes, printed = run("run")
    assert codes == [0]
    assert f"warning: {folder / 'metrics.jsonl'}: lines that cannot be read are removed (10)" in printed
    (folder / "evaluation.jsonl").unlink()
    kills.assert_same_training(whole_run, folder)


def test_a_row_that_lacks_only_its_line_break_is_kept(tmp_path):
    (tmp_path / "rows").write_text('{"step": 1}\n{"step": 5}\n{"step": 2}')
    assert tracking.remove_later_rows(tmp_path / "rows", 4) == 0
    assert (tmp_path / "rows").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    "content, known", [(b"ab12-x\n", True), (b"", False), (b"\xff", False), (bytes(8), False)]
)
def test_a_damaged_wandb_id_is_replaced(tmp_path, content, known):
    (tmp_path / "wandb_id.txt").write_bytes(content)
    identity = tracking.wandb_id(tmp_path, same_wandb=True)
    assert (identity == "ab12-x") is known and identity.isprintable() and identity


# ---------------------------------------------------------------------------------------- features and images


def test_verify_finds_a_flipped_bit(tiny_config, tmp_path):
    store = shutil.copytree(load_config(tiny_config).data.feature_path, tmp_path / "store")
    assert damaged_files(store) == []
    flip_bit(store / "shard-00000.npy", 500)
    assert damaged_files(store) == ["shard-00000.npy: differs from its checksum"]


def test_an_autoencoder_that_has_moved(tiny_config, tiny_vae, tmp_path):
    """Features name a folder that is no longer there: data.vae may, where it is the same one."""
    config = load_config(tiny_config, ["logging.sample_every=1"])
    known = open_features(config.data.feature_path, 32).autoencoder
    moved = SimpleNamespace(autoencoder={**known, "name": "/nowhere"})
    assert sample_grids.load_decoder(config, moved, "cpu").sha256 == known["sha256"]
    other = SimpleNamespace(autoencoder={**known, "name": "/nowhere", "sha256": "0"})
    with pytest.raises(
        UserError, match="^data.vae: .* is another autoencoder than the features were made with"
    ):
        sample_grids.load_decoder(config, other, "cpu")
    config.data.vae = "/neither"
    with pytest.raises(UserError, match="^data.vae: /neither: .*neither ema, mse"):
        sample_grids.load_decoder(config, moved, "cpu")


def test_sampling_finds_an_autoencoder_that_has_moved_as_training_does(tiny_config, tiny_vae):
    """The checkpoint names a folder that is no longer there: a copy in data.vae will do, another one will not."""
    config = load_config(tiny_config)
    known = open_features(config.data.feature_path, 32).autoencoder
    moved = {**known, "name": "/nowhere"}
    assert load_known_autoencoder(moved, config, "cpu").sha256 == known["sha256"]
    with pytest.raises(UserError, match="^--vae /nowhere: .* give its new place as --vae"):
        load_known_autoencoder({**moved, "sha256": "0"}, config, "cpu")


def test_a_folder_as_real_ones_are(tiny_images, tiny_vae, tmp_path, capsys):
    """What cannot be read is listed and left out; everything else is extracted under its own label."""
    from PIL import Image

    images = shutil.copytree(tiny_images, tmp_path / "images")
    picture = Image.open(images / "a" / "0.png")
    (images / "b b ü").mkdir()
    (images / "empty").mkdir()
    (images / "a" / "folder.png").mkdir()
    picture.save(images / "b b ü" / "Grün 1.jpg")
    picture.convert("CMYK").save(images / "a" / "cmyk.jpg")
    picture.convert("P").save(images / "a" / "palette.png", transparency=0)
    Image.new("RGB", (1, 1)).save(images / "a" / "tiny.png")
    Image.fromarray(np.full((40, 40), 0x8080, np.uint16)).save(images / "a" / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(images / "a" / "turned.jpg", exif=exif)
    jpeg = (images / "a" / "turned.jpg").read_bytes()
    bad = {
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "empty.png": b"",
        "text.png": b"hello",
        "bomb.png": b"P5 20000 20000 255\n" + bytes(99),
    }
    for name, content in bad.items():
        (images / "c" / name).write_bytes(content)
    (images / "c" / "dangling.png").symlink_to("nowhere")
    argv = [
        "--data-path",
        images,
        "--vae",
        tiny_vae,
        "--image-size",
        16,
        "--features-path",
        tmp_path / "store",
    ]
    extract_features.main([str(part) for part in [*argv, "--num-workers", 0, "--max-bad", 5]])
    store, folder = open_features(tmp_path / "store", 16), ImageFolder(images, 16)
    assert store.class_names == ["a", "b", "b b ü", "c", "empty"] and len(store) == 16
    left_out = {path for _, path, _ in store.manifest["unreadable"]}
    assert left_out == {f"c/{name}" for name in [*bad, "dangling.png"]}
    assert store.labels.tolist() == [
        label for path, label in zip(folder.paths, folder.labels) if path not in left_out
    ]
    assert capsys.readouterr().err.count("unreadable: ") == 5
