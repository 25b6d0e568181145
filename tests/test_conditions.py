"""Conditions beside the class: what the network makes of them, and that they train, resume and sample."""

import json
import shutil
from types import SimpleNamespace

import kills
import numpy as np
import pytest
import torch
from test_cuda_graph import BATCH, SIDE, inputs, tapes  # noqa: F401 - a fixture

import sample
import sample_ddp
from config import UserError, config_from_dict, load_config, to_dict
from data.columns import add_column
from models import build_model, reference
from sampling.cuda_graph import GraphedDenoiser
from sampling.denoising import guided_denoiser
from sampling.load import load_trained
from sampling.options import SamplingOptions
from sampling.pipeline import DCDiTPipeline
from training.checks import open_fitting_features
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
@torch.inference_mode()
def test_a_value_changes_its_own_sample_alone(patch):
    model = make_model(patch, score="scalar")
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
    from sampling.budgets import ALL, Budget

    config = model_config(score="scalar")
    x, t, labels = inputs(0)
    calls = []

    def network(x, t, **conditioning):
        calls.append(conditioning)
        return torch.zeros(len(x), 8, SIDE, SIDE)

    options = SamplingOptions(
        cfg_scale=2.0, conditions={"score": 0.7}, uncond=Budget.tokens(9) if lite else None
    )
    guided_denoiser(network, config, labels, options, {})(x, t)
    scores = [call["conditions"]["score"] for call in calls]
    assert len(calls) == 1 + lite
    scores = torch.cat(scores)
    assert scores[:BATCH].tolist() == pytest.approx([0.7] * BATCH)
    assert scores[BATCH:].isnan().all()
    # Without guidance there is one branch: told at scale 1, untold at 0
    for scale, is_told in ((1.0, True), (0.0, False)):
        options = SamplingOptions(cfg_scale=scale, conditions={"score": 0.7} if scale else None, budget=ALL)
        guided_denoiser(network, config, labels, options, {})(x, t)
        assert calls[-1]["conditions"]["score"].isfinite().all() == is_told


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


@pytest.fixture
def scored(tiny_config, tmp_path):
    """Overrides for features with a score of each image."""
    folder = load_config(tiny_config).data.feature_path
    shutil.copytree(folder, tmp_path / "features")
    np.save(tmp_path / "scores.npy", np.linspace(0, 1, 10))
    add_column(tmp_path / "features", "score", tmp_path / "scores.npy")
    return [f"data.feature_path={tmp_path / 'features'}", "data.conditions={score: scalar}"]


def test_trains_resumes_and_samples(run, scored, tmp_path, capsys):
    assert run("whole", *scored, "logging.sample_every=8")[0] == [0]
    assert (tmp_path / "whole" / "samples" / "0000008.png").is_file()
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "checkpoints" / "0000008.pt").unlink()
    codes, printed = run("parts", *scored, "logging.sample_every=8")
    assert codes == [0] and "resuming from step 6" in printed
    kills.assert_same_training(tmp_path / "whole", tmp_path / "parts")
    # Another column is other features
    np.save(tmp_path / "ones.npy", np.ones(10))
    add_column(tmp_path / "features", "score", tmp_path / "ones.npy")
    codes, printed = run("parts", *scored, "logging.sample_every=8")
    assert codes == [2] and "holds other features than" in printed

    checkpoint = tmp_path / "whole" / "checkpoints" / "0000008.pt"
    weights = load_checkpoint(checkpoint)["ema"]
    trained = weights["conditioner.score_embedder.embedder.mlp.2.weight"]
    assert trained.isfinite().all() and trained.std() > 0
    argv = ["--ckpt", str(checkpoint), "--num-sampling-steps", "3", "--cfg-scale", "1.5"]
    sample.main([*argv, "--classes", "0", "1", "--condition", "score=0.7", "--output", str(tmp_path / "out")])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["options"]["conditions"] == {"score": 0.7}
    many = [*argv, "--num-fid-samples", "3", "--output-dir", str(tmp_path / "many")]
    sample_ddp.main([*many, "--condition", "score=0.7", "--lite-cfg", "--uncond-token-budget", "9"])
    assert len(list((tmp_path / "many").glob("*.png"))) == 3
    with pytest.raises(UserError, match="holds samples of another conditions"):
        sample_ddp.main([*many, "--condition", "score=0.6", "--lite-cfg", "--uncond-token-budget", "9"])
    with pytest.raises(UserError, match="the pipeline gives the model no score; draw samples with sample.py"):
        DCDiTPipeline(load_trained(checkpoint))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"conditions": {"size": 1.0}},
            "--condition size: the model was not trained with it; its .* score",
        ),
        ({"conditions": {"score": float("nan")}}, "--condition score=nan: must be a finite number"),
        ({"conditions": {"score": 1.0}, "cfg_scale": 0}, "--condition: --cfg-scale 0 draws samples without"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        SamplingOptions(**options).check(model_config(score="scalar"))


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
    with pytest.raises(UserError, match="must be one of scalar; name the module that adds another"):
        config_from_dict(raw, ["data.conditions={score: text}"])


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
