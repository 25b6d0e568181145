"""A DC-DiT out of a static DiT: what is copied, what the first outputs are, and what a run does with frozen parameters."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from config import UserError, config_from_dict, load_config
from models import build_model
from models.embeddings import sincos_positions
from training.optimizer import parameter_groups
from weights.checkpoint import list_checkpoints, load_checkpoint
from weights.upcycle import embed_in_3x3, upcycle

WIDTH, SIDE = 64, 8


def build(factor=None, **model):
    hnet = {
        "arch_layout": ["c2", ["D2"], "c1"],
        "d_model": [WIDTH] * 2,
        "num_heads": [4, 4],
        "enc_dec_dim_factor": [factor, None],
    }
    raw = {
        "model": {"hnet": hnet, **model},
        "data": {"image_size": SIDE, "latent_stride": 1, "num_classes": 5},
    }
    return build_model(config_from_dict(raw))


def perturbed_dit(patch=2):
    model = build(patch_size=patch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs():
    return torch.randn(4, 4, SIDE, SIDE), torch.tensor([0, 10, 500, 999]), torch.arange(4)


def test_every_tensor_is_accounted_for():
    dit, model = perturbed_dit(), build()
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = upcycle(dit, model, "dit", "balanced", 4.0)
    ours, theirs = model.state_dict(), dit.state_dict()
    assert report.keys() == ours.keys()
    copied = {name for name, way in report.items() if way == "copied"}
    assert all(torch.equal(ours[name], theirs[name]) for name in copied)
    assert all(name in copied for name in ours if name.startswith(("blocks.", "t_embedder.", "y_embedder.")))
    untouched = {name for name, way in report.items() if way == "new"}
    assert (
        all(torch.equal(ours[name], fresh[name]) for name in untouched)
        and "residual_proj.weight" in untouched
    )
    assert all(
        not torch.equal(ours[name], fresh[name])
        for name in ours.keys() - untouched - copied
        if "conv2.bias" not in name
    )


@pytest.mark.parametrize("factor", [None, 2], ids=["as wide", "narrow encoder"])
def test_features_are_the_embeddings_of_patches(factor):
    """At every cell that starts a patch of the DiT, but for the length that RMSNorm fixes; so is the position."""
    dit, model = perturbed_dit(), build(factor)
    upcycle(dit, model, "dit", "balanced", 4.0)
    x, t, labels = inputs()
    with torch.no_grad():
        c = model.t_embedder(t) + model.y_embedder(labels)
        features = model.encoder(model.x_embedder(x), c)[:, :, ::2, ::2]
        patches = dit.x_embedder(x)
    torch.testing.assert_close(
        F.normalize(features, dim=1), F.normalize(patches, dim=1), atol=1e-4, rtol=1e-4
    )
    noise_length = dit.x_embedder(torch.randn(200, 4, SIDE, SIDE)).square().mean().sqrt()
    assert features.square().mean().sqrt().item() == pytest.approx(noise_length.item(), rel=0.05)
    lattice = model.pos_embed.view(SIDE, SIDE, -1)[::2, ::2].flatten(0, 1)
    torch.testing.assert_close(lattice, dit.pos_embed, atol=1e-5, rtol=1e-5)


def test_the_first_output_is_the_mean_of_the_dits():
    """Where the blocks give the same tokens: here they are skipped, and every cell is kept."""
    dit, model = perturbed_dit(), build()
    upcycle(dit, model, "dit", "balanced", 4.0)
    torch.nn.init.zeros_(model.router.residual_scorer[-1].weight)
    torch.nn.init.constant_(model.router.residual_scorer[-1].bias, 20.0)
    x, t, labels = inputs()
    for network in (dit, model):
        network.pos_embed.zero_()
        for block in network.blocks:
            block.adaLN_modulation[1].weight.data.zero_()
            block.adaLN_modulation[1].bias.data.zero_()
    with torch.no_grad():
        ours = model(x, t, labels).prediction[:, :, ::2, ::2]
        theirs = F.avg_pool2d(dit(x, t, labels).prediction, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    assert theirs.std() > 0.1


@pytest.mark.parametrize("factor", [2.0, 4.0, 16.0])
def test_the_balanced_router_keeps_one_in_n(factor):
    model = build()
    upcycle(perturbed_dit(), model, "dit", "balanced", factor)
    x = torch.cat(
        [torch.randn(32, 4, SIDE, SIDE), 5 * torch.rand(32, 4, 1, 1) + torch.randn(32, 4, SIDE, SIDE)]
    )
    kept = model(x, torch.arange(64) * 15, torch.arange(64) % 5).routing.boundary[:, 1:-1].float().mean()
    assert 0.5 / factor < kept < 1.8 / factor


def test_a_fresh_scaffold_is_left_alone():
    dit, model = perturbed_dit(), build()
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = upcycle(dit, model, "fresh", "fresh", 4.0)
    assert all(
        torch.equal(model.state_dict()[name], fresh[name]) for name, way in report.items() if way == "new"
    )
    assert {
        way.split(":")[0]
        for name, way in report.items()
        if name.startswith(("x_emb", "final", "enc", "router"))
    } == {"new"}
    centre = model.pos_embed.view(SIDE, SIDE, -1)
    torch.testing.assert_close(
        centre[2, 4], sincos_positions(WIDTH, 100, 0.25).view(100, 100, -1)[3, 7]
    )  # (2 - 0.5) / 2, ...


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_patch_kernels_in_three_by_three(patch):
    kernel = torch.rand(6, 4, patch, patch)
    out = embed_in_3x3(kernel)
    assert out.shape == (6, 4, 3, 3)
    torch.testing.assert_close(out.sum((2, 3)), kernel.sum((2, 3)), rtol=0.15, atol=0)


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def dit_run(tiny_config, tmp_path_factory) -> Path:
    """Checkpoint of a short run of a static DiT."""
    folder = tmp_path_factory.mktemp("dit")
    changes = ["--set", "model.patch_size=2", "--set", "training.max_steps=3"]
    train.main(["--config", str(tiny_config), "--output", str(folder), *changes])
    return list_checkpoints(folder / "checkpoints")[-1]


def start(tiny_config, folder, *changes) -> dict:
    train.main(
        ["--config", str(tiny_config), "--output", str(folder), *(w for c in changes for w in ("--set", c))]
    )
    return load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])


def test_frozen_parameters_wait(dit_run, tiny_config, tmp_path, capsys):
    """Two steps frozen, then they move; the same run in two pieces is the same run."""
    source = load_checkpoint(dit_run)["ema"]
    options = [
        f"training.init_from={dit_run}",
        "training.frozen=[blocks, y_embedder]",
        "training.frozen_steps=2",
    ]
    state = start(tiny_config, tmp_path / "a", *options, "training.max_steps=2")
    frozen = [
        name
        for name, _ in build_model(load_config(tiny_config)).named_parameters()
        if name.startswith(("blocks", "y_emb"))
    ]
    assert frozen and all(torch.equal(state["model"][name], source[name]) for name in frozen)
    assert not torch.equal(state["model"]["t_embedder.mlp.0.weight"], source["t_embedder.mlp.0.weight"])
    assert "tensors copied" in capsys.readouterr().out
    lines = (tmp_path / "a" / "init_report.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == list(state["model"]) and "copied" in lines[-1] + lines[5]

    on = start(tiny_config, tmp_path / "a", *options, "training.max_steps=4")
    assert all(
        not torch.equal(on["model"][name], source[name])
        for name in ("blocks.0.attn.qkv.weight", "y_embedder.table.weight")
    )
    whole = start(tiny_config, tmp_path / "b", *options, "training.max_steps=4")
    assert all(torch.equal(whole["model"][name], tensor) for name, tensor in on["model"].items())


def test_learning_rate_factors(dit_run, tiny_config, tmp_path):
    """The first step of AdamW is proportional to the learning rate."""
    source = load_checkpoint(dit_run)["ema"]
    options = [f"training.init_from={dit_run}", "training.max_steps=1", "training.lr_warmup_steps=0"]
    moved = []
    for number, factors in enumerate(("{}", "{blocks.0.attn: 0.1}")):
        state = start(tiny_config, tmp_path / str(number), *options, f"training.lr_scales={factors}")
        names = ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
        moved.append([(state["model"][name] - source[name]).abs().max().item() for name in names])
    assert moved[0][0] > 1e-5 and moved[1] == pytest.approx([0.1 * moved[0][0], moved[0][1]], rel=1e-3)
    rows = (tmp_path / "1" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["learning_rate"] == 1e-3


def test_groups_keep_the_order_of_parameters():
    """Without factors there is one group, as in every checkpoint of a run without them."""
    model = build()
    (group,) = parameter_groups(model, {})
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]


def test_the_same_network_is_taken_over(dit_run, tiny_config, tmp_path):
    state = start(
        tiny_config, tmp_path, f"training.init_from={dit_run}", "model.patch_size=2", "training.max_steps=1"
    )
    report = (tmp_path / "init_report.txt").read_text()
    assert all(line.endswith("copied") for line in report.splitlines()) and len(report.splitlines()) == len(
        state["model"]
    )


MISTAKES = [
    (
        ["training.init_from={dit}", "model.mlp_ratio=2"],
        "is a DiT with a different model.mlp_ratio; make them equal",
    ),
    (
        ["training.init_from={dit}", "model.hnet.arch_layout=[c1,[D2],c1]"],
        "is a DiT with a different model.hnet.arch_layout",
    ),
    (
        ["training.init_from={dit}", "model.patch_size=4"],
        "holds another network than the configuration describes",
    ),
    (["training.init_from=nowhere.pt"], "training.init_from 'nowhere.pt' does not exist"),
    (
        ["training.init_from={dit}", "training.resume_from_ckpt={dit}"],
        "already starts from training.resume_from_ckpt",
    ),
    (
        ["training.frozen=[block.]"],
        "training.frozen: no parameter's name begins with 'block.'; they begin with blocks, decoder",
    ),
    (["training.lr_scales={head: 2}"], "training.lr_scales: no parameter's name begins with 'head'"),
    (["training.lr_scales={blocks: 0}"], "training.lr_scales.blocks: 0.0 must be greater than 0"),
    (["training.lr_scales=[1]"], "training.lr_scales: [1] is not 'name: value' pairs with a finite number"),
    (
        ["training.resume_from_ckpt={dit}", "model.patch_size=2", "training.lr_scales={blocks: 0.5}"],
        "differs from the {} of",
    ),
    (["model.upcycle.scaffold=old"], "model.upcycle.scaffold: 'old' is not one of dit, fresh"),
]


@pytest.mark.parametrize("changes, part", MISTAKES, ids=[part for _, part in MISTAKES])
def test_mistakes(dit_run, tiny_config, tmp_path, changes, part):
    words = [word for change in changes for word in ("--set", change.replace("{dit}", str(dit_run)))]
    with pytest.raises(UserError) as caught:
        train.main(["--config", str(tiny_config), "--output", str(tmp_path / "run"), *words])
    assert part in str(caught.value) and not (tmp_path / "run").exists()
