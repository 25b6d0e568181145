"""Class accuracy: the right class for each image, whichever classes a set has and in whatever order."""

import json
import warnings

import numpy as np
import pytest
import torch
from conftest import TinyExtractor
from PIL import Image

import evaluate
from config import UserError
from evaluation.class_labels import ClassLabels, match_classes
from evaluation.extractors import CLASS_NAMES_FILE, load_extractor
from evaluation.image_sets import open_source
from processes import group
from sampling.npz import write_npz
from toy.classifier import check_replaces_nothing

CPU = torch.device("cpu")
COLOURS = {"red": (200, 9, 9), "green": (9, 200, 9), "blue": (9, 9, 200)}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(group, "default_device", lambda local_rank=0: CPU)


def write_classifier(folder, names):
    """TorchScript that gives the colours' means as logits, with names for them or without."""
    file = folder / "classifier.pt"
    extra = {} if names is None else {CLASS_NAMES_FILE: json.dumps(names)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch prefers other formats by now
        traced = torch.jit.trace(TinyExtractor(), torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
        torch.jit.save(traced, file, _extra_files=extra)
    return file


def write_colours(folder, names, images=4):
    """A class folder of images in one colour for each name, and noise that makes the images differ."""
    numbers = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for k in range(images):
            pixels = np.full((16, 16, 3), COLOURS[name]) + numbers.integers(-9, 9, (16, 16, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{k}.png")
    return folder


def run(samples, reference, classifier, folder, capsys) -> tuple[dict, str]:
    output = folder / "numbers.json"
    output.unlink(missing_ok=True)
    argv = [samples, reference, "--features", classifier, "--cache", folder / "cache", "--output", output]
    evaluate.main([str(part) for part in argv])
    return json.loads(output.read_text()), capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- the command


def test_a_part_of_the_classes_in_another_order(tmp_path, capsys):
    """Folders are numbered by their sorted names; the classifier has its own order."""
    classifier = write_classifier(tmp_path, ["red", "green", "blue"])
    two = write_colours(tmp_path / "two", ["blue", "green"])
    flat = tmp_path / "flat"
    flat.mkdir()
    for k, file in enumerate(sorted(write_colours(tmp_path / "all", list(COLOURS)).rglob("*.png"))):
        file.rename(flat / f"{k}.png")
    found, printed = run(two, flat, classifier, tmp_path, capsys)
    assert found["class_accuracy"] == 1 and "by class number" not in printed
    # The other way round the folder is one class, as it is in training, and no class of the classifier
    found, printed = run(flat, two, classifier, tmp_path, capsys)
    assert (
        "class_accuracy" not in found and "left out: the classifier does not know the class 'flat'" in printed
    )
    flat = flat.rename(tmp_path / "red")
    found, printed = run(flat, two, classifier, tmp_path, capsys)
    assert found["class_accuracy"] == 4 / 12 and "its 12 images are one class" in printed
    # But not if it is that of sample_ddp.py
    (flat / "settings.json").write_text("{}")
    found, printed = run(flat, two, classifier, tmp_path, capsys)
    assert "left out: the samples have no labels" in printed and "one class" not in printed


def test_samples_bring_the_names_of_their_classes(tmp_path, capsys):
    classifier = write_classifier(tmp_path, ["red", "green", "blue"])
    two = write_colours(tmp_path / "two", ["blue", "green"])
    pngs = sorted(two.rglob("*.png"))
    write_npz(tmp_path / "named.npz", pngs, [1] * 4 + [2] * 4, ["red", "blue", "green"])
    found, _ = run(tmp_path / "named.npz", two, classifier, tmp_path, capsys)
    assert found["class_accuracy"] == 1
    # So does a reference of one's own data
    own = tmp_path / "own.npz"
    argv = [
        "--make-reference",
        two,
        own,
        "--image-size",
        16,
        "--features",
        classifier,
        "--cache",
        tmp_path / "c",
    ]
    evaluate.main([str(part) for part in argv])
    found, _ = run(own, two, classifier, tmp_path, capsys)
    assert found["class_accuracy"] == 1
    # Without names, numbers are all there is
    write_npz(tmp_path / "plain.npz", pngs, [2] * 4 + [1] * 4, None)
    found, printed = run(tmp_path / "plain.npz", two, classifier, tmp_path, capsys)
    assert (
        found["class_accuracy"] == 1 and "by class number, because the samples have no class names" in printed
    )


def test_a_classifier_without_names(tmp_path, capsys):
    """By number where the numbers of classes agree, and otherwise not at all."""
    classifier = write_classifier(tmp_path, None)
    three = write_colours(tmp_path / "three", list(COLOURS))
    found, printed = run(three, three, classifier, tmp_path, capsys)
    assert "class_accuracy" in found and "because the classifier has no class names" in printed
    two = write_colours(tmp_path / "two", ["blue", "green"])
    found, printed = run(two, three, classifier, tmp_path, capsys)
    assert "class_accuracy" not in found
    assert "left out: the samples are of 2 classes, and the classifier knows 3 without names" in printed


def test_labels_that_are_no_class_numbers(tmp_path):
    images = np.zeros((4, 16, 16, 3), np.uint8)
    file = tmp_path / "images.npz"
    for labels in ([0, 1, -1, 2], [0, 1, 2.7, 3], np.eye(4), ["a", "b", "c", "d"], [0, 1, np.nan, 2]):
        np.savez(file, images, np.array(labels))
        assert open_source(file, "SAMPLES").labels is None
    np.savez(file, images, np.array([0.0, 1.0, 2.0, 0.0], np.float32))
    assert open_source(file, "SAMPLES").labels.numbers.tolist() == [0, 1, 2, 0]
    np.savez(file, images, np.array([0, 1, 2, 0]), dcdit_class_names=np.array("{broken"))
    assert open_source(file, "SAMPLES").labels.names is None


def test_names_in_the_file_of_a_classifier(tmp_path):
    assert load_extractor(str(write_classifier(tmp_path, ["caf\udce9", "$"])), None, CPU).class_names == [
        "caf\udce9",
        "$",
    ]
    assert load_extractor(str(write_classifier(tmp_path, None)), None, CPU).class_names is None
    assert load_extractor(str(write_classifier(tmp_path, {"a": 1})), None, CPU).class_names is None


# ------------------------------------------------------------------------------------------------------ matching


@pytest.mark.parametrize(
    ("numbers", "names", "known", "expected", "note"),
    [
        ([0, 1, 0], ["b", "a"], ["a", "b"], [1, 0, 1], ""),
        ([1, 1, 1], ["only here", "a"], ["a", "b"], [0, 0, 0], ""),
        ([0, 1, 2], ["a", "b", "x\n"], ["a", "b"], None, r"does not know the class 'x\n'"),
        ([0, 1, 3], ["a", "b"], ["a", "b"], None, "the class 3, but 2 class names"),
        ([0, 1, 1], None, None, [0, 1, 1], ""),
        ([0, 1, 1], ["0", "1"], ["a", "b"], [0, 1, 1], "the samples have no class names"),
        ([0, 0, 0], ["1"], ["0", "1"], [1, 1, 1], ""),
        ([0, 1, 1], ["a", "b"], ["b", "a", "c"], [0, 1, 1], "the classifier has no class names"),
        ([0, 1, 2], None, ["a", "b"], None, "the class 2, but the classifier has 2 classes"),
    ],
)
def test_match(numbers, names, known, expected, note):
    match = match_classes(ClassLabels(np.array(numbers), names), known, 2)
    assert (None if match.numbers is None else match.numbers.tolist()) == expected
    assert note in match.note and bool(note) == bool(match.note)


def test_a_classifier_replaces_only_one_of_the_same_classes(tmp_path):
    """Neither a checkpoint nor a classifier of other classes is lost."""
    earlier = write_classifier(tmp_path, ["blue", "red"])
    check_replaces_nothing(earlier, ["blue", "red"])
    check_replaces_nothing(tmp_path / "new.pt", ["blue", "red"])
    checkpoint = tmp_path / "checkpoint.pt"
    torch.save({"model": {}}, checkpoint)
    for file, names in ((earlier, ["blue", "green"]), (checkpoint, ["blue", "red"])):
        with pytest.raises(
            UserError, match=f"--output '{file}': exists and is no classifier of these classes"
        ):
            check_replaces_nothing(file, names)
