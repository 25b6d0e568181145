"""Conditions beside the class: what the network makes of them, and that they train, resume and sample."""

import importlib
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import kills
import numpy as np
import pytest
import torch
from PIL import Image
from test_cuda_graph import BATCH, SIDE, inputs, tapes  # noqa: F401 - a fixture
from test_demo import save_random

import config_keys
import evaluate
import sample
import sample_ddp
from config import UserError, config_from_dict, load_config, to_dict
from data.columns import add_column
from data.features import open_features
from figures.side_by_side import Choice, SideBySide
from models import build_model, reference
from models.embeddings import CONDITIONS, VectorCondition, find_kind
from sampling import hub
from sampling.budgets import Budget
from sampling.conditions import condition_values, conditions_of_images, read_conditions
from sampling.cuda_graph import GraphedDenoiser
from sampling.denoising import guided_denoiser
from sampling.generate import generate_images
from sampling.load import load_trained
from sampling.options import SamplingOptions
from sampling.pipeline import DCDiTPipeline
from training.checks import open_fitting_features
from training.sample_grids import check_grids
from training.trainer import Trainer
from weights.checkpoint import load_checkpoint

HNET = {"arch_layout": ["c1", ["D1d1"], "c1"], "d_model": [64, 64], "num_heads": [2, 2]}


def model_config(patch=None, **conditions):
    return config_from_dict(
        {
            "model": {"hnet": HNET, "patch_size": patch},
            "data": {"image_size": SIDE * 8, "num_classes": 3, "conditions": conditions},
        }
    )


def make_model(patch=None, **conditions):
    torch.manual_seed(0)
    model = build_model(model_config(patch, **conditions)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def told(*values):
    return {"score": torch.tensor(values)}


def test_without_conditions_the_network_is_what_it_was():
    """The same names, and the same first weights."""
    plain = build_model(model_config())
    assert not [name for name in plain.state_dict() if "condition" in name]
    added = build_model(model_config(score="scalar")).state_dict().keys() - plain.state_dict().keys()
    assert added == {
        "conditioner.score_embedder.null",
        *(f"conditioner.score_embedder.embedder.mlp.{part}" for part in ("0.weight", "0.bias", "2.weight")),
        "conditioner.score_embedder.embedder.mlp.2.bias",
    }


@pytest.mark.parametrize("patch", [None, 2])
@pytest.mark.parametrize("kind", ["scalar", "vector-3"])
@torch.inference_mode()
def test_a_value_changes_its_own_sample_alone(patch, kind):
    model = make_model(patch, score=kind)
    shape = find_kind(kind).shape

    def told(*values):
        return {"score": torch.tensor(values).view(-1, *[1] * len(shape)).expand(-1, *shape)}

    x = inputs(0)
    first = model(*x, conditions=told(0.2, 0.8)).prediction
    second = model(*x, conditions=told(0.2, 0.5)).prediction
    torch.testing.assert_close(first[0], second[0])
    assert not torch.allclose(first[1], second[1])
    # No value is no condition
    null = model(*x, conditions=told(float("nan"), 0.8)).prediction
    torch.testing.assert_close(null[0], model(*x).prediction[0])
    assert not torch.allclose(null[0], first[0])
    assert not torch.allclose(null[0], model(*x, conditions=told(0.0, 0.8)).prediction[0])
    if patch is None:
        plain = reference.forward(model, *x, conditions=told(0.2, 0.8))
        torch.testing.assert_close(first, plain.prediction)


def test_the_condition_is_dropped_with_the_label():
    config = model_config(score="scalar")
    columns = {"score": torch.tensor([0.25, 0.5], dtype=torch.float16)}
    values = Trainer.conditions(SimpleNamespace(config=config), columns, torch.tensor([3, 1]))["score"]
    assert values.isnan().tolist() == [True, False]
    assert values[1] == 0.5 and values.dtype == torch.float32


@pytest.mark.parametrize("lite", [False, True])
@torch.inference_mode()
def test_guidance_tells_one_branch(lite):
    config = model_config(score="scalar")
    x, t, labels = inputs(0)
    calls = []

    def network(x, t, **conditioning):
        calls.append(conditioning)
        return torch.zeros(len(x), 8, SIDE, SIDE)

    values = {"conditions": {"score": torch.full((BATCH,), 0.7)}}
    options = SamplingOptions(cfg_scale=2.0, uncond=Budget.tokens(9) if lite else None)
    guided_denoiser(network, config, labels, options, values)(x, t)
    scores = [call["conditions"]["score"] for call in calls]
    assert len(calls) == 1 + lite
    scores = torch.cat(scores)
    assert scores[:BATCH].tolist() == pytest.approx([0.7] * BATCH)
    assert scores[BATCH:].isnan().all()
    # Without guidance there is one branch
    guided_denoiser(network, config, labels, SamplingOptions(), values)(x, t)
    assert calls[-1]["conditions"]["score"].isfinite().all()


def test_values_of_samples():
    config = model_config(score="scalar", text="vector-2", other="scalar")
    rows = np.arange(8).reshape(4, 2)
    given = {"score": 0.5, "text": rows}
    values = condition_values(given, config, [3, 1], torch.device("cpu"))
    assert values["score"].tolist() == [0.5, 0.5] and values["text"].tolist() == [[6, 7], [2, 3]]
    assert values["other"].shape == (2,) and values["other"].isnan().all()
    same = condition_values({"text": rows[1]}, config, [3, 1], torch.device("cpu"))
    assert same["text"].tolist() == [[2, 3], [2, 3]]
    # Plain data tells them apart
    plain = SamplingOptions(conditions=given).plain()["conditions"]
    assert plain["score"] == 0.5 and plain["text"].startswith("int64 (4, 2), SHA-256 ")
    assert plain != SamplingOptions(conditions=given | {"text": rows + 1}).plain()["conditions"]
    assert json.loads(json.dumps(plain)) == plain


@pytest.mark.parametrize("patch", [None, 2])
@torch.inference_mode()
def test_graphs_read_the_condition_of_each_call(tapes, patch):  # noqa: F811
    model = make_model(patch, score="scalar")
    graphed = GraphedDenoiser(model)
    tokens = None if patch else [20, 20]
    for values in ((0.2, 0.8), (0.9, float("nan"))):
        expected = model(*inputs(0), tokens=tokens, conditions=told(*values)).prediction
        found = graphed(*inputs(0), tokens=tokens, conditions=told(*values)).prediction
        torch.testing.assert_close(found, expected)
    assert len(tapes) == 1


class WordCondition(VectorCondition):
    """A kind of one's own, which reads something else than a file."""

    @classmethod
    def read(cls, text, shape):
        return np.full(shape, len(text), np.float32)


@pytest.fixture
def scored(tiny_config, tmp_path, monkeypatch):
    """Overrides for features with a score, a vector and a word of each image."""
    monkeypatch.setitem(CONDITIONS, "word-N", WordCondition)
    config_keys.CONDITIONS.append("word-N")
    folder = load_config(tiny_config).data.feature_path
    shutil.copytree(folder, tmp_path / "features")
    columns = {
        "score": np.linspace(0, 1, 10),
        "clip": np.random.default_rng(0).normal(size=(10, 3)),
        "word": np.random.default_rng(1).normal(size=(10, 2)),
    }
    for name, rows in columns.items():
        np.save(tmp_path / f"{name}.npy", rows)
        add_column(tmp_path / "features", name, tmp_path / f"{name}.npy")
    kinds = "data.conditions={score: scalar, clip: vector-3, word: word-2}"
    yield [f"data.feature_path={tmp_path / 'features'}", kinds]
    config_keys.CONDITIONS.remove("word-N")


@pytest.fixture
def evaluated(tiny_images, tiny_extractor, tmp_path):
    """Overrides for sample grids and an evaluation at the last step."""
    own = ["--features", str(tiny_extractor), "--cache", str(tmp_path / "cache")]
    reference = tmp_path / "reference.npz"
    evaluate.main(["--make-reference", str(tiny_images), str(reference), "--image-size", "32", *own])
    changes = {"reference": reference, "features": tiny_extractor, "num_samples": 4, "num_sampling_steps": 2}
    return [
        "logging.sample_every=8",
        "evaluation.every=8",
        *(f"evaluation.{k}={v}" for k, v in changes.items()),
    ]


def test_trains_resumes_and_samples(run, scored, evaluated, tmp_path):
    assert run("whole", *scored, *evaluated)[0] == [0]
    assert (tmp_path / "whole" / "samples" / "0000008.png").is_file()
    assert "frechet_distance" in (tmp_path / "whole" / "evaluation.jsonl").read_text()
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "checkpoints" / "0000008.pt").unlink()
    codes, printed = run("parts", *scored, *evaluated)
    assert codes == [0] and "resuming from step 6" in printed
    kills.assert_same_training(tmp_path / "whole", tmp_path / "parts")
    # Another column is other features
    np.save(tmp_path / "ones.npy", np.ones(10))
    add_column(tmp_path / "features", "score", tmp_path / "ones.npy")
    codes, printed = run("parts", *scored, *evaluated)
    assert codes == [2] and "holds other features than" in printed

    checkpoint = tmp_path / "whole" / "checkpoints" / "0000008.pt"
    weights = load_checkpoint(checkpoint)["ema"]
    for name in ("score_embedder.embedder.mlp.2.weight", "clip_embedder.mlp.0.weight"):
        trained = weights[f"conditioner.{name}"]
        assert trained.isfinite().all() and trained.std() > 0
    argv = ["--ckpt", str(checkpoint), "--num-sampling-steps", "3", "--cfg-scale", "1.5"]
    one = np.arange(3, dtype=np.float32)
    np.save(tmp_path / "one.npy", one)
    told = [
        "--condition",
        "score=0.7",
        "--condition",
        f"clip={tmp_path / 'one.npy'}",
        "--condition",
        "word=abc",
    ]
    sample.main([*argv, *told, "--classes", "0", "1", "--output", str(tmp_path / "out")])
    conditions = json.loads((tmp_path / "out" / "summary.json").read_text())["options"]["conditions"]
    assert conditions["score"] == 0.7 and conditions["clip"].startswith("float32 (3,), SHA-256 ")

    # A row per sample, in any batches
    rows = np.stack([one, -one, one])
    np.save(tmp_path / "rows.npy", rows)
    many = [*argv, "--num-fid-samples", "3", "--output-dir", str(tmp_path / "many"), "--labels", "balanced"]
    many += ["--per-proc-batch-size", "2", "--condition", f"clip={tmp_path / 'rows.npy'}"]
    sample_ddp.main(many)
    whole = load_trained(checkpoint)
    options = SamplingOptions(cfg_scale=1.5, num_sampling_steps=3, conditions={"clip": rows})
    alone = generate_images(whole, [0, 1, 2], options)
    for index, image in enumerate(alone):
        drawn = np.asarray(Image.open(tmp_path / "many" / f"{index:06d}.png")).astype(int)
        assert np.abs(drawn - image.permute(1, 2, 0).numpy()).max() <= 1
    np.save(tmp_path / "rows.npy", -rows)
    with pytest.raises(UserError, match="holds samples of another conditions"):
        sample_ddp.main(many)
    np.save(tmp_path / "rows.npy", rows[:2])
    with pytest.raises(UserError, match="--condition clip: has 2 rows for 3 samples; give one value, or"):
        sample_ddp.main(many)
    few = [*argv, *many[-2:], "--tflops-per-image", "1", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--condition clip: has 2 rows for 3 samples; give one value, or"):
        sample.main([*few, "--classes", "0", "1", "2"])

    # The pipeline takes them too, and the card names them
    pipe = DCDiTPipeline(whole)
    images = []
    for value in (one, -one):
        noise = torch.Generator().manual_seed(0)
        told = {"clip": value, "score": 0.5}
        output = pipe([0], guidance_scale=4.0, num_inference_steps=3, generator=noise, conditions=told)
        images.append(np.asarray(output.images[0]))
    assert not np.array_equal(*images)
    with pytest.raises(UserError, match="--condition clip: has 2 rows for 3 samples"):
        pipe([0, 1, 2], conditions={"clip": rows[:2]})
    card = hub.model_card(whole)
    assert (
        "`score` (scalar), `clip` (vector-3), `word` (word-2).\nThe script takes `--condition score=VA"
        in card
    )


def test_a_run_tells_its_own_samples_of_images_of_their_class(tiny_config, scored):
    config = load_config(tiny_config, scored)
    store = open_fitting_features(config)
    labels = [2, 0, 2, 1, 2, 2, 2, 2]
    told = conditions_of_images(store, config, labels)
    assert {name: values.shape for name, values in told.items()} == {
        "score": (8,),
        "clip": (8, 3),
        "word": (8, 2),
    }
    images = [int(np.flatnonzero(store.column("score") == score)[0]) for score in told["score"]]
    assert store.labels[images].tolist() == labels and len(set(images)) > 3
    assert np.array_equal(told["clip"], store.column("clip")[images])
    # Also a model that was always told can draw them
    always = load_config(tiny_config, [*scored, "training.class_dropout_prob=0", "logging.sample_every=8"])
    check_grids(always, store)
    # A class without images takes any
    store.labels[store.labels == 1] = 0
    assert np.isfinite(conditions_of_images(store, config, [1])["score"]).all()


def test_the_demo_tells_all_samples(tiny_config, scored, tmp_path):
    trained = load_trained(save_random(load_config(tiny_config, scored), tmp_path))
    images = []
    for clip in (np.ones(3), -np.ones(3)):
        *_, drawn = SideBySide(trained, 3, "ddim", {"clip": clip}).draw(Choice(0, 0, 2.0, 0.5, 0.8))
        images.append(drawn.image)
    assert not np.array_equal(*images)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"conditions": {"size": 1.0}},
            "--condition size: the model was not trained with it; its .* score",
        ),
        ({"conditions": {"score": float("nan")}}, "--condition score=nan: must be a finite number"),
        (
            {"conditions": {"text": 0.5}},
            r"--condition text: has shape \(\); give a .npy file of shape \(2,\), or",
        ),
        (
            {"conditions": {"text": np.ones((1, 3))}},
            r"has shape \(1, 3\); .* or \(n, 2\) with a row per sample",
        ),
        ({"conditions": {"text": np.ones((0, 2))}}, r"has shape \(0, 2\)"),
        ({"conditions": {"text": [[0, 1], [2, math.inf]]}}, "--condition text: row 1 is not finite"),
        ({"conditions": {"text": ["a", "b"]}}, "--condition text: holds <U1; give numbers"),
        ({"conditions": {"score": 1.0}, "cfg_scale": 0}, "--condition: --cfg-scale 0 draws samples without"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        SamplingOptions(**options).check(model_config(score="scalar", text="vector-2"))


@pytest.mark.parametrize(
    "word, message",
    [
        ("score", "--condition score: must have the form NAME=VALUE, such as score=0.7"),
        ("size=1", "--condition size: the model was not trained with it"),
        (
            "score=high",
            r"--condition score=high: cannot be read \(File.*\); give a number, or a .npy file with",
        ),
        (
            "text=1",
            r"--condition text=1: cannot be read \(File.*\); give a .npy file of shape \(2,\), or \(n, 2\)",
        ),
    ],
)
def test_words_that_do_not_fit_are_one_line(word, message):
    with pytest.raises(UserError, match=message) as raised:
        read_conditions([word], model_config(score="scalar", text="vector-2"))
    assert "\n" not in str(raised.value)


def test_a_kind_has_a_number_for_every_n():
    known = config_keys.kind_among(["mine-N-N", "text-NEW"])
    accepted = [kind for kind in ("mine-3-4", "mine-3-N", "mine-N-4", "text-NEW") if known.holds(kind)]
    assert accepted == ["mine-3-4", "text-NEW"]


def test_without_dropout_every_condition_is_needed():
    raw = to_dict(model_config(score="scalar"))
    config = config_from_dict(raw, ["training.class_dropout_prob=0"])
    with pytest.raises(UserError, match="--condition score: is missing, .* give --condition score=VALUE"):
        SamplingOptions().check(config)
    SamplingOptions(conditions={"score": 0.5}).check(config)
    with pytest.raises(UserError, match="training.class_dropout_prob 1 would never show them"):
        config_from_dict(raw, ["training.class_dropout_prob=1"])
    with pytest.raises(UserError, match="'Score' is no name of a column"):
        config_from_dict(raw, ["data.conditions={Score: scalar}"])
    for kind in ("text", "vector", "vector-N", "vector-0", "vector-3-4", "scalar-3"):
        with pytest.raises(
            UserError, match="must be one of scalar, vector-N, with a number for N; name the module"
        ):
            config_from_dict(raw, [f"data.conditions={{score: {kind}}}"])


def test_a_column_must_have_the_shape_of_its_condition(tiny_config, scored, tmp_path, capsys):
    config = load_config(tiny_config, scored)
    np.save(tmp_path / "vectors.npy", np.zeros((10, 5)))
    add_column(tmp_path / "features", "score", tmp_path / "vectors.npy")
    message = r"data.conditions: score is a scalar of shape \(\), but its column holds \(5,\) per image"
    with pytest.raises(UserError, match=message):
        open_fitting_features(config)
    np.save(tmp_path / "sizes.npy", np.arange(10) * 100)
    add_column(tmp_path / "features", "score", tmp_path / "sizes.npy")
    capsys.readouterr()
    open_fitting_features(config)
    assert "warning: data.conditions: score goes from 0 to 900" in capsys.readouterr().out
    np.save(tmp_path / "clip.npy", np.random.default_rng(0).normal(size=(10, 3)) * 0.03)
    add_column(tmp_path / "features", "clip", tmp_path / "clip.npy")
    open_fitting_features(config)
    printed = capsys.readouterr().out
    assert "the numbers of clip have a deviation of 0.024" in printed and "numbers of word" not in printed


class Words:
    """Stands in for CLIP's tokenizer and text encoder: 768 numbers that depend on the text alone."""

    @classmethod
    def from_pretrained(cls, name):
        return cls()

    def eval(self):
        return self

    def __call__(self, texts=None, codes=None, **options):
        if codes is None:
            return {"codes": torch.tensor([sum(text.encode()) for text in texts])}
        return SimpleNamespace(text_embeds=torch.sin(codes[:, None] * torch.arange(1.0, 769.0)))


def test_captions_become_a_column_and_a_condition(tiny_config, tmp_path, monkeypatch):
    stand_in = SimpleNamespace(CLIPTokenizer=Words, CLIPTextModelWithProjection=Words)
    monkeypatch.setitem(sys.modules, "transformers", stand_in)
    captions = importlib.import_module("examples.captions")
    features = shutil.copytree(load_config(tiny_config).data.feature_path, tmp_path / "features")
    store = open_features(features, 32)
    texts = [f"picture {index} of {name}" for index, name in enumerate(store.file_names)]
    for name, text in zip(store.file_names[:-1], texts):
        file = (tmp_path / name).with_suffix(".txt")
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{text}\n")
    last = Path(store.file_names[-1]).with_suffix(".txt")
    with pytest.raises(UserError, match=f"captions '.*': has no {last}; write one for every image"):
        captions.main([str(features), str(tmp_path)])
    (tmp_path / last).write_text(texts[-1])
    captions.main([str(features), str(tmp_path)])

    config = load_config(
        tiny_config, [f"data.feature_path={features}", "data.conditions.caption=caption-768"]
    )
    column = open_fitting_features(config).column("caption")
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    for words, rows in ((texts[3], column[3:4]), (tmp_path / "prompts.txt", column)):
        told = read_conditions([f"caption={words}"], config)
        assert np.array_equal(told["caption"], rows)
        SamplingOptions(conditions=told).check(config)
    assert np.square(column).mean() == pytest.approx(1)
    with pytest.raises(UserError, match=r"caption=no.txt: cannot be read \(FileNotFoundError.* 'no.txt'\)$"):
        read_conditions(["caption=no.txt"], config)
