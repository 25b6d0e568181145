"""The static DiT: published sizes, a plain twin, and the same training and sampling code as a DC-DiT."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from config import UserError, config_from_dict, load_config, to_dict
from models import architecture, build_model
from models.flops import TokenCounts, forward_flops, total_flops
from sampling.budgets import Budget
from sampling.generate import SamplingOptions, generate, load_trained
from weights.checkpoint import list_checkpoints

CONFIGS = Path(__file__).parent.parent / "configs"

# Published: millions of parameters (positions included) and GMACs per forward pass at 256 px.
PUBLISHED = {
    "S-2": (33, 6.06), "S-4": (33, 1.41), "B-2": (130, 23.01), "B-4": (130, 5.56),
    "L-2": (458, 80.71), "L-4": (458, 19.70),
    "XL-2": (675, 118.64), "XL-4": (675, 29.05),
}  # fmt: skip

WIDTH, SIDE, CLASSES = 32, 8, 5


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config = load_config(CONFIGS / f"DiT-{name}.yaml")
    with torch.device("meta"):
        model = build_model(config)
    millions, gmacs = PUBLISHED[name]
    parameters = sum(p.numel() for p in model.parameters()) + model.pos_embed.numel()
    assert parameters / 1e6 == pytest.approx(millions, abs=0.6)
    ours = forward_flops(architecture(config), TokenCounts(0, 0))
    softmax = 3 * len(model.blocks) * config.model.hnet.num_heads[1] * config.tokens**2
    norms = (
        (2 * len(model.blocks) + 1) * config.tokens * config.d_model
    )  # the published figures count one per element
    assert (sum(ours.values()) - softmax) / 2e9 + norms / 1e9 == pytest.approx(gmacs, abs=0.01)


def test_512_pixels():
    config = load_config(CONFIGS / "DiT-XL-2.yaml", ["data.image_size=512"])
    assert (config.token_side, config.tokens) == (32, 1024)
    with torch.device("meta"):
        assert build_model(config).pos_embed.shape == (1024, 1152)


def small_config(patch=2, **training):
    hnet = {"arch_layout": ["c2", ["D2"], "c2"], "d_model": [WIDTH] * 2, "num_heads": [4, 4]}
    raw = {
        "model": {"hnet": hnet, "patch_size": patch},
        "training": training,
        "data": {"image_size": SIDE, "latent_stride": 1, "num_classes": CLASSES},
    }
    return config_from_dict(raw)


def tiny_model(patch=2, **training):
    model = build_model(small_config(patch, **training))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(batch=3):
    return torch.randn(batch, 4, SIDE, SIDE), torch.arange(batch) * 300, torch.arange(batch) % (CLASSES + 1)


def plain_dit(model, x, t, labels):
    """The same weights written out on dense tensors, patch by patch."""
    patch, batch = model.patch, len(x)
    c = model.t_embedder(t) + model.y_embedder(labels)
    kernel = model.x_embedder.weight.flatten(1)
    cut = [
        x[:, :, patch * i : patch * i + patch, patch * j : patch * j + patch].flatten(1)
        for i in range(SIDE // patch)
        for j in range(SIDE // patch)
    ]
    u = torch.stack(cut, dim=1) @ kernel.T + model.x_embedder.bias + model.pos_embed
    for block in model.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        h = F.layer_norm(u, (WIDTH,), eps=1e-6) * (1 + scale1) + shift1
        q, k, v = block.attn.qkv(h).unflatten(2, (3, 4, WIDTH // 4)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) / (WIDTH // 4) ** 0.5).softmax(-1)
        u = u + gate1 * block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        h = F.layer_norm(u, (WIDTH,), eps=1e-6) * (1 + scale2) + shift2
        u = u + gate2 * block.mlp.fc2(F.gelu(block.mlp.fc1(h), approximate="tanh"))
    shift, scale = model.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=2)
    out = model.final_layer.linear(F.layer_norm(u, (WIDTH,), eps=1e-6) * (1 + scale) + shift)
    image = torch.empty(batch, 8, SIDE, SIDE)
    for number, values in enumerate(out.unbind(1)):
        i, j = (patch * n for n in divmod(number, SIDE // patch))
        image[:, :, i : i + patch, j : j + patch] = values.view(batch, patch, patch, 8).permute(0, 3, 1, 2)
    return image


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_against_a_plain_transformer(patch):
    model, arguments = tiny_model(patch), inputs()
    out = model(*arguments)
    routing = out.routing
    torch.testing.assert_close(out.prediction, plain_dit(model, *arguments), rtol=1e-4, atol=1e-5)
    assert (
        routing.prob.shape == (3, (SIDE // patch) ** 2) and routing.keep.all() and (routing.prob == 1).all()
    )


def test_it_starts_at_zero_and_every_parameter_learns():
    assert not build_model(small_config())(*inputs()).prediction.any()
    model = tiny_model(gradient_checkpointing=True)
    model(*inputs()).prediction.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_flops_against_the_counter(flop_counter):
    config = small_config()
    with torch.no_grad(), flop_counter:
        build_model(config)(*inputs(1))
    softmax = 3 * 2 * 4 * config.tokens**2
    assert total_flops(architecture(config), TokenCounts(0, 0)) - softmax == flop_counter.get_total_flops()


def test_configuration():
    config = load_config(CONFIGS / "DCDiT-B-N4.yaml", ["model.patch_size=2"])
    assert config.training.ratio_loss_weight == 0 and not config.training.multi_budget_training
    assert config_from_dict(to_dict(config)) == config and config.tokens == 256
    indivisible = "does not divide the latent's side of 32"
    for patch, problem in ((3, indivisible), (64, indivisible), (0, "must be greater than 0")):
        with pytest.raises(UserError, match=f"model.patch_size: {patch} {problem}"):
            load_config(CONFIGS / "DCDiT-B-N4.yaml", [f"model.patch_size={patch}"])
    with pytest.raises(ValueError, match="no router"):
        tiny_model()(*inputs(), 0.5)


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory) -> Path:
    """Checkpoint of a short run of the tiny configuration with one word changed."""
    folder = tmp_path_factory.mktemp("static")
    changes = ["--set", "model.patch_size=2", "--set", "training.max_steps=2"]
    train.main(["--config", str(tiny_config), "--output", str(folder), *changes])
    return list_checkpoints(folder / "checkpoints")[-1]


def test_one_word_trains_and_samples_the_baseline(trained):
    run = load_trained(trained)
    shown = []
    options = SamplingOptions(cfg_scale=2.0, num_sampling_steps=3)
    (batch,) = generate(
        run, [0, 1], [0, 1], options, on_step=lambda step, routing: shown.append(routing.keep)
    )
    assert batch.images.shape == (2, 3, 32, 32) and shown[0].shape == (2, 16) and shown[0].all()
    assert all(step.conditional.tolist() == step.unconditional.tolist() == [16, 16] for step in batch.kept)
    with pytest.raises(UserError, match="--tail-dropping-fraction 0.5: a static DiT has no router"):
        SamplingOptions(budget=Budget.fraction(0.5)).check(run.config)
