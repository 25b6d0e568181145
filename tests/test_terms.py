"""Terms of the loss: the alignment by its formula, its weights in training and after it, and wrong settings."""

import json
import shutil

import kills
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sample
from config import UserError, config_from_dict, load_config, to_dict
from data.columns import add_column
from data.features import open_features
from models import build_model
from training.batches import Batch
from training.losses import Terms
from weights.checkpoint import load_checkpoint, save_weights

TOKENS, WIDTH = 16, 5  # of the column of `with_tokens`
ALIGN = "training.terms.align={weight: 0.5, block: 0, column: dino, hidden: 8}"


@pytest.fixture
def aligned(tiny_config, with_tokens):
    """A configuration with the alignment, its features and its terms."""
    config = load_config(tiny_config, [with_tokens, ALIGN])
    store = open_features(config.data.feature_path, 32, config.columns)
    return config, store, Terms(config, store)


def evaluate(config, terms, batch_size=3):
    """What the network returns for a random batch, the batch, and the terms of both."""
    side = config.latent_grid.rows
    x = torch.randn(batch_size, 4, side, side)
    t, labels = torch.tensor([5, 500, 900]), torch.tensor([0, 1, 2])
    columns = {"dino": torch.randn(batch_size, TOKENS, WIDTH).half()}
    batch = Batch(x, x, t, labels, labels, columns)
    model = build_model(config)
    output = model(x, t, labels, hidden=terms.blocks)
    return output, batch, terms(output, batch, 0)


def test_alignment_by_its_formula(aligned):
    config, _, terms = aligned
    output, batch, values = evaluate(config, terms)
    assert list(values) == ["ratio", "align"]
    assert (values["ratio"].weight, values["align"].weight) == (0.03, 0.5)
    align = terms.modules["align"]
    side, hidden = config.latent_grid.rows, output.hidden[0]
    for row in range(3):
        # Tokens of 4 x 4 at the centres of 8 x 8 cells
        tokens = batch.columns["dino"][row].float().view(4, 4, WIDTH).permute(2, 0, 1)
        cells = F.interpolate(tokens[None], (side, side), mode="bilinear")[0].flatten(1).T
        kept = output.routing.keep[row].nonzero().flatten()
        own = align.projection(hidden[output.packing.sample == row])
        similarity = F.cosine_similarity(own, cells[kept], dim=1)
        torch.testing.assert_close(values["align"].value[row], -similarity.mean())
    values["align"].value.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in align.parameters())


def test_a_static_dit_is_aligned_on_its_patches(aligned):
    config, store, _ = aligned
    static = config_from_dict(to_dict(config), ["model.patch_size=2"])
    terms = Terms(static, store)
    output, batch, values = evaluate(static, terms)
    assert list(values) == ["align"]
    projected = terms.modules["align"].projection(output.hidden[0]).unflatten(0, (3, TOKENS))
    tokens = batch.columns["dino"].float()
    expected = -F.cosine_similarity(projected, tokens, dim=2).mean(1)
    torch.testing.assert_close(values["align"].value, expected)


def test_trains_resumes_and_exports(run, with_tokens, tmp_path):
    assert run("whole", with_tokens, ALIGN)[0] == [0]
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "checkpoints" / "0000008.pt").unlink()
    codes, printed = run("parts", with_tokens, ALIGN)
    assert codes == [0] and "resuming from step 6" in printed
    kills.assert_same_training(tmp_path / "whole", tmp_path / "parts")
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        whole = row["diffusion_loss"] + 0.03 * row["ratio_loss"] + 0.5 * row["align_loss"]
        assert row["loss"] == pytest.approx(whole)
    assert rows[-1]["align_loss"] < rows[0]["align_loss"]

    # The weights are in the checkpoint, and in nothing that is sampled
    checkpoint = tmp_path / "whole" / "checkpoints" / "0000008.pt"
    state, earlier = load_checkpoint(checkpoint), load_checkpoint(checkpoint.with_name("0000006.pt"))
    assert set(state["terms"]) == {
        f"align.projection.{n}.{kind}" for n in (0, 2, 4) for kind in ("weight", "bias")
    }
    for name, value in state["terms"].items():
        assert not torch.equal(value, earlier["terms"][name])
    network = build_model(config_from_dict(state["config"])).state_dict()
    assert state["ema"].keys() == state["model"].keys() == network.keys()
    save_weights(tmp_path / "exported.safetensors", state)
    assert load_checkpoint(tmp_path / "exported.safetensors")["ema"].keys() == state["ema"].keys()
    argv = [
        "--ckpt",
        tmp_path / "exported.safetensors",
        "--num-sampling-steps",
        "2",
        "--output",
        tmp_path / "out",
    ]
    sample.main([str(word) for word in argv])

    # A run without the term cannot take the optimizer
    change = f"training.resume_from_ckpt={checkpoint}"
    codes, printed = run("next", with_tokens, change, "training.max_steps=9")
    assert codes == [2] and "training.terms: {} differs from the {align: " in printed
    # Another weight in the loss makes no difference to it
    codes, printed = run("next", with_tokens, ALIGN.replace("0.5", "0.1"), change, "training.max_steps=9")
    assert codes == [0] and "resuming from step 8" in printed


def test_processes_share_the_gradients_of_a_term(run, with_tokens, tmp_path):
    changes = [with_tokens, ALIGN, "training.max_steps=3"]
    assert run("one", *changes)[0] == [0]
    assert run("two", *changes, plans=(None, None))[0] == [0, 0]
    states = [load_checkpoint(tmp_path / name / "checkpoints" / "0000003.pt") for name in ("one", "two")]
    for name, value in states[0]["terms"].items():
        torch.testing.assert_close(states[1]["terms"][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ("training.terms.aling={weight: 1}", "training.terms: 'aling' is not one of align.*; see --import"),
        (
            "training.terms.ratio={weight: 1}",
            "'ratio' is not one of align.*; its weight is training.ratio_loss",
        ),
        (
            "training.terms.align.block=1",
            "training.terms.align.block: 1 is no block of the network; use 0 to 0",
        ),
        ("training.terms.align.blok=1", "unknown key 'training.terms.align.blok'; did you mean"),
        ("training.terms.align.block=x", "training.terms.align.block: 'x' is not a whole number"),
        ("training.terms.align.weight=-1", "training.terms.align.weight: -1.0 must be at least 0"),
        (
            "training.terms.align.column=clip",
            "has no column clip .it has dino.; add it with python -m data.columns",
        ),
        (
            "training.terms={align: {block: 0, column: dino}}",
            "training.terms.align.weight: is missing; give it",
        ),
        (
            "training.terms={align: {weight: 1, column: dino}}",
            "training.terms.align.block: is missing; give it",
        ),
    ],
)
def test_settings_that_do_not_fit_are_one_line(tiny_config, with_tokens, change, message):
    with pytest.raises(UserError, match=message):
        # A mapping is merged with an earlier one
        earlier = [] if "={align: " in change else [ALIGN]
        config = load_config(tiny_config, [with_tokens, *earlier, change])
        Terms(config, open_features(config.data.feature_path, 32, config.columns))


def test_a_term_without_a_weight_is_left_out(tiny_config, with_tokens):
    config = load_config(tiny_config, [with_tokens, ALIGN, "training.terms.align.weight=0"])
    assert config.columns == []
    assert list(Terms(config, open_features(config.data.feature_path, 32)).modules) == ["ratio"]


def test_a_column_must_hold_a_grid_of_tokens(tiny_config, with_tokens, tmp_path):
    config = load_config(tiny_config, [with_tokens, ALIGN])
    np.save(tmp_path / "odd.npy", np.zeros((10, 17, WIDTH)))
    add_column(tmp_path / "features", "dino", tmp_path / "odd.npy")
    with pytest.raises(
        UserError, match=r"dino holds \(17, 5\) per image, not the tokens of a grid over the image"
    ):
        Terms(config, open_features(config.data.feature_path, 32, config.columns))
