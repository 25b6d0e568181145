"""Feature stores: content, kills at every write, damage, the official layout. A stand-in encodes quickly."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config import OneProcessError, UserError
from data.feature_writer import FeatureWriter, StoreOptions, StoreSettings, encode_images
from data.features import damaged_files, open_features
from data.features import main as verify
from data.images import ImageFolder, SkippedImage
from data.source_files import read_state
from data.store_files import sha256_of
from data.streams import rng

SIZE = 8


class StandIn:
    """An "autoencoder" of stride 4 and 2 channels whose mean is a pixel and whose deviation is constant."""

    name = "stand-in"

    def latent_shape(self, image):
        return (2, *image.coarsen(4))

    def describe(self):
        described = {"name": self.name, "stride": 4, "channels": 2, "sha256": "0"}
        return described | {"shift": [0.0] * 2, "scale": [1.0] * 2}

    def encode(self, images):
        mean = images[:, :2, ::4, ::4].float() / 256
        return mean, torch.full_like(mean, 0.25)


def make_writer(folder: Path, tiny_images: Path, **changes) -> FeatureWriter:
    images = ImageFolder(tiny_images, SIZE)
    options = StoreOptions(**{"dtype": "float32", "shard_size": 4, "seed": 3} | changes)
    return FeatureWriter(folder, StoreSettings.plan(options, images, StandIn()), images.listing)


def pixels_of(tiny_images: Path, indices) -> torch.Tensor:
    images = ImageFolder(tiny_images, SIZE)
    return torch.from_numpy(np.stack([images[index][0] for index in indices])).permute(0, 3, 1, 2)


def fill(writer: FeatureWriter, tiny_images: Path, bad: tuple[int, ...] = ()) -> None:
    """What the script does, in one process."""
    shards = writer.prepare(writer.find_changes())
    if shards is not None:
        write_shards(writer, shards, tiny_images, bad)
        writer.finish()


def write_shards(
    writer: FeatureWriter, shards: list[int], tiny_images: Path, bad: tuple[int, ...] = ()
) -> None:
    for shard in shards:
        good = [index for index in writer.sources(shard) if index not in bad]
        skipped = [
            SkippedImage(index, f"{index}.png", "why") for index in writer.sources(shard) if index in bad
        ]
        features = np.empty((0, *writer.settings.item_shape), writer.settings.dtype)
        if good:
            features = encode_images(StandIn(), pixels_of(tiny_images, good), good, writer.settings)
        states = [read_state(tiny_images / writer.source.paths[index]) for index in writer.sources(shard)]
        writer.write(shard, features, skipped, states)


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_moments_are_those_of_the_image_and_its_mirror_image(tiny_images, tmp_path):
    fill(make_writer(tmp_path, tiny_images), tiny_images)
    store = open_features(tmp_path, SIZE)
    images = ImageFolder(tiny_images, SIZE)
    assert len(store) == 10
    assert store.latent_shape == (2, 2, 2)
    assert store.class_names == ["a", "b", "c"]
    assert store.labels.tolist() == images.labels
    assert store.labels.dtype == np.int64
    assert store.autoencoder == StandIn().describe()
    seen = set()
    for draw in range(8):
        latent = store.latent(7, rng(0, "latent", draw))
        generator = rng(0, "latent", draw)
        view = int(generator.integers(2))
        image = pixels_of(tiny_images, [7])
        mean = StandIn().encode(image.flip(3) if view else image)[0][0].numpy()
        noise = generator.standard_normal((2, 2, 2), dtype=np.float32)
        assert latent.dtype == np.float32
        assert np.array_equal(latent, mean + np.float32(0.25) * noise)
        seen.add(view)
    assert seen == {0, 1}


def test_without_flips_there_is_one_view(tiny_images, tmp_path):
    fill(make_writer(tmp_path, tiny_images, flip=False, dtype="float16"), tiny_images)
    shard = np.load(tmp_path / "shard-00001.npy", mmap_mode="r")
    assert shard.shape == (4, 1, 4, 2, 2)
    assert shard.dtype == np.float16


def test_latents_that_overflow_are_named_by_image(tiny_images, tmp_path):
    """By the process that has them: the others know nothing of it."""
    writer = make_writer(tmp_path, tiny_images, dtype="float16")

    class Overflowing(StandIn):
        def encode(self, images):
            mean, std = super().encode(images)
            mean[1] = 1e6
            return mean, std

    with pytest.raises(OneProcessError, match="non-finite float16 latents of image 6; try --dtype float32"):
        encode_images(Overflowing(), pixels_of(tiny_images, [4, 6, 7]), [4, 6, 7], writer.settings)


def test_samples_are_frozen_functions_of_seed_and_index(tiny_images, tmp_path):
    for name, seed, shard_size in (("a", 3, 4), ("b", 3, 100), ("c", 4, 4)):
        writer = make_writer(tmp_path / name, tiny_images, kind="sample", seed=seed, shard_size=shard_size)
        fill(writer, tiny_images)
    latents = {}
    for name in "abc":
        store = open_features(tmp_path / name, SIZE)
        latents[name] = np.stack([store.latent(index, None) for index in range(10)])
    assert np.array_equal(latents["a"], latents["b"])
    assert not np.array_equal(latents["a"], latents["c"])

    # Each latent is near the mean of the image or of its mirror image, as the stream of random numbers says
    images = pixels_of(tiny_images, range(10))
    noise = latents["a"] - StandIn().encode(images)[0].numpy()
    mirrored_noise = latents["a"] - StandIn().encode(images.flip(3))[0].numpy()
    flips = np.array([rng(3, "features", index).random() < 0.5 for index in range(10)])
    assert 0 < flips.sum() < 10
    noise[flips] = mirrored_noise[flips]
    assert np.abs(noise).max() < 0.25 * 4.5


def test_after_a_kill_at_any_write_the_same_steps_complete_the_store(tiny_images, tmp_path, monkeypatch):
    fill(make_writer(tmp_path / "whole", tiny_images), tiny_images, bad=(5,))
    wanted = content(tmp_path / "whole")

    class Killed(BaseException):
        pass

    def killed_at(countdown: list[int], function):
        def call(*args, **kwargs):
            countdown[0] -= 1
            if countdown[0] == 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    # Kill at the first write, then at the second, ... until an extraction survives
    attempts = 0
    survived = False
    while not survived:
        attempts += 1
        folder = tmp_path / f"killed-{attempts}"
        with monkeypatch.context() as patch:
            countdown = [attempts]
            patch.setattr(os, "replace", killed_at(countdown, os.replace))
            patch.setattr(os, "fsync", killed_at(countdown, os.fsync))
            patch.setattr(Path, "unlink", killed_at(countdown, Path.unlink))
            patch.setattr(Path, "mkdir", killed_at(countdown, Path.mkdir))
            try:
                fill(make_writer(folder, tiny_images), tiny_images, bad=(5,))
                survived = True
            except Killed:
                pass

        # The same steps complete the store
        fill(make_writer(folder, tiny_images), tiny_images, bad=(5,))
        assert content(folder) == wanted
    assert attempts > 25


@pytest.mark.parametrize("name", ["labels.npy", "shard-00001.npy"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_complete_store_is_repaired(tiny_images, tmp_path, name, damage):
    fill(make_writer(tmp_path, tiny_images), tiny_images, bad=(1, 9))
    wanted = content(tmp_path)
    file = tmp_path / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] if damage == "cut" else b"")
    with pytest.raises(UserError, match=file.name):
        open_features(tmp_path, SIZE)
    fill(make_writer(tmp_path, tiny_images), tiny_images, bad=(1, 9))
    assert content(tmp_path) == wanted


@pytest.mark.parametrize(
    "text", ["", '{"first": 4', "[]", "{}", '{"first": 4, "stop": 8, "count": 4, "names": 3}']
)
def test_a_damaged_record_is_written_again_with_its_shard(tiny_images, tmp_path, text):
    fill(make_writer(tmp_path / "whole", tiny_images), tiny_images)
    writer = make_writer(tmp_path / "store", tiny_images)
    writer.prepare()
    write_shards(writer, [0, 1], tiny_images)
    (tmp_path / "store" / "shard-00001.json").write_text(text)
    writer = make_writer(tmp_path / "store", tiny_images)
    assert writer.prepare(writer.find_changes()) == [1, 2]
    fill(make_writer(tmp_path / "store", tiny_images), tiny_images)
    assert content(tmp_path / "store") == content(tmp_path / "whole")


@pytest.mark.parametrize("name", ["manifest.json", "settings.json", "sources.npz"])
@pytest.mark.parametrize("keep", [0, 30])
def test_a_damaged_list_names_a_way_that_works(tiny_images, tmp_path, name, keep):
    folder = tmp_path / "store"
    if name == "settings.json":
        make_writer(folder, tiny_images).prepare()
    else:
        fill(make_writer(folder, tiny_images), tiny_images)
    (folder / name).write_bytes((folder / name).read_bytes()[:keep])
    with pytest.raises(UserError, match=f"{name}.* remove (its|the) folder .*(extract|encode)"):
        fill(make_writer(folder, tiny_images), tiny_images)
    shutil.rmtree(folder)
    fill(make_writer(folder, tiny_images), tiny_images)
    assert damaged_files(folder) == []


# ---------------------------------------------------------------------------- images that change after extraction


@pytest.fixture
def own_images(tiny_images, tmp_path) -> Path:
    """A copy of the tiny images, with their times: a/0 a/3 a/6 a/9, b/1 b/4 b/7, c/2 c/5 c/8."""
    return shutil.copytree(tiny_images, tmp_path / "images")


def replace_image(file: Path) -> None:
    """Other pixels under the same name."""
    pixels = np.random.default_rng(file.stat().st_ino).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def shard_times(folder: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted(folder.glob("shard-*.npy"))]


def check_same_as_new(store: Path, images: Path, tmp_path: Path) -> None:
    """A store that followed changes holds what a new extraction gives."""
    new = tmp_path / f"new-{store.name}"
    fill(make_writer(new, images), images)
    assert content(store) == content(new)


def test_a_replaced_image_is_encoded_again_with_its_shard(own_images, tmp_path):
    store = tmp_path / "store"
    fill(make_writer(store, own_images), own_images)
    before = shard_times(store)
    replace_image(own_images / "b" / "4.png")  # number 5, in the second of three shards
    changes = make_writer(store, own_images).find_changes()
    assert str(changes).startswith("0 new, 1 replaced and 0 missing images")
    assert "'b/4.png'" in str(changes)
    assert make_writer(store, own_images).prepare(changes) == [1]
    fill(make_writer(store, own_images), own_images)
    check_same_as_new(store, own_images, tmp_path)
    after = shard_times(store)
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1] != before[1]


def test_a_copy_of_the_images_is_recognised_by_content(own_images, tmp_path):
    store = tmp_path / "store"
    fill(make_writer(store, own_images), own_images)
    wanted = content(store)
    for file in own_images.rglob("*.png"):
        os.utime(file, ns=(1, 1))
    writer = make_writer(store, own_images)
    assert writer.prepare(writer.find_changes()) is None
    assert content(store) == wanted


def test_added_and_removed_images(own_images, tmp_path):
    store = tmp_path / "store"
    fill(make_writer(store, own_images), own_images)
    # At the end: what comes before stays
    shutil.copy(own_images / "a" / "0.png", own_images / "c" / "99.png")
    (own_images / "d").mkdir()
    for name in ("1", "2", "3"):
        shutil.copy(own_images / "a" / "0.png", own_images / "d" / f"{name}.png")
    writer = make_writer(store, own_images)
    assert writer.prepare(writer.find_changes()) == [2, 3]
    fill(make_writer(store, own_images), own_images)
    check_same_as_new(store, own_images, tmp_path)
    assert open_features(store, SIZE).class_names == ["a", "b", "c", "d"]

    # A new first class shifts all labels, and one image all positions
    shutil.copytree(own_images / "d", own_images / "Z")
    shutil.rmtree(own_images / "d")
    fill(make_writer(store, own_images), own_images)
    shutil.rmtree(tmp_path / "new-store")
    check_same_as_new(store, own_images, tmp_path)

    # Fewer shards than before
    shutil.rmtree(own_images / "Z")
    (own_images / "c" / "99.png").unlink()
    fill(make_writer(store, own_images), own_images)
    shutil.rmtree(tmp_path / "new-store")
    check_same_as_new(store, own_images, tmp_path)


@pytest.mark.parametrize("change", ["replaced", "other names"])
def test_a_store_of_other_images_is_not_overwritten(own_images, tmp_path, change):
    store = tmp_path / "store"
    fill(make_writer(store, own_images), own_images)
    wanted = content(store)
    for file in own_images.rglob("*.png"):
        if change == "replaced":
            replace_image(file)
        else:
            file.rename(file.with_name(f"x{file.name}"))
    with pytest.raises(UserError, match="10 of its 10 images are gone or replaced, such as 'a/0.png'"):
        fill(make_writer(store, own_images), own_images)
    assert content(store) == wanted


def test_an_image_replaced_before_the_extraction_was_finished(own_images, tmp_path):
    store = tmp_path / "store"
    writer = make_writer(store, own_images)
    writer.prepare()
    write_shards(writer, [0, 1], own_images)
    replace_image(own_images / "a" / "3.png")
    assert make_writer(store, own_images).prepare() == [0, 2]
    fill(make_writer(store, own_images), own_images)
    check_same_as_new(store, own_images, tmp_path)


def remove_first(images: Path) -> None:
    (images / "a" / "0.png").unlink()


def add_in_the_middle(images: Path) -> None:
    shutil.copy(images / "a" / "0.png", images / "b" / "5.png")


def add_at_the_end(images: Path) -> None:
    shutil.copy(images / "a" / "0.png", images / "c" / "9.png")


def add_a_first_class(images: Path) -> None:
    shutil.copytree(images / "b", images / "Z")


def add_an_empty_class(images: Path) -> None:
    """All labels change, and no image."""
    (images / "0").mkdir()


INTERRUPTED = [
    (remove_first, [0, 1, 2]),
    (add_in_the_middle, [1, 2]),
    (add_at_the_end, [2]),
    (add_a_first_class, [0, 1, 2, 3]),
    (add_an_empty_class, [2]),
]


@pytest.mark.parametrize("change, missing", INTERRUPTED, ids=[change.__name__ for change, _ in INTERRUPTED])
def test_an_interrupted_extraction_takes_the_images_of_now(own_images, tmp_path, change, missing):
    store = tmp_path / "store"
    writer = make_writer(store, own_images)
    assert not writer.list_has_changed()
    writer.prepare()
    write_shards(writer, [0, 1], own_images)
    change(own_images)
    writer = make_writer(store, own_images)
    assert writer.list_has_changed()
    assert writer.prepare(writer.find_changes()) == missing
    assert not writer.list_has_changed()
    fill(make_writer(store, own_images), own_images)
    check_same_as_new(store, own_images, tmp_path)


def test_an_interrupted_extraction_of_more_images_than_there_are_now(own_images, tmp_path):
    """Shards beyond the last one vanish, whichever were written."""
    store = tmp_path / "store"
    writer = make_writer(store, own_images, shard_size=1)
    writer.prepare()
    write_shards(writer, [0, 1, 2, 3, 9], own_images)
    shutil.rmtree(own_images / "c")
    fill(make_writer(store, own_images, shard_size=1), own_images)
    new = tmp_path / "new"
    fill(make_writer(new, own_images, shard_size=1), own_images)
    assert content(store) == content(new)


def test_an_interrupted_extraction_of_other_images_is_not_overwritten(own_images, tmp_path):
    store = tmp_path / "store"
    writer = make_writer(store, own_images)
    writer.prepare()
    write_shards(writer, [0, 1], own_images)
    wanted = content(store)
    for file in own_images.rglob("*.png"):
        file.rename(file.with_name(f"x{file.name}"))
    with pytest.raises(UserError, match="8 of its 8 images are gone or replaced, such as 'a/0.png'; choose"):
        fill(make_writer(store, own_images), own_images)
    assert content(store) == wanted


def test_a_store_without_a_list_of_its_files(own_images, tmp_path):
    """Older stores open; their images are compared by name only. A lost list is written again."""
    store = tmp_path / "store"
    fill(make_writer(store, own_images), own_images)
    (store / "sources.npz").unlink()
    assert damaged_files(store) == ["sources.npz: missing"]
    fill(make_writer(store, own_images), own_images)
    assert damaged_files(store) == []
    manifest = json.loads((store / "manifest.json").read_text())
    del manifest["sources_sha256"]
    (store / "manifest.json").write_text(json.dumps(manifest))
    (store / "sources.npz").unlink()
    assert len(open_features(store, SIZE)) == 10
    writer = make_writer(store, own_images)
    assert writer.prepare(writer.find_changes()) is None
    (own_images / "c" / "8.png").unlink()
    with pytest.raises(UserError, match="holds features of other images .source_count 10, not 9"):
        fill(make_writer(store, own_images), own_images)


def test_unreadable_images_are_left_out_and_listed(tiny_images, tmp_path):
    fill(make_writer(tmp_path, tiny_images), tiny_images, bad=(0, 4, 5, 6, 7))
    store, labels = open_features(tmp_path, SIZE), ImageFolder(tiny_images, SIZE).labels
    assert store.labels.tolist() == [labels[index] for index in (1, 2, 3, 8, 9)]
    assert [entry[0] for entry in store.manifest["unreadable"]] == [0, 4, 5, 6, 7]
    generator = rng(0, "latent")
    view = int(generator.integers(2))
    image = pixels_of(tiny_images, [8])
    mean = StandIn().encode(image.flip(3) if view else image)[0][0].numpy()
    noise = generator.standard_normal((2, 2, 2), np.float32)
    assert np.array_equal(store.latent(3, rng(0, "latent")), mean + np.float32(0.25) * noise)


@pytest.mark.parametrize(
    "change", [{"dtype": "float16"}, {"shard_size": 5}, {"flip": False}, {"kind": "sample"}]
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_setting_in_the_same_folder_is_named(tiny_images, tmp_path, change, finished):
    writer = make_writer(tmp_path, tiny_images)
    fill(writer, tiny_images) if finished else writer.prepare()
    name = {"flip": "views"}.get(next(iter(change)), next(iter(change)))
    with pytest.raises(UserError, match=f"--features-path .*: holds features with {name} "):
        make_writer(tmp_path, tiny_images, **change).prepare()


def test_a_folder_with_foreign_files_is_refused(tiny_images, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds thesis.tex"):
        make_writer(tmp_path, tiny_images).prepare()
    assert content(tmp_path) == {"thesis.tex": b"x"}


def test_store_survives_pickling_and_opens_few_maps(tiny_images, tmp_path, monkeypatch):
    fill(make_writer(tmp_path, tiny_images, shard_size=1), tiny_images)
    monkeypatch.setattr("data.features.MAX_OPEN_SHARDS", 3)
    store = open_features(tmp_path, SIZE)
    latents = [store.latent(index, rng(0, "latent", index)) for index in range(10)]
    assert len(store._maps) == 3
    copy = pickle.loads(pickle.dumps(store))
    assert not copy._maps
    assert copy.fingerprint() == store.fingerprint()
    for index in range(10):
        assert np.array_equal(copy.latent(index, rng(0, "latent", index)), latents[index])
    with pytest.raises(IndexError):
        store.latent(10, rng(0, "latent"))


def test_fingerprint_follows_the_content(tiny_images, tmp_path):
    for name, changes in (("a", {}), ("b", {}), ("c", {"flip": False})):
        fill(make_writer(tmp_path / name, tiny_images, **changes), tiny_images)
    a, b, c = (open_features(tmp_path / name, SIZE).fingerprint() for name in "abc")
    assert a == b != c


def make_official(folder: Path, names: list[int], label_names: list[int] | None = None) -> None:
    for kind in ("features", "labels"):
        (folder / f"imagenet8_{kind}").mkdir(parents=True)
    for name in names:
        np.save(folder / f"imagenet8_features/{name}.npy", np.full((1, 2, 2, 2), name, np.float32))
    for name in names if label_names is None else label_names:
        np.save(folder / f"imagenet8_labels/{name}.npy", np.array([name % 5]))


def test_official_layout_is_paired_by_name_in_numeric_order(tmp_path):
    make_official(tmp_path, [10, 9, 100, 2])
    store = open_features(tmp_path, SIZE)
    largest = [store.latent(index, None).max() for index in range(4)]
    assert largest == [2, 9, 10, 100]
    assert store.labels.tolist() == [2, 4, 0, 0]
    assert store.autoencoder is None
    assert store.class_names == ["0", "1", "2", "3", "4"]
    assert pickle.loads(pickle.dumps(store)).fingerprint() == store.fingerprint()


@pytest.mark.parametrize("label", [[-1], [2.7], [0, 0, 1], [float("nan")], [float("inf")], [1e30]])
@pytest.mark.parametrize("name", [1, 2])
def test_official_labels_that_are_no_class_are_refused(tmp_path, label, name):
    """The first file is read at opening, the others when training asks for the labels, before its first step."""
    make_official(tmp_path, [1, 2, 3])
    np.save(tmp_path / f"imagenet8_labels/{name}.npy", np.array(label))
    with pytest.raises(UserError, match=f"data.feature_path: .*labels/{name}.npy holds .*, not the number"):
        open_features(tmp_path, SIZE).fingerprint()


@pytest.mark.parametrize("labels", [[1, 2], [1, 2, 4], []])
def test_official_layout_with_odd_names_is_refused(tmp_path, labels):
    make_official(tmp_path, [1, 2, 3], labels)
    with pytest.raises(UserError, match="data.feature_path: .*counterpart, for example [1-4].npy"):
        open_features(tmp_path, SIZE)


def test_missing_empty_unfinished_and_mismatching_folders(tiny_images, tmp_path):
    for folder in (tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match=f"data.feature_path: {folder} .*extract_features.py"):
            open_features(folder, SIZE)
    make_writer(tmp_path / "begun", tiny_images).prepare()
    with pytest.raises(UserError, match="data.feature_path: .* unfinished"):
        open_features(tmp_path / "begun", SIZE)
    fill(make_writer(tmp_path / "store", tiny_images), tiny_images)
    with pytest.raises(UserError, match="data.image_size: 16"):
        open_features(tmp_path / "store", 16)
    with pytest.raises(UserError, match="holds no image"):
        fill(make_writer(tmp_path / "none", tiny_images), tiny_images, bad=tuple(range(10)))
        open_features(tmp_path / "none", SIZE)


def test_images_with_features_that_are_not_finite_are_named(tiny_images, tmp_path, capsys, monkeypatch):
    fill(make_writer(tmp_path, tiny_images), tiny_images, bad=(5,))
    store = open_features(tmp_path, SIZE)
    assert [index for index in range(9) if not store.is_finite(index)] == []
    assert store.describe(4) == "image 4 ('b/1.png')"
    assert store.describe(5) == "image 5 ('b/7.png')"  # b/4.png is number 5 of the folder, and unreadable

    # A NaN with the right checksum, as if the autoencoder had made it
    file = tmp_path / "shard-00001.npy"
    features = np.load(file)
    features[1, 0, 0, 0, 0] = np.nan
    np.save(file, features)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][1]["sha256"] = sha256_of(file)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(sys, "argv", ["features", "--verify", str(tmp_path)])
    with pytest.raises(SystemExit):
        verify()
    assert capsys.readouterr().out == "shard-00001.npy: image 5 ('b/7.png') is not finite\n"
    assert not open_features(tmp_path, SIZE).is_finite(5)

    # Repaired as the last line says
    file.unlink()
    fill(make_writer(tmp_path, tiny_images), tiny_images, bad=(5,))
    verify()
    assert "all numbers are finite" in capsys.readouterr().out


HOSTILE = [
    {"shards": [{"file": "../shard-00000.npy", "count": 10, "bytes": 1, "sha256": ""}]},
    {"shards": [{"file": "/etc/passwd", "count": 10, "bytes": 1, "sha256": ""}]},
    {"shards": [{"file": "shard-00000.npy", "count": -1, "bytes": 1, "sha256": ""}]},
    {"shards": None},
    {"latent_shape": [4, 2**40, 2]},
    {"latent_shape": "abc"},
    {"kind": ["moments"]},
    {"views": 0},
    {"dtype": "O"},
    {"count": 11},
    {"class_names": ["a"]},
    {"class_names": 7},
]


@pytest.mark.parametrize("change", HOSTILE)
def test_hostile_manifests_are_refused(tiny_images, tmp_path, change):
    fill(make_writer(tmp_path, tiny_images), tiny_images)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError):
        open_features(tmp_path, SIZE)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "{}", '{"format": 1}', "\0"])
def test_files_that_are_not_manifests_are_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest.json"):
        open_features(tmp_path, SIZE)


def test_pickles_in_place_of_arrays_are_refused(tiny_images, tmp_path):
    fill(make_writer(tmp_path, tiny_images), tiny_images)
    shard = tmp_path / "shard-00000.npy"
    payload = pickle.dumps([1, 2, 3])
    shard.write_bytes(payload + b"\0" * (shard.stat().st_size - len(payload)))
    with pytest.raises(UserError, match="shard-00000.npy"):
        open_features(tmp_path, SIZE).latent(0, rng(0, "latent"))
    np.save(tmp_path / "labels.npy", np.array([{}] * 10, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="labels.npy"):
        open_features(tmp_path, SIZE)


def test_verify_finds_a_flipped_bit(tiny_images, tmp_path):
    fill(make_writer(tmp_path, tiny_images), tiny_images)
    assert damaged_files(tmp_path) == []
    file = tmp_path / "shard-00002.npy"
    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 1
    file.write_bytes(damaged)
    (tmp_path / "shard-00000.npy").unlink()
    command = [sys.executable, "-m", "data.features", "--verify", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert result.returncode == 1
    assert result.stdout.splitlines() == [
        "shard-00000.npy: missing",
        "shard-00002.npy: differs from its checksum",
    ]
    file.unlink()
    fill(make_writer(tmp_path, tiny_images), tiny_images)
    assert damaged_files(tmp_path) == []
    shutil.rmtree(tmp_path)
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
