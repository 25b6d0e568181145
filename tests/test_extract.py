"""extract_features.py as users run it: one process or torchrun, killed, bad images, wrong commands."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cli
import extract_features
from config import config_from_dict
from data import autoencoder as autoencoder_module
from data.autoencoder import Autoencoder
from data.feature_writer import FeatureWriter
from data.features import open_features
from data.images import ImageFolder
from data.streams import rng
from sampling.load import warn_of_unguided_channels

ROOT = Path(__file__).parent.parent


def arguments(images: Path, vae: Path, store: Path, /, **changes) -> list[str]:
    """The command line of a small extraction; a value of True gives an option without a value."""
    options = {"data_path": images, "features_path": store, "vae": vae}
    options |= {"image_size": 16, "shard_size": 2, "num_workers": 0, "global_batch_size": 24}
    words = []
    for name, value in (options | changes).items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return words


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def launch(command: list[str], processes: int | None = None) -> subprocess.CompletedProcess:
    """Run Python with these arguments, under torchrun if a number of processes is given."""
    python = [sys.executable]
    if processes:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*python, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole(tiny_images, tiny_vae, tmp_path_factory) -> Path:
    """A store made by one process without interruption."""
    store = tmp_path_factory.mktemp("store") / "whole"
    extract_features.main(arguments(tiny_images, tiny_vae, store, num_workers=1))
    return store


def test_store_holds_the_moments_of_diffusers(tiny_images, tiny_vae, whole):
    from diffusers import AutoencoderKL

    store, images = open_features(whole, 16), ImageFolder(tiny_images, 16)
    assert len(store) == 10
    assert store.labels.tolist() == images.labels
    assert store.latent_shape == (4, 4, 4)
    # Posteriors of the images and of their mirror images, by diffusers itself
    model = AutoencoderKL.from_pretrained(tiny_vae).eval()
    crops = np.stack([images[index][0] for index in range(10)])
    pixels = torch.from_numpy(crops).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posteriors = [model.encode(view).latent_dist for view in (pixels, pixels.flip(3))]

    for index in range(10):
        generator = rng(0, "latent", index)
        posterior = posteriors[int(generator.integers(2))]
        noise = generator.standard_normal((4, 4, 4), dtype=np.float32)
        raw = posterior.mean[index].numpy() + posterior.std[index].numpy() * noise
        expected = raw * model.config.scaling_factor
        latent = store.latent(index, rng(0, "latent", index))
        assert np.allclose(latent, expected, atol=2e-3, rtol=2e-3)  # stored as float16


def test_autoencoder_inverts_its_scale(tiny_vae):
    autoencoder = Autoencoder.load(str(tiny_vae), "cpu")
    latents = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pixels = autoencoder.codec.model.decode(
            latents / autoencoder.codec.model.config.scaling_factor
        ).sample
    images = autoencoder.decode(latents)
    assert autoencoder.stride == 4
    assert autoencoder.channels == 4
    assert images.shape == (2, 3, 20, 20)
    assert images.dtype == torch.uint8
    levels = (pixels * 127.5 + 127.5).clamp(0, 255)
    assert (levels - images.float()).abs().max() < 0.502  # rounding, half a level
    assert Autoencoder.load(autoencoder.describe()["name"], "cpu").describe() == autoencoder.describe()


def test_the_published_autoencoders_by_their_full_name(tiny_vae, tmp_path, monkeypatch):
    """As diffusers spells them; a folder of this name comes first."""
    read = []
    tiny_codec = autoencoder_module.read_codec(str(tiny_vae))

    def read_codec(source):
        read.append(source)
        return tiny_codec

    monkeypatch.setattr(autoencoder_module, "read_codec", read_codec)
    monkeypatch.chdir(tmp_path)
    name = "stabilityai/sd-vae-ft-mse"
    assert Autoencoder.load(name, "cpu").name == "mse"
    assert Autoencoder.load("mse", "cpu").name == "mse"
    shutil.copytree(tiny_vae, name)
    assert Autoencoder.load(name, "cpu").name == str(tmp_path / name)
    assert read == [name, name, name]


def test_per_channel_latent_statistics(tiny_vae):
    from diffusers import AutoencoderKL

    from data.codecs import shift_and_scale

    model = AutoencoderKL.from_pretrained(tiny_vae)
    model.register_to_config(
        latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0, 4.0, 8.0, 16.0], scaling_factor=0.5
    )
    assert shift_and_scale(model.config, 4) == ([1, 2, 3, 4], [0.25, 0.125, 0.0625, 0.03125])
    model.register_to_config(latents_mean=None, latents_std=None, shift_factor=0.25)
    assert shift_and_scale(model.config, 4) == ([0.25] * 4, [0.5] * 4)


def test_a_variant_of_sixteen_channels(tmp_path):
    """A folder with files of half precision only; shift and scale of newer autoencoders."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(4,),
        norm_num_groups=2,
        latent_channels=16,
        shift_factor=0.0609,
        scaling_factor=0.3611,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    model.half().save_pretrained(tmp_path / "vae", variant="fp16")
    for folder in (tmp_path / "vae", tmp_path):  # the latter as a pipeline's folder
        autoencoder = Autoencoder.load(str(folder), "cpu")
        assert autoencoder.channels == 16
        assert autoencoder.shift == [0.0609] * 16
        assert autoencoder.scale == [0.3611] * 16
        assert autoencoder.name == str(tmp_path / "vae")
        assert autoencoder.codec.model.dtype == torch.float32


def test_an_image_replaced_under_its_name_is_encoded_again(tiny_images, tiny_vae, tmp_path, capsys):
    images = shutil.copytree(tiny_images, tmp_path / "images")
    options = arguments(images, tiny_vae, tmp_path / "store")
    extract_features.main(options)
    shutil.copy(images / "b" / "1.png", images / "a" / "0.png")
    extract_features.main([*options, "--dry-run"])
    said = "0 new, 1 replaced and 0 missing images since the last extraction, such as 'a/0.png'"
    assert said in capsys.readouterr().out
    extract_features.main(options)
    printed = capsys.readouterr().out
    assert said in printed
    assert "2 of 10 images to encode" in printed
    extract_features.main(options)
    assert "already complete" in capsys.readouterr().out


def test_an_image_added_before_the_extraction_was_finished(
    tiny_images, tiny_vae, tmp_path, capsys, monkeypatch
):
    images = shutil.copytree(tiny_images, tmp_path / "images")
    write = FeatureWriter.write

    def stop_at_the_last(writer, shard, *rest):
        if shard == 4:
            raise KeyboardInterrupt
        write(writer, shard, *rest)

    options = arguments(images, tiny_vae, tmp_path / "store")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FeatureWriter, "write", stop_at_the_last)
        extract_features.main(options)
    shutil.copy(images / "a" / "0.png", images / "b" / "8.png")
    capsys.readouterr()
    extract_features.main(options)
    printed = capsys.readouterr().out
    assert "images were added or removed since the extraction began; what is encoded of unchanged" in printed
    assert "5 of 11 images to encode" in printed
    extract_features.main([*options[:3], str(tmp_path / "new"), *options[4:]])
    assert content(tmp_path / "store") == content(tmp_path / "new")

    # And after it was finished
    shutil.copy(images / "a" / "0.png", images / "b" / "9.png")
    capsys.readouterr()
    extract_features.main(options)
    said = (
        "4 of 12 images to encode; 3 of them are unchanged, but have moved or share a shard of 2 with others"
    )
    assert said in capsys.readouterr().out


def test_two_processes_make_the_same_store(tiny_images, tiny_vae, whole, tmp_path):
    result = launch(["extract_features.py", *arguments(tiny_images, tiny_vae, tmp_path / "two")], processes=2)
    assert result.returncode == 0, result.stderr
    assert content(tmp_path / "two") == content(whole)


KILLED = """
import os, signal, sys
import extract_features
from config import config_from_dict
from data.feature_writer import FeatureWriter
write = FeatureWriter.write
def killed(writer, shard, *rest):
    if shard == 2:
        open(writer._shard_path(shard), "wb").write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(writer, shard, *rest)
FeatureWriter.write = killed
extract_features.main(sys.argv[1:])
"""


def test_three_processes_complete_what_a_killed_one_began(tiny_images, tiny_vae, whole, tmp_path):
    options = arguments(tiny_images, tiny_vae, tmp_path / "three")
    assert launch(["-c", KILLED, *options]).returncode == -9
    assert "shard-00001.json" in content(tmp_path / "three")
    assert "manifest.json" not in content(tmp_path / "three")
    result = launch(["extract_features.py", *options], processes=3)
    assert result.returncode == 0, result.stderr
    assert content(tmp_path / "three") == content(whole)


def test_a_complete_store_is_left_alone(tiny_images, tiny_vae, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    extract_features.main(arguments(tiny_images, tiny_vae, whole))
    assert "already complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in whole.iterdir()}


def test_unreadable_images_are_listed_and_counted(tiny_images, tiny_vae, tmp_path, capsys):
    images = shutil.copytree(tiny_images, tmp_path / "images")
    (images / "b" / "4.png").write_text("not an image")
    (images / "c" / "late r ü.png").symlink_to("nowhere")
    options = arguments(images, tiny_vae, tmp_path / "store")
    with pytest.raises(SystemExit) as caught:
        extract_features.main(options)
    assert "--max-bad 0" in caught.value.code
    assert "unreadable: 'b/4.png'" in capsys.readouterr().err
    store = open_features(tmp_path / "store", 16)
    assert len(store) == 9
    assert len(store.manifest["unreadable"]) == 2
    extract_features.main([*options, "--max-bad", "2"])
    assert capsys.readouterr().err.count("unreadable: ") == 2


def test_an_empty_store_is_no_success(tiny_vae, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_text("not an image")
    argv = arguments(tmp_path / "images", tiny_vae, tmp_path / "store", max_bad=5)
    for _ in range(2):
        with pytest.raises(SystemExit) as caught:
            extract_features.main(argv)
        assert caught.value.code == "error: --data-path: none of the 1 images can be read; the store is empty"


def test_a_folder_of_samples_is_one_class(tiny_images, tiny_vae, tmp_path, capsys):
    """Its records and settings are no classes."""
    images = tmp_path / "samples"
    (images / "records").mkdir(parents=True)
    for name in ("settings.json", "summary.json", "records/000000.npz"):
        (images / name).write_text("{}")
    for index, file in enumerate(sorted(tiny_images.rglob("*.png"))):
        shutil.copy(file, images / f"{index:06d}.png")
    extract_features.main(arguments(images, tiny_vae, tmp_path / "store"))
    printed = capsys.readouterr().out
    assert f"--data-path {images}: no class folders, so its 10 images are one class\n" in printed
    assert "left out: 2 .json, 1 .npz" in printed
    assert open_features(tmp_path / "store", 16).class_names == ["samples"]


def test_frozen_samples(tiny_images, tiny_vae, tmp_path):
    extract_features.main(arguments(tiny_images, tiny_vae, tmp_path, store="sample"))
    store = open_features(tmp_path, 16)
    latent = store.latent(3, None)
    assert len(store) == 10
    assert latent.shape == (4, 4, 4)
    assert latent.dtype == np.float32
    assert store.labels.max() == 2


def test_options_of_the_official_script_have_no_effect(tiny_images, tiny_vae, tmp_path, capsys):
    official = {"model": "DC-DiT-B", "num_classes": 1000, "epochs": 1400, "results_dir": "results"}
    argv = arguments(tiny_images, tiny_vae, tmp_path / "store", dry_run=True, **official)
    extract_features.main([*argv, "--log-every", "100", "--ckpt-every", "50000"])
    printed = capsys.readouterr().out
    named = "--results-dir, --model, --num-classes, --epochs, --log-every, --ckpt-every"
    assert f"{named}: extraction does not use this" in printed
    assert "10 x (2, 8, 4, 4) float16, 0.00 GB, 3 classes" in printed


def test_dry_run_writes_nothing(tiny_images, tiny_vae, tmp_path, capsys):
    extract_features.main(arguments(tiny_images, tiny_vae, tmp_path / "store", dry_run=True))
    assert "10 x (2, 8, 4, 4) float16" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"image_size": 18}, "image size 18"),
        ({"image_size": 0}, "--image-size 0"),
        ({"data_path": "nowhere"}, "--data-path nowhere"),
        ({"vae": "nothing"}, "--vae nothing"),
        ({"features_path": "{file}/x"}, "--features-path"),
        ({"features_path": "data"}, "--features-path data: holds"),
        (
            {"features_path": "data/new", "data_path": "data"},
            "--features-path data/new: lies in --data-path data",
        ),
        ({"global_batch_size": 0}, "--global-batch-size 0"),
        ({"store": "official"}, "--store: training reads the official layout, but it is not written"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    tiny_images, tiny_vae, tmp_path, monkeypatch, capsys, changes, part
):
    monkeypatch.chdir(ROOT)
    (tmp_path / "file").write_text("x")
    changes = {name: str(value).format(file=tmp_path / "file") for name, value in changes.items()}
    argv = arguments(tiny_images, tiny_vae, tmp_path / "store", **changes)
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: extract_features.main(argv))
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert part in lines[0]
    assert not (tmp_path / "store").exists()


def test_guidance_of_some_of_many_channels_is_one_warning(capsys):
    for channels in ("3", "all"):
        overrides = ["data.latent_channels=16", f"diffusion.cfg_channels={channels}"]
        warn_of_unguided_channels(config_from_dict({}, overrides))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: diffusion.cfg_channels 3: guidance changes 3 of the 16 latent channels")
