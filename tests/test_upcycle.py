"""A DC-DiT from a static DiT: what is copied, what the first outputs are, and runs with frozen parameters."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from config import UserError, config_from_dict, load_config
from grid import Grid
from models import build_model
from models.embeddings import sincos_positions
from training.optimizer import is_part, parameter_groups
from weights import convert
from weights.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from weights.upcycle import check_shared, embed_in_3x3, initial_state, match_labels, upcycle

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


def copy_weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_every_tensor_is_accounted_for():
    dit = perturbed_dit()
    model = build()
    fresh = copy_weights(model)
    origins = upcycle(dit, model, "dit", "balanced", 4.0)
    weights = model.state_dict()
    assert origins.keys() == weights.keys()
    assert origins["residual_proj.weight"] == "new"
    for name, origin in origins.items():
        if origin == "copied":
            assert torch.equal(weights[name], dit.state_dict()[name]), name
        elif origin == "new":
            assert torch.equal(weights[name], fresh[name]), name
        elif "conv2.bias" not in name:  # these start at zero anyway
            assert not torch.equal(weights[name], fresh[name]), name
        if name.startswith(("blocks.", "t_embedder.", "y_embedder.")):
            assert origin == "copied", name


@pytest.mark.parametrize("factor", [None, 2], ids=["as wide", "narrow encoder"])
def test_features_are_the_embeddings_of_patches(factor):
    """At every cell that starts a patch of the DiT, up to the length from RMSNorm; so is the position."""
    dit = perturbed_dit()
    model = build(factor)
    upcycle(dit, model, "dit", "balanced", 4.0)
    x, t, labels = inputs()
    with torch.no_grad():
        c = model.t_embedder(t) + model.y_embedder(labels)
        features = model.encoder(model.x_embedder(x), c)[:, :, ::2, ::2]
        patches = dit.x_embedder(x)
        noise_patches = dit.x_embedder(torch.randn(200, 4, SIDE, SIDE))
    directions = F.normalize(features, dim=1)
    torch.testing.assert_close(directions, F.normalize(patches, dim=1), atol=1e-4, rtol=1e-4)
    assert root_mean_square(features) == pytest.approx(root_mean_square(noise_patches), rel=0.05)
    positions = model.pos_embed.view(SIDE, SIDE, -1)[::2, ::2].flatten(0, 1)
    torch.testing.assert_close(positions, dit.pos_embed, atol=1e-5, rtol=1e-5)


def root_mean_square(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def test_the_first_output_is_the_mean_of_the_dits():
    """Where the blocks give the same tokens: here they are skipped, and every cell is kept."""
    dit = perturbed_dit()
    model = build()
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
        found = model(x, t, labels).prediction[:, :, ::2, ::2]
        expected = F.avg_pool2d(dit(x, t, labels).prediction, 2)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert expected.std() > 0.1


@pytest.mark.parametrize("factor", [2.0, 4.0, 16.0])
def test_the_balanced_router_keeps_one_in_n(factor):
    model = build()
    upcycle(perturbed_dit(), model, "dit", "balanced", factor)
    noise = torch.randn(32, 4, SIDE, SIDE)
    shifted_noise = 5 * torch.rand(32, 4, 1, 1) + torch.randn(32, 4, SIDE, SIDE)
    number = torch.arange(64)
    out = model(torch.cat([noise, shifted_noise]), number * 15, number % 5)
    kept = out.routing.boundary[:, 1:-1].float().mean()
    assert 0.5 / factor < kept < 1.8 / factor


def test_a_fresh_scaffold_is_left_alone():
    model = build()
    fresh = copy_weights(model)
    origins = upcycle(perturbed_dit(), model, "fresh", "fresh", 4.0)
    for name, origin in origins.items():
        if name.startswith(("x_embedder", "encoder", "router", "final_layer")):
            assert origin == "new", name
        if origin == "new":
            assert torch.equal(model.state_dict()[name], fresh[name]), name
    # A cell's position is relative to the centre of its patch: (2 - 0.5) / 2 and (4 - 0.5) / 2
    positions = model.pos_embed.view(SIDE, SIDE, -1)
    quarter_steps = sincos_positions(WIDTH, Grid(100, 100), 0.25).view(100, 100, -1)
    torch.testing.assert_close(positions[2, 4], quarter_steps[3, 7])


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_patch_kernels_in_three_by_three(patch):
    kernel = torch.rand(6, 4, patch, patch)
    out = embed_in_3x3(kernel)
    assert out.shape == (6, 4, 3, 3)
    torch.testing.assert_close(out.sum((2, 3)), kernel.sum((2, 3)), rtol=0.15, atol=0)


# ------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def dit_run(tiny_config, tmp_path_factory) -> Path:
    """Checkpoint of a short run of a static DiT."""
    folder = tmp_path_factory.mktemp("dit")
    changes = ["--set", "model.patch_size=2", "--set", "training.max_steps=3"]
    train.main(["--config", str(tiny_config), "--output", str(folder), *changes])
    return list_checkpoints(folder / "checkpoints")[-1]


def start(tiny_config, folder, *changes) -> dict:
    """Train with these changes of the configuration; the last checkpoint."""
    words = [word for change in changes for word in ("--set", change)]
    train.main(["--config", str(tiny_config), "--output", str(folder), *words])
    return load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])


def test_frozen_parameters_wait(dit_run, tiny_config, tmp_path, capsys):
    """Two steps frozen, then they move; the same run in two pieces is the same run."""
    source = load_checkpoint(dit_run)["ema"]
    options = [
        f"training.init_from={dit_run}",
        "training.frozen=[blocks, y_embedder]",
        "training.frozen_steps=2",
    ]
    # Two steps
    early = start(tiny_config, tmp_path / "a", *options, "training.max_steps=2")["model"]
    parameters = dict(build_model(load_config(tiny_config)).named_parameters())
    frozen = [name for name in parameters if name.startswith(("blocks", "y_embedder"))]
    assert frozen
    for name in frozen:
        assert torch.equal(early[name], source[name]), name
    assert not torch.equal(early["t_embedder.mlp.0.weight"], source["t_embedder.mlp.0.weight"])
    # The report
    assert "tensors copied" in capsys.readouterr().out
    lines = (tmp_path / "a" / "init_report.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == list(early)
    assert any(line.endswith(" copied") for line in lines)
    # Two more steps, and the same in one piece
    late = start(tiny_config, tmp_path / "a", *options, "training.max_steps=4")["model"]
    for name in ("blocks.0.attn.qkv.weight", "y_embedder.table.weight"):
        assert not torch.equal(late[name], source[name]), name
    whole = start(tiny_config, tmp_path / "b", *options, "training.max_steps=4")["model"]
    for name, tensor in late.items():
        assert torch.equal(whole[name], tensor), name


def test_learning_rate_factors(dit_run, tiny_config, tmp_path):
    """The first step of AdamW is proportional to the learning rate."""
    source = load_checkpoint(dit_run)["ema"]
    options = [f"training.init_from={dit_run}", "training.max_steps=1", "training.lr_warmup_steps=0"]

    def moved(name: str, factors: str) -> list[float]:
        """How far the first step moves a scaled and an unscaled weight."""
        state = start(tiny_config, tmp_path / name, *options, f"training.lr_scales={factors}")
        names = ("blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
        return [(state["model"][name] - source[name]).abs().max().item() for name in names]

    attention, mlp = moved("equal", "{}")
    assert attention > 1e-5
    assert moved("scaled", "{blocks.0.attn: 0.1}") == pytest.approx([0.1 * attention, mlp], rel=1e-3)
    rows = (tmp_path / "scaled" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["learning_rate"] == 1e-3


def test_groups_keep_the_order_of_parameters():
    """Without factors there is one group, as in every checkpoint of a run without them."""
    model = build()
    (group,) = parameter_groups(model, {})
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]


def test_the_longest_entry_decides_in_any_order():
    model = build()
    for factors in ({"blocks": 0.5, "blocks.0": 0.1}, {"blocks.0": 0.1, "blocks": 0.5}):
        scales = {}
        for group in parameter_groups(model, factors):
            scales |= {id(parameter): group["lr_scale"] for parameter in group["params"]}
        for name, parameter in model.named_parameters():
            expected = 0.1 if name.startswith("blocks.0.") else 0.5 if name.startswith("blocks.") else 1.0
            assert scales[id(parameter)] == expected, name
    # blocks.1 is not blocks.10
    assert is_part("blocks.1.attn", "blocks.1") and is_part("blocks.1.attn", "blocks.1.")
    assert not is_part("blocks.10.attn", "blocks.1")


def test_weights_of_another_noise_schedule_are_a_warning(dit_run, tiny_config, capsys):
    options = [
        f"training.init_from={dit_run}",
        "model.patch_size=2",
        "diffusion.noise_schedule=squaredcos_cap_v2",
    ]
    initial_state(load_config(tiny_config, options))
    assert (
        "was trained with diffusion.noise_schedule linear, which is another here" in capsys.readouterr().out
    )


def test_an_ema_that_has_not_caught_up_is_said(dit_run, tiny_config, tmp_path, capsys):
    options = ["model.patch_size=2", "training.max_steps=2"]
    state = load_checkpoint(dit_run)
    state["config"]["training"]["ema_decay"] = 0.9999
    young = save_checkpoint(tmp_path / "young", state, keep=0)
    initial_state(load_config(tiny_config, [f"training.init_from={young}", *options]))
    assert "of the EMA weights is still what training started with" in capsys.readouterr().out
    # As the command that it names makes them, the trained weights are none
    trained = tmp_path / "trained.safetensors"
    convert.main([str(young), str(trained), "--weights", "model"])
    capsys.readouterr()
    first, _ = initial_state(load_config(tiny_config, [f"training.init_from={trained}", *options]))
    assert capsys.readouterr().out == ""
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(first["model"][name], state["model"][name])


def test_conditions_of_the_dit(tiny_config, capsys):
    """Equal names need equal kinds, and what the DC-DiT lacks is said."""
    config = load_config(tiny_config, ["data.conditions={caption: vector-8}"])
    for kind, is_right in (("vector-8", True), ("vector-16", False), ("scalar", False)):
        dit = load_config(tiny_config, ["model.patch_size=2", f"data.conditions={{caption: {kind}}}"])
        if is_right:
            check_shared(config, dit)
            continue
        with pytest.raises(UserError, match="is a DiT with a different data.conditions.caption"):
            check_shared(config, dit)
    assert capsys.readouterr().out == ""
    check_shared(load_config(tiny_config), dit)
    assert "the conditions caption of the DiT are left out" in capsys.readouterr().out


def test_the_same_network_is_copied(dit_run, tiny_config, tmp_path):
    options = [f"training.init_from={dit_run}", "model.patch_size=2", "training.max_steps=1"]
    state = start(tiny_config, tmp_path, *options)
    lines = (tmp_path / "init_report.txt").read_text().splitlines()
    assert len(lines) == len(state["model"])
    assert all(line.endswith(" copied") for line in lines)


@pytest.mark.parametrize("patch", ["2", "null"], ids=["DiT to DiT", "upcycled"])
def test_other_classes(dit_run, tiny_config, tmp_path, capsys, patch):
    """The table of labels is new, but for its last row; the rest is what the source has."""
    source = load_checkpoint(dit_run)["ema"]
    options = [f"training.init_from={dit_run}", f"model.patch_size={patch}", "data.num_classes=7"]
    config = load_config(tiny_config, options)
    first, origins = initial_state(config)
    table = first["model"]["y_embedder.table.weight"]
    torch.manual_seed(config.training.seed)
    fresh = build_model(config).state_dict()["y_embedder.table.weight"]
    assert torch.equal(table[:7], fresh[:7])
    assert torch.equal(table[7], source["y_embedder.table.weight"][3])
    for name, origin in origins.items():
        if origin == "copied":
            assert torch.equal(first["model"][name], source[name]), name
    # And as a command, which knows the names of the classes, and reports what it copies
    start(tiny_config, tmp_path, *options, "training.max_steps=1")
    parts = "by class name 3 rows copied, 4 initialised, null label copied"
    kept = f"new labels ((4, 32) there, (8, 32) here; {parts})"
    assert kept in capsys.readouterr().out
    assert f"y_embedder.table.weight {kept}" in " ".join((tmp_path / "init_report.txt").read_text().split())


def test_other_classes_between_dc_dits(whole_run, tiny_config):
    source = list_checkpoints(whole_run / "checkpoints")[-1]
    options = [f"training.init_from={source}", "data.num_classes=4"]
    first, origins = initial_state(load_config(tiny_config, options))
    expected = load_checkpoint(source)["ema"]
    assert origins.pop("y_embedder.table.weight").startswith("new labels")
    for name in origins:
        assert torch.equal(first["model"][name], expected[name]), name


# Names of the features, and the label of the checkpoint's classes a, b, c behind each row; None: initialised
NAMED = {
    "another order": (["c", "a", "b"], [2, 0, 1]),
    "another class": (["a", "x", "c"], [0, None, 2]),
    "one more": (["0", "a", "b", "c"], [None, 0, 1, 2]),
    "fewer, the rest unnamed": (["b"], [1, None, None, None]),
    "the same": (["a", "b", "c"], [0, 1, 2]),
    "only numbers": (["0", "1", "2"], [0, 1, 2]),
    "unknown": (None, [0, 1, 2]),
}


@pytest.mark.parametrize("case", NAMED)
def test_rows_of_labels_follow_the_names_of_classes(whole_run, tiny_config, case):
    names, sources = NAMED[case]
    path = list_checkpoints(whole_run / "checkpoints")[-1]
    config = load_config(tiny_config, [f"training.init_from={path}", f"data.num_classes={len(sources)}"])
    first, origins = initial_state(config, names)
    table = first["model"]["y_embedder.table.weight"]
    old = load_checkpoint(path)["ema"]["y_embedder.table.weight"]
    torch.manual_seed(config.training.seed)
    fresh = build_model(config).state_dict()["y_embedder.table.weight"]
    for label, source in enumerate(sources):
        expected = fresh[label] if source is None else old[source]
        assert torch.equal(table[label], expected), label
    assert torch.equal(table[-1], old[-1])
    copied = sum(source is not None for source in sources)
    report = f"by class name {copied} rows copied, {len(sources) - copied} initialised, null label copied"
    origin = origins["y_embedder.table.weight"]
    assert origin == "copied" if sources == [0, 1, 2] else report in origin


def test_labels_without_a_name_keep_their_rows():
    """1000 classes, of which the features name a few: the others are those of the source, by number."""
    config = config_from_dict({"data": {"num_classes": 6}})
    found = match_labels(config, ["b", "a", "d"], config, ["a", "b"])
    assert found.source_of == {0: 1, 1: 0, 3: 3, 4: 4, 5: 5}


@pytest.fixture
def reordered(tiny_config, tmp_path) -> Path:
    """A configuration whose features have the same images, with the names of two classes exchanged."""
    features = load_config(tiny_config).data.feature_path
    copy = shutil.copytree(features, tmp_path / "reordered")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["class_names"] = ["a", "c", "b"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "reordered.yaml").write_text(tiny_config.read_text().replace(features, str(copy)))
    return tmp_path / "reordered.yaml"


def test_a_run_never_continues_with_other_labels(whole_run, reordered, tmp_path, capsys):
    """Neither in its folder nor in a new one; the command that is printed starts a run with the right rows."""
    newest = list_checkpoints(whole_run / "checkpoints")[-1]
    words = ["--config", str(reordered), "--set", "training.max_steps=9"]
    with pytest.raises(
        UserError, match="label 1 is 'c' in the features and 'b' in '.*with training.init_from"
    ):
        train.main(
            [*words, "--set", f"training.resume_from_ckpt={newest}", "--output", str(tmp_path / "new")]
        )
    assert not (tmp_path / "new").exists()
    folder = shutil.copytree(whole_run, tmp_path / "run")
    with pytest.raises(UserError) as caught:
        train.main([*words, "--output", str(folder)])
    message, command, _ = str(caught.value).split("`")
    assert "(label 1 is 'c' in the features and 'b' in the run); give those, or start at step 0" in message
    train.main(shlex.split(command)[2:])
    assert "by class name 3 rows copied, 0 initialised" in capsys.readouterr().out


def test_a_null_label_is_never_taken_for_a_class(dit_run, tiny_config):
    """Three classes and the null label have as many rows as four classes without one."""
    source = load_checkpoint(dit_run)["ema"]["y_embedder.table.weight"]
    options = [f"training.init_from={dit_run}", "model.patch_size=2", "training.class_dropout_prob=0"]
    first, _ = initial_state(load_config(tiny_config, [*options, "data.num_classes=4"]))
    table = first["model"]["y_embedder.table.weight"]
    assert table.shape == source.shape and not torch.equal(table[3], source[3])
    # The same classes without a null label keep their rows
    first, _ = initial_state(load_config(tiny_config, options))
    assert torch.equal(first["model"]["y_embedder.table.weight"], source[:3])


@pytest.mark.parametrize("key", ["training.init_from", "training.resume_from_ckpt"])
def test_training_from_weights_that_are_not_finite(dit_run, tiny_config, tmp_path, key):
    """The weights are blamed, not the images."""
    state = load_checkpoint(dit_run)
    state["ema"]["blocks.0.mlp.fc1.weight"][0, 0] = torch.nan
    path = save_checkpoint(tmp_path / "bad", state, keep=0)
    changes = ["--set", f"{key}={path}", "--set", "model.patch_size=2", "--output", str(tmp_path / "run")]
    with pytest.raises(UserError, match="has non-finite values in .*blocks.0.mlp.fc1.weight"):
        train.main(["--config", str(tiny_config), *changes])


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
        "final_layer.linear.bias is (32,) there and (128,) in the configured network",
    ),
    (
        ["training.init_from={dit}", "model.patch_size=2", "model.hnet.num_heads=[4,4]"],
        "was trained with another model.hnet.num_heads; add --set 'model.hnet.num_heads=[2, 2]'",
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
    (["training.lr_scales=[1]"], "training.lr_scales: [1] is not 'name: value' pairs with finite numbers"),
    (
        ["training.resume_from_ckpt={dit}", "model.patch_size=2", "training.lr_scales={blocks: 0.5}"],
        "differs from the {} of",
    ),
    (
        ["training.init_from={dit}", "model.upcycle.scaffold=old"],
        "model.upcycle.scaffold: 'old' is not one of dit, fresh",
    ),
]


@pytest.mark.parametrize("changes, part", MISTAKES, ids=[part for _, part in MISTAKES])
def test_mistakes(dit_run, tiny_config, tmp_path, changes, part):
    words = [word for change in changes for word in ("--set", change.replace("{dit}", str(dit_run)))]
    with pytest.raises(UserError) as caught:
        train.main(["--config", str(tiny_config), "--output", str(tmp_path / "run"), *words])
    assert part in str(caught.value) and not (tmp_path / "run").exists()
