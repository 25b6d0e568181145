"""evaluate.py as users run it: extractors, .npz files and folders, processes, caches, refusals."""

import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

import evaluate
from config import OneProcessError, UserError
from data.images import ImageFolder, center_crop
from evaluation import metrics
from evaluation.extractors import Inception, TorchScriptModel, download, load_extractor
from evaluation.feature_cache import FeatureChunks, read_pixels
from evaluation.image_sets import FolderImages, open_source
from models.ops.precision import allow_tf32
from processes import group

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
COUNT, SIZE = 300, 16  # two chunks of features


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "default_device", lambda local_rank=0: CPU)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_extractor) -> Path:
    """samples.npz with labels, the same images as a folder, reference.npz, extractors tiny.pt and other.pt."""
    folder, numbers = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0)
    samples = numbers.integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)
    labels = numbers.integers(0, 3, COUNT)
    np.savez(folder / "samples.npz", samples, labels)
    (folder / "samples").mkdir()
    for i, image in enumerate(samples):
        Image.fromarray(image).save(folder / "samples" / f"{i:06d}.png")
    np.savez_compressed(
        folder / "reference.npz", arr_0=numbers.integers(0, 200, (280, SIZE, SIZE, 3), dtype=np.uint8)
    )
    shutil.copy(tiny_extractor, folder / "tiny.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch prefers other formats by now
        torch.jit.save(torch.jit.script(torch.nn.Flatten()), folder / "other.pt")
    return folder


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory) -> Path:
    """Random weights with the names and shapes of the published file."""

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    nothing, file = io.BytesIO(), tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = Unloaded("inception", ["2048"], nothing).state_dict()
        for weight in state.values():
            if weight.ndim == 4:  # large enough that images still differ in the last layer
                weight.normal_(std=(2 / weight[0].numel()) ** 0.5)
        torch.save(state, file)
    return file


def run(place: Path, *argv, cache="cache", features="tiny.pt") -> dict:
    output = place / "numbers.json"
    output.unlink(missing_ok=True)
    options = ["--features", place / features, "--cache", place / cache, "--output", output]
    evaluate.main([str(part) for part in (*argv, *options)])
    return json.loads(output.read_text())


def refusal(*argv) -> str:
    with pytest.raises(UserError) as caught:
        evaluate.main([str(part) for part in argv])
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- extractors


def test_inception_is_the_published_graph(inception_weights):
    """Features, logits without bias, and channels 0 to 6 of mixed_6/conv, each computed by hand."""
    extractor = Inception(str(inception_weights), CPU)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    ours, net = extractor(images), extractor.network
    assert ours.features.shape == (2, 2048)
    assert ours.logits.shape == (2, 1008)
    assert ours.spatial.shape == (2, 2023)
    assert torch.equal(ours.logits, ours.features @ net.fc.weight.T)

    seen = []
    handle = net.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    again = extractor(images)
    handle.remove()
    x = seen[0]
    assert x.shape == (2, 3, 299, 299) and x.min() >= -1 and x.max() <= 1
    corner = images[:, :, 0, 0].float() / 128 - 1
    assert torch.allclose(
        x[:, :, 0, 0], corner
    )  # TensorFlow 1: the first output pixel is the first input pixel
    with torch.inference_mode():
        for name in (
            "Conv2d_1a_3x3",
            "Conv2d_2a_3x3",
            "Conv2d_2b_3x3",
            "MaxPool_1",
            "Conv2d_3b_1x1",
            "Conv2d_4a_3x3",
        ):
            x = getattr(net, name)(x)
        for name in ("MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"):
            x = getattr(net, name)(x)
        branch = net.Mixed_6d.branch1x1
        maps = branch.bn(F.conv2d(x, branch.conv.weight)).relu()  # (2, 192, 17, 17)
    assert maps.shape[2:] == (17, 17)
    assert torch.allclose(
        again.spatial.view(2, 17, 17, 7), maps[:, :7].permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5
    )


def test_fid_by_the_whole_command(place, inception_weights, capsys):
    """From ADM files to all metrics; the distances again from the few images' own differences."""
    numbers, extractor, outputs = np.random.default_rng(1), Inception(str(inception_weights), CPU), []
    for name, count in (("a", 5), ("b", 4)):
        images = numbers.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(place / f"{name}.npz", images)
        outputs.append(extractor(torch.from_numpy(images).permute(0, 3, 1, 2)))
    weights = ["--inception-weights", str(inception_weights), "--cache", str(place / "inception")]
    evaluate.main([str(place / "a.npz"), str(place / "b.npz"), *weights])
    found = json.loads((place / "a.evaluation.json").read_text())
    for name, kind in (("fid", "features"), ("sfid", "spatial")):
        a, b = (getattr(output, kind).double() for output in outputs)
        (u, v), step = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b)], a.mean(0) - b.mean(0)
        expected = (
            step.square().sum()
            + u.square().sum()
            + v.square().sum()
            - 2 * torch.linalg.svdvals(u @ v.T).sum()
        )
        assert found[name] == pytest.approx(expected.item(), rel=1e-4) and found[name] > 0
    p = outputs[0].logits.double().softmax(1)
    score = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    assert (
        found["inception_score"] == pytest.approx(score, rel=1e-4) and {"precision", "recall"} <= found.keys()
    )
    printed = capsys.readouterr().out
    assert "5 images give 2048 features a covariance of rank 4 at most" in printed
    assert f"FID{found['fid']:27.4f}" in printed


def test_statistics_alone_are_a_reference(place, inception_weights, monkeypatch, capsys):
    """The arrays of an ADM reference are taken as they are; what needs images is left out."""
    numbers, seen = np.random.default_rng(2), []
    np.savez(place / "four.npz", numbers.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))
    mu, sigma = numbers.standard_normal(2048), np.diag(numbers.random(2048))
    np.savez(place / "statistics.npz", mu=mu, sigma=sigma)
    monkeypatch.setattr(
        metrics, "frechet_distance", lambda a, b: seen.append((a, b)) or 7.0
    )  # at this size, seconds
    weights = ["--inception-weights", str(inception_weights), "--cache", str(place / "inception")]
    evaluate.main([str(place / "four.npz"), str(place / "statistics.npz"), *weights])
    ((samples, reference),) = seen
    assert np.array_equal(reference.mean, mu) and np.array_equal(reference.covariance, sigma)
    assert samples.mean.shape == (2048,) and samples.count == 4
    found = json.loads((place / "four.evaluation.json").read_text())
    missing = {"sfid", "kid", "precision", "recall"}
    assert {"fid", "inception_score"} <= found.keys()
    assert not missing & found.keys()
    assert found["num_reference"] is None and "an unknown number of images" in capsys.readouterr().out


def test_inception_weights_that_are_missing_or_wrong(place, inception_weights, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    pair = [place / "samples.npz", place / "reference.npz", "--cache", place / "cache"]
    assert URL_INCEPTION_V3 in refusal(*pair, "--inception-weights", tmp_path / "none.pth")
    message = refusal(*pair, "--inception-weights", place / "tiny.pt")
    assert "does not hold the Inception weights" in message and "weights_only" not in message
    (tmp_path / "code.pth").write_bytes(b"cos\nsystem\n(S'false'\ntR.")  # a pickle that would call os.system
    assert "does not hold the Inception weights" in refusal(
        *pair, "--inception-weights", tmp_path / "code.pth"
    )
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *args, **kwargs: (tmp_path / "gone").read_bytes()
    )  # offline
    message = refusal(*pair)
    assert URL_INCEPTION_V3 in message and "--inception-weights" in message
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert "pip install torch-fidelity" in refusal(*pair)


def test_timm_folder(place, tmp_path):
    """Features before the classifier, logits after it, with the preprocessing that the folder names."""
    model = timm.create_model("resnet10t", num_classes=5).eval()
    timm.models.save_for_hf(model, tmp_path / "timm", model_args={"num_classes": 5}, safe_serialization=True)
    extractor = load_extractor(str(tmp_path / "timm"), None, CPU)
    images = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    ours, settings = extractor(images), timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("mean", "std"))
    resized = F.interpolate(
        images.float() / 255, settings["input_size"][1:], mode=settings["interpolation"], antialias=True
    )
    with torch.no_grad():
        assert torch.allclose(ours.logits, model((resized - mean) / std), atol=1e-5)
        assert torch.allclose(ours.logits, model.fc(ours.features), atol=1e-5) and ours.spatial is None


def test_a_timm_folder_is_known_by_the_weights_in_use(tmp_path):
    """Also where they are in a file that only timm knows the name of."""
    names = set()
    for seed in range(2):
        torch.manual_seed(seed)
        model = timm.create_model("resnet10t", num_classes=5)
        timm.models.save_for_hf(
            model, tmp_path / "timm", model_args={"num_classes": 5}, safe_serialization=False
        )
        (tmp_path / "timm" / "pytorch_model.bin").rename(tmp_path / "timm" / "pytorch_model.pth")
        names |= {load_extractor(str(tmp_path / "timm"), None, CPU).name for _ in range(2)}
    assert len(names) == 2


def test_a_timm_folder_executes_nothing(tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    timm.models.save_for_hf(timm.create_model("resnet10t"), tmp_path / "timm", safe_serialization=False)
    torch.save(Payload(), tmp_path / "timm" / "pytorch_model.bin")
    with pytest.raises(UserError, match="is not the folder of a timm model"):
        load_extractor(str(tmp_path / "timm"), None, CPU)
    assert not (tmp_path / "executed").exists()


# --------------------------------------------------------------------------------------------------- commands


def test_npz_and_folder_are_the_same_images(place, capsys):
    npz = run(place, place / "samples.npz", place / "reference.npz")
    folder = run(place, place / "samples", place / "reference.npz")
    assert npz.keys() - folder.keys() == {"class_accuracy"}  # a flat folder has no labels
    for name in ("frechet_distance", "kid", "precision", "recall"):
        assert npz[name] == folder[name]
    with np.load(place / "samples.npz") as arrays:
        images, labels = arrays["arr_0"].astype(np.float32), arrays["arr_1"]
    assert npz["class_accuracy"] == (images.mean((1, 2)).argmax(1) == labels).mean()
    assert npz["num_samples"] == COUNT and npz["num_reference"] == 280
    assert "Fréchet distance" in capsys.readouterr().out
    same = run(place, place / "samples.npz", place / "samples")
    assert 0 <= same["frechet_distance"] < 1e-6 and same["precision"] == same["recall"] == 1
    assert "-0.0" not in capsys.readouterr().out


def test_one_and_two_processes_give_the_same(place):
    """The same numbers to the last digit, and a cache that holds the same features."""
    one = run(place, place / "samples.npz", place / "reference.npz", cache="one")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["evaluate.py", place / "samples.npz", place / "reference.npz"]
    command += ["--features", place / "tiny.pt", "--cache", place / "two", "--output", place / "two.json"]
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((place / "two.json").read_text()) == one
    assert done.stdout.count("Fréchet distance") == 1
    files = {path.relative_to(place / "one") for path in (place / "one").rglob("*.npz")}
    assert len(files) == 4
    assert files == {path.relative_to(place / "two") for path in (place / "two").rglob("*.npz")}


def test_features_are_cached_by_content(place, monkeypatch):
    run(place, place / "samples.npz", place / "reference.npz", cache="known")
    (place / "renamed.npz").write_bytes((place / "samples.npz").read_bytes())
    calls, write = [], FeatureChunks.write
    monkeypatch.setattr(
        FeatureChunks, "write", lambda self, chunk, arrays: (calls.append(chunk), write(self, chunk, arrays))
    )
    run(place, place / "renamed.npz", place / "reference.npz", cache="known")
    assert calls == []
    lost = min(path for path in (place / "known").rglob("00001.npz"))
    lost.unlink()  # as an interrupted run leaves it
    run(place, place / "renamed.npz", place / "reference.npz", cache="known")
    assert calls == [1]
    lost.write_bytes(b"")  # as a power cut may leave it
    run(place, place / "renamed.npz", place / "reference.npz", cache="known")
    assert calls == [1, 1]
    images = np.load(place / "samples.npz")["arr_0"].copy()
    images[0, 0, 0, 0] ^= 1
    np.savez(place / "changed.npz", images)
    run(place, place / "changed.npz", place / "reference.npz", cache="known")
    assert calls == [1, 1, 0, 1]


def damage(file: Path, kind: str) -> None:
    data = bytearray(file.read_bytes())
    if kind == "bit":
        data[len(data) // 2] ^= 1
    elif kind == "cut":
        del data[len(data) // 2 :]
    else:
        with np.load(file) as arrays:
            values = {name: arrays[name].copy() for name in arrays.files}
        values["features"][0] = np.nan
        np.savez(file, **values)
        return
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["bit", "cut", "nan"])
def test_damaged_features_are_computed_again(place, capsys, kind):
    pair = place / "samples.npz", place / "reference.npz"
    whole = run(place, *pair, cache="damaged")
    file = min((place / "damaged").rglob("00000.npz"))
    damage(file, kind)
    capsys.readouterr()
    assert run(place, *pair, cache="damaged") == whole
    assert f"'{file}' is damaged; these features are computed again" in capsys.readouterr().out
    run(place, *pair, cache="damaged")
    assert "is damaged" not in capsys.readouterr().out


def test_results_of_other_comparisons_are_kept(place, tmp_path, capsys):
    """A file for each question beside the samples; the same question again replaces its answer."""
    samples = tmp_path / "s.npz"
    shutil.copy(place / "samples.npz", samples)
    tiny = ["--cache", str(place / "cache"), "--features"]
    for reference, features in (
        ("reference.npz", "tiny.pt"),
        ("samples", "tiny.pt"),
        ("reference.npz", "tiny.pt"),
    ):
        evaluate.main([str(samples), str(place / reference), *tiny, str(place / features)])
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [
        "s.evaluation-2.json",
        "s.evaluation.json",
    ]
    for name, reference in (("s.evaluation.json", "reference.npz"), ("s.evaluation-2.json", "samples")):
        assert json.loads((tmp_path / name).read_text())["reference"] == str(place / reference)
    assert "s.evaluation.json" in capsys.readouterr().out.splitlines()[-1]


def test_tf32_only_where_it_is_asked_for(place, tmp_path, monkeypatch):
    """Whatever the process allows, as a model sampled before may have; and its features are others."""
    seen = []
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    call = TorchScriptModel.__call__

    def look(self, images):
        seen.append({switch.allow_tf32 for switch in switches})
        return call(self, images)

    monkeypatch.setattr(TorchScriptModel, "__call__", look)
    before = [switch.allow_tf32 for switch in switches]
    allow_tf32(True)
    argv = [
        place / "samples.npz",
        place / "samples",
        "--features",
        place / "tiny.pt",
        "--cache",
        tmp_path / "c",
    ]
    for k, switch in enumerate(([], ["--tf32"])):
        output = tmp_path / f"{k}.json"
        evaluate.main([str(part) for part in (*argv, *switch, "--output", output)])
        assert seen and all(found == {bool(switch)} for found in seen)
        assert json.loads(output.read_text())["features"].endswith("+tf32") == bool(switch)
        seen.clear()
    after = [switch.allow_tf32 for switch in switches]
    for switch, value in zip(switches, before):
        switch.allow_tf32 = value
    assert after == [True, True]


def test_no_output_replaces_something_else(place, tmp_path):
    """The same question replaces its answer; another answer, and any other file, are kept."""
    samples, output = place / "samples.npz", tmp_path / "numbers.json"
    tiny = ["--features", place / "tiny.pt", "--cache", place / "cache"]
    compare = [samples, place / "reference.npz", *tiny, "--output"]
    for _ in range(2):
        evaluate.main([str(part) for part in (*compare, output)])
    kept = output.read_bytes()
    assert "holds something else than this comparison" in refusal(samples, samples, *tiny, "--output", output)
    (tmp_path / "notes.txt").write_text("mine")
    assert "notes.txt': holds something else" in refusal(*compare, tmp_path / "notes.txt")
    assert output.read_bytes() == kept and (tmp_path / "notes.txt").read_text() == "mine"

    # A reference
    own = tmp_path / "own.npz"
    make = ["--make-reference", place / "samples", own, *tiny, "--image-size"]
    for _ in range(2):
        evaluate.main([str(part) for part in (*make, SIZE)])
    kept = own.read_bytes()
    assert "is no reference of these images and features" in refusal(*make, SIZE // 2)
    shutil.copytree(place / "samples", tmp_path / "other")
    Image.new("RGB", (SIZE, SIZE)).save(min((tmp_path / "other").rglob("*.png")))
    assert "is no reference of these images" in refusal(make[0], tmp_path / "other", *make[2:], SIZE)
    assert own.read_bytes() == kept
    shutil.copy(samples, tmp_path / "copy.npz")
    assert "copy.npz': exists and is no ref" in refusal(*make[:2], tmp_path / "copy.npz", *make[3:], SIZE)


def test_lossy_files_on_one_side(place, tmp_path, capsys):
    folders = {}
    options = {"jpeg": {}, "lossy": {"format": "WEBP"}, "lossless": {"format": "WEBP", "lossless": True}}
    for kind, settings in options.items():
        folders[kind] = tmp_path / kind
        folders[kind].mkdir()
        for k in range(5):
            ending = "jpg" if kind == "jpeg" else "webp"
            Image.effect_noise((SIZE, SIZE), 40 + k).convert("RGB").save(
                folders[kind] / f"{k}.{ending}", **settings
            )
    for samples, reference, count in (
        ("jpeg", "lossless", 1),
        ("lossless", "lossy", 1),
        ("lossy", "jpeg", 0),
        ("lossless", "lossless", 0),
    ):
        run(place, folders[samples], folders[reference])
        assert capsys.readouterr().out.count("5 images are lossily compressed") == count
    run(place, folders["jpeg"], place / "reference.npz")
    assert "jpeg': 5 images are lossily compressed" in capsys.readouterr().out


def test_a_reference_of_lossy_files_remembers_it(place, tmp_path, capsys):
    """Unless the crop has scaled them: their blocks are gone then."""
    folders = {"jpg": tmp_path / "jpg", "png": tmp_path / "png"}
    tiny = ["--features", place / "tiny.pt", "--cache", tmp_path / "cache"]
    for ending, folder in folders.items():
        folder.mkdir()
        for k in range(5):
            Image.effect_noise((SIZE, SIZE), 40 + k).convert("RGB").save(folder / f"{k}.{ending}")
    for size in (SIZE, SIZE // 2):
        argv = ["--make-reference", folders["jpg"], tmp_path / f"{size}.npz", "--image-size", size, *tiny]
        evaluate.main([str(part) for part in argv])
    for samples, count in (("png", 1), ("jpg", 0)):
        capsys.readouterr()
        run(place, folders[samples], tmp_path / f"{SIZE}.npz")
        assert capsys.readouterr().out.count("5 images are lossily compressed") == count
    assert open_source(tmp_path / f"{SIZE // 2}.npz", "REFERENCE").lossy == 0


def test_evaluation_reads_the_files_that_training_reads(place, tmp_path, capsys):
    """Of a folder that has everything which is left out: the same files, classes, and lines about them."""
    data = tmp_path / "data"
    for name in ("b/1.png", "b/0.png", "a/x/2.PNG", "__MACOSX/a/._0.png", ".hidden/0.png", "beside.png"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((SIZE, SIZE), 40).convert("RGB").save(data / name)
    for name in ("a/2.txt", "b/3.heic", "empty/readme.md"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).touch()
    own = ImageFolder(data, SIZE, "SAMPLES")
    images = FolderImages(data, option="SAMPLES")
    assert (
        [str(path.relative_to(data)) for path in images.paths]
        == own.paths
        == ["a/x/2.PNG", "b/0.png", "b/1.png"]
    )
    assert images.labels.tolist() == own.labels and images.class_names == own.class_names
    assert images.notes == own.notes and len(images.notes) == 3
    cropped = FolderImages(data, SIZE, "SAMPLES")
    assert cropped.paths == images.paths and np.array_equal(cropped.read([0, 2]), images.read([0, 2]))
    shutil.copytree(data / "b", data / "c")
    run(place, data, place / "reference.npz")
    printed = capsys.readouterr().out
    assert f"SAMPLES {data}: 1 images beside the class folders are not read, such as 'beside.png'" in printed
    # The parent of several data sets is none
    (data / "beside.png").unlink()
    for part in ("train", "val"):
        shutil.copytree(data, tmp_path / "parent" / part)
    with pytest.raises(UserError, match="REFERENCE .*: looks like the parent of data sets: 'train', 'val'"):
        open_source(tmp_path / "parent", "REFERENCE")


class HalfBlind(torch.nn.Module):
    """Features that are not finite for white images."""

    def forward(self, images):
        means = images.float().mean((2, 3))
        return means / (255 - means)


def test_features_that_are_not_finite(place, tmp_path):
    """The image is named, and no number is printed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(HalfBlind()), tmp_path / "blind.pt")
    images = np.random.default_rng(0).integers(0, 250, (9, SIZE, SIZE, 3), dtype=np.uint8)
    images[7] = 255
    np.savez(tmp_path / "white.npz", images)
    blind = ["--features", tmp_path / "blind.pt", "--cache", tmp_path / "cache"]
    message = refusal(tmp_path / "white.npz", place / "reference.npz", *blind)
    assert "white.npz', image 7: its features are not finite" in message
    (tmp_path / "folder").mkdir()
    for k, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{k}.png")
    assert "7.png': its features are not finite" in refusal(place / "samples", tmp_path / "folder", *blind)
    np.savez(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    assert "mu or sigma is not finite" in refusal(place / "samples", tmp_path / "nan.npz", *blind)
    np.savez(tmp_path / "wide.npz", feature_mu=np.zeros(4), feature_sigma=np.eye(4))
    assert "has statistics of 4 features, and the samples' images 3" in refusal(
        place / "samples", tmp_path / "wide.npz", *blind
    )


def test_damaged_inception_weights_are_downloaded_again(tmp_path, monkeypatch, capsys):
    """The cached file is compared with the hash in its name."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    content = b"weights"
    url = f"https://example.org/weights-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    calls = []

    def fetch(url, path, hash_prefix):
        calls.append(url)
        Path(path).write_bytes(content)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    file = download(url)
    assert download(url) == file and len(calls) == 1
    file.write_bytes(content[:3])
    assert download(url).read_bytes() == content and len(calls) == 2
    assert "is damaged; it is downloaded again" in capsys.readouterr().out


def test_two_runs_may_fill_one_cache(tmp_path, monkeypatch):
    """The other one writes the same chunk in the middle of ours."""
    chunks, save = FeatureChunks(tmp_path, 2, 2), np.savez

    def interrupted(stream, **arrays):
        monkeypatch.setattr(np, "savez", save)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)
            chunks.write(0, {"features": np.ones(2)})
        save(stream, **arrays)

    monkeypatch.setattr(np, "savez", interrupted)
    chunks.write(0, {"features": np.zeros(2)})
    assert chunks.read("features").tolist() == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["00000.npz"]


def test_reference_of_ones_own_data(place, inception_weights, tmp_path, capsys):
    """The training crop, and the arrays that the ADM suite reads; other features have other names."""
    images, cache = tmp_path / "images", ["--cache", str(tmp_path / "cache")]
    for k, name in enumerate(("a/0.png", "a/1.jpg", "b/0.png", "b/sub/1.png")):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((50 + k, 60 - k), 40 + k).convert("RGB").save(images / name)
    evaluate.main(["--make-reference", str(images), str(tmp_path / "own.npz"), "--image-size", "24",
                   "--inception-weights", str(inception_weights), *cache])  # fmt: skip
    assert "statistics of 4 images and 4 of the images" in capsys.readouterr().out
    with np.load(tmp_path / "own.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in ("arr_0", "arr_1", "mu", "sigma", "mu_s", "sigma_s")}
    assert arrays["arr_0"].shape == (4, 24, 24, 3) and arrays["arr_1"].tolist() == [0, 0, 1, 1]
    for image, name in zip(arrays["arr_0"], ("a/0.png", "a/1.jpg", "b/0.png", "b/sub/1.png")):
        assert np.array_equal(image, center_crop(Image.open(images / name).convert("RGB"), 24))
    outputs = Inception(str(inception_weights), CPU)(torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2))
    for suffix, features in (("", outputs.features), ("_s", outputs.spatial)):
        features, scale = features.double().numpy(), features.square().mean().item()
        assert np.abs(arrays["mu" + suffix] - features.mean(0)).max() < 1e-5 * scale**0.5
        assert np.abs(arrays["sigma" + suffix] - np.cov(features, rowvar=False)).max() < 1e-5 * scale

    evaluate.main(["--make-reference", str(images), str(tmp_path / "tiny.npz"), "--image-size", str(SIZE),
                   "--features", str(place / "tiny.pt"), *cache])  # fmt: skip
    with np.load(tmp_path / "tiny.npz", allow_pickle=False) as file:
        assert "mu" not in file.files and file["feature_mu"].shape == (9,)
    found = run(place, place / "samples.npz", tmp_path / "tiny.npz")
    assert found["num_reference"] == 4 and found["frechet_distance"] > 0
    other = ["--features", place / "other.pt", *cache]
    assert "make it again with the same --features" in refusal(
        place / "samples.npz", tmp_path / "tiny.npz", *other
    )
    assert "24 x 24" in refusal(place / "samples.npz", tmp_path / "own.npz", *other)


def test_a_reference_has_the_images_of_training(place, tmp_path, capsys):
    """Not those beside the class folders, which training does not read."""
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png", "preview.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((SIZE, SIZE), 40).convert("RGB").save(tmp_path / "images" / name)
    own = tmp_path / "own.npz"
    argv = [
        "--make-reference",
        tmp_path / "images",
        own,
        "--image-size",
        SIZE,
        "--features",
        place / "tiny.pt",
    ]
    evaluate.main([str(part) for part in (*argv, "--cache", tmp_path / "cache")])
    printed = capsys.readouterr().out
    assert "statistics of 4 images" in printed and "1 images beside the class folders are not read" in printed
    with np.load(own) as arrays:
        assert arrays["arr_1"].tolist() == [0, 0, 1, 1]
    assert open_source(own, "SAMPLES").labels.names == ["a", "b"]


# --------------------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_one_line(place, tmp_path):
    samples, reference = place / "samples.npz", place / "reference.npz"
    tiny = ["--features", place / "tiny.pt", "--cache", tmp_path / "cache"]
    np.savez(tmp_path / "large.npz", np.zeros((5, 24, 24, 3), np.uint8))
    assert "16 x 16 pixels and the reference's images 24 x 24" in refusal(
        samples, tmp_path / "large.npz", *tiny
    )
    np.savez(tmp_path / "floats.npz", np.zeros((5, 16, 16, 3)))
    assert "arr_0 is float64" in refusal(tmp_path / "floats.npz", reference, *tiny)
    np.savez(tmp_path / "first.npz", np.zeros((5, 3, 16, 16), np.uint8))
    assert "(N, H, W, 3)" in refusal(tmp_path / "first.npz", reference, *tiny)
    np.savez(tmp_path / "few.npz", np.zeros((3, 16, 16, 3), np.uint8))
    assert "3 images are too few" in refusal(tmp_path / "few.npz", reference, *tiny)
    np.savez(tmp_path / "none.npz", x=np.zeros(3))
    assert "neither images" in refusal(tmp_path / "none.npz", reference, *tiny)
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    assert "do not belong together" in refusal(samples, tmp_path / "odd.npz", *tiny)
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    assert "other features" in refusal(samples, tmp_path / "stats.npz", *tiny)
    assert "does not exist" in refusal(samples, tmp_path / "nothing.npz", *tiny)
    (tmp_path / "text.npz").write_text("no archive")
    assert "not a readable .npz" in refusal(tmp_path / "text.npz", reference, *tiny)
    (tmp_path / "mixed").mkdir()
    for name, side in (("a", 16), ("b", 17)):
        Image.new("RGB", (side, 16)).save(tmp_path / "mixed" / f"{name}.png")
    assert "mixes image sizes" in refusal(tmp_path / "mixed", reference, *tiny)
    folder = tmp_path / "folder.npz"
    folder.mkdir()
    assert "folder.npz': is a folder; give a file" in refusal(samples, reference, *tiny, "--output", folder)
    assert "folder.npz': is a folder" in refusal(
        "--make-reference", place / "samples", folder, "--image-size", 16, *tiny
    )
    assert "is neither" in refusal(samples, reference, "--features", tmp_path / "nowhere")
    assert "not a TorchScript file" in refusal(samples, reference, "--features", samples)
    assert "--image-size" in refusal("--make-reference", place / "samples", tmp_path / "x.npz")
    assert "SAMPLES and REFERENCE" in refusal(samples)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", ["empty", "bomb", "pipe", "dangling"])
def test_an_unreadable_image_is_named(place, tmp_path, kind):
    """Alone, among others, and in a data set that is cropped; a pipe is not waited for."""
    odd = tmp_path / "images" / "odd.png"
    odd.parent.mkdir()
    if kind == "empty":
        odd.touch()
    elif kind == "bomb":  # PNG header of 100,000 x 100,000 pixels
        header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
        odd.write_bytes(
            b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        )
    elif kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to("nothing.png")
    tiny = ["--features", place / "tiny.pt", "--cache", tmp_path / "cache"]
    assert "odd.png" in refusal(odd.parent, place / "reference.npz", *tiny)
    Image.new("RGB", (SIZE, SIZE)).save(odd.parent / "a.png")
    message = refusal(odd.parent, place / "reference.npz", *tiny)
    assert "unreadable image" in message and "odd.png" in message and "sizes" not in message
    assert "odd.png" in refusal(
        "--make-reference", odd.parent, tmp_path / "own.npz", "--image-size", SIZE, *tiny
    )


def test_the_process_that_finds_a_damaged_image_reports_it(tmp_path):
    (tmp_path / "odd.png").touch()
    images = FolderImages(tmp_path, image_size=SIZE)
    with pytest.raises(OneProcessError, match="odd.png"):
        read_pixels(images, range(1))


def test_pickles_are_never_loaded(tmp_path):
    """An object array would run code when unpickled; it is refused wherever it stands."""

    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    for name in ("arr_0", "mu"):
        arrays = {"arr_0": np.zeros((5, 16, 16, 3), np.uint8), "mu": np.zeros(3), "sigma": np.zeros((3, 3))}
        arrays[name] = np.array([Payload()], dtype=object)
        np.savez(tmp_path / "evil.npz", **arrays)
        with pytest.raises(UserError):
            open_source(tmp_path / "evil.npz", "SAMPLES")
        assert not (tmp_path / "executed").exists()


def test_a_file_that_ends_early(place, tmp_path):
    """The archive is whole, the array in it is not."""
    with (
        zipfile.ZipFile(tmp_path / "cut.npz", "w") as archive,
        zipfile.ZipFile(place / "samples.npz") as whole,
    ):
        archive.writestr("arr_0.npy", whole.read("arr_0.npy")[:-1000])
    pair = [tmp_path / "cut.npz", place / "reference.npz"]
    pair += ["--features", place / "tiny.pt", "--cache", tmp_path / "cache"]
    assert "does not hold the (300, 16, 16, 3) uint8 values that its header claims" in refusal(*pair)


class Returning(torch.nn.Module):
    """A network whose output has another form than features of a batch have."""

    def __init__(self, form: str):
        super().__init__()
        self.form = form

    def forward(self, images: torch.Tensor) -> Any:
        means = images.float().mean((2, 3))
        if self.form == "tuple of three":
            return means, means, means
        if self.form == "list":
            return [means]
        if self.form == "number":
            return means.sum()
        return means.view(-1, 7)


@pytest.mark.parametrize(
    "form, message",
    [
        ("tuple of three", "returns neither"),
        ("list", "returns neither"),
        ("number", "returns neither"),
        ("other shape", "fails on uint8 images of 8 x 8"),
    ],
)
def test_networks_that_give_no_features(tmp_path, form, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch prefers other formats by now
        file = tmp_path / "network.pt"
        example = torch.zeros(7, 3, 16, 16, dtype=torch.uint8)
        torch.jit.save(torch.jit.trace(Returning(form), example, strict=False), file)
    extractor = TorchScriptModel(file, CPU)
    with pytest.raises(UserError, match=f"--features '{file}': {message}"):
        extractor(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
