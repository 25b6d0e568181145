"""The whole model: identities that hold for any weights, its start, and its precisions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from config import config_from_dict
from models import build_model
from models.blocks import run_blocks
from models.conv import to_grid, to_tokens
from models.packing import plan_packing
from models.tail_drop import drop_tail

WIDTH, SIDE, CLASSES = 64, 6, 5


def tiny_config(**changes):
    """Two conv blocks, two D blocks and one d block on 6 x 6 latents, with several channels per norm group."""
    hnet = {
        "arch_layout": ["c2", ["D1d1D1"], "c2"], "d_model": [WIDTH] * 2, "num_heads": [4, 4],
        "enc_dec_dim_factor": None,
    }  # fmt: skip
    raw = {
        "model": {"hnet": hnet},
        "data": {"image_size": SIDE, "latent_stride": 1, "num_classes": CLASSES},
    }
    return config_from_dict(raw, [f"{key}={value}" for key, value in changes.items()])


def tiny_model(perturbed=True, **changes):
    """Freshly built, and with noise on every parameter unless told otherwise: no zero hides a mistake."""
    torch.manual_seed(0)
    model = build_model(tiny_config(**{key.replace("__", "."): value for key, value in changes.items()}))
    if perturbed:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
            model.router.residual_scorer[-1].weight.mul_(20)  # probabilities on both sides of one half
            model.router.residual_scorer[-1].bias.zero_()
    return model


def inputs(batch=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, SIDE, SIDE, generator=generator)
    return x, torch.arange(batch) * 300 % 1000, torch.arange(batch) % (CLASSES + 1)


def select(arguments, k):
    return [argument[k : k + 1] for argument in arguments]


def test_test_model_is_not_trivial():
    """The other tests rely on it: some tokens are kept and some are not."""
    routing = tiny_model()(*inputs(), 0.4).routing
    assert (routing.boundary.sum(1) > 5).all() and (routing.boundary.sum(1) < SIDE * SIDE - 5).all()
    assert (routing.keep.sum(1) < routing.boundary.sum(1)).all()


def static_dit(model, x_t, t, labels):
    """The same weights as a dense transformer on all tokens; returns the prediction.

    With every token kept, packing, positions and plug-back are identities: what is left is encoder, blocks,
    smoothing over all tokens, residual and decoder.
    """
    c = model.t_embedder(t) + model.y_embedder(labels)
    features = model.encoder(model.x_embedder(x_t), c)
    tokens = to_tokens(features)
    u = tokens + model.pos_embed
    for block in model.blocks:
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        h = F.layer_norm(u, (WIDTH,), eps=1e-6) * (1 + scale1) + shift1
        q, k, v = block.attn.qkv(h).unflatten(2, (3, 4, WIDTH // 4)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) / (WIDTH // 4) ** 0.5).softmax(-1)
        u = u + gate1 * block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        if block.mlp is not None:
            h = F.layer_norm(u, (WIDTH,), eps=1e-6) * (1 + scale2) + shift2
            u = u + gate2 * block.mlp.fc2(F.gelu(block.mlp.fc1(h), approximate="tanh"))
    u = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + 1e-5) * model.norm.weight
    p = model.router(features).prob.clamp(1e-4, 1 - 1e-4)[:, :, None]
    cell = torch.arange(SIDE * SIDE)
    distance = (cell[:, None] // SIDE - cell // SIDE) ** 2 + (cell[:, None] % SIDE - cell % SIDE) ** 2
    kernel = torch.exp(-distance / 2)
    smooth = kernel @ (p * u) / (kernel @ p + 1e-8)
    h = p * u + (1 - p) * smooth + model.residual_proj(tokens)
    h = model.decoder(to_grid(h), c)
    shift, scale = model.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=2)
    h = F.layer_norm(to_tokens(h), (WIDTH,), eps=1e-6) * (1 + scale) + shift
    return to_grid(model.final_layer.linear(h))


def test_everything_kept_is_a_static_transformer():
    model = tiny_model()
    last = model.router.residual_scorer[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, 20.0)
    out = model(*inputs())
    assert out.routing.keep.all()
    torch.testing.assert_close(out.prediction, static_dit(model, *inputs()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("drop", [None, 0.5])
def test_a_sample_does_not_depend_on_its_batch_mates(drop):
    model, arguments = tiny_model(), inputs()
    together = model(*arguments, drop)
    for k in range(4):
        alone = model(*select(arguments, k), drop)
        assert torch.equal(alone.routing.keep[0], together.routing.keep[k])
        torch.testing.assert_close(alone.prediction[0], together.prediction[k], rtol=1e-4, atol=1e-5)


def test_a_drop_per_sample_is_separate_runs():
    model, arguments, drop = tiny_model(), inputs(), [0.0, 0.3, 0.6, 0.9]
    together = model(*arguments, torch.tensor(drop))
    routing = together.routing
    assert torch.equal(routing.keep, drop_tail(routing.prob, routing.boundary, torch.tensor(drop)))
    for k, fraction in enumerate(drop):
        alone = model(*select(arguments, k), fraction)
        assert torch.equal(alone.routing.keep[0], routing.keep[k])
        torch.testing.assert_close(alone.prediction[0], together.prediction[k], rtol=1e-4, atol=1e-5)
    counts = routing.keep.sum(1)
    assert (counts < routing.boundary.sum(1))[1:].all() and torch.equal(routing.keep[0], routing.boundary[0])


def test_a_token_budget_is_tail_dropping_to_that_count():
    model, arguments = tiny_model(), inputs()
    dropped = model(*arguments, 0.5)
    counts = dropped.routing.keep.sum(1).tolist()
    budgeted = model(*arguments, tokens=counts)
    assert torch.equal(budgeted.routing.keep, dropped.routing.keep)
    torch.testing.assert_close(budgeted.prediction, dropped.prediction)


def test_a_token_budget_above_the_natural_count():
    """Tokens that score below one half stay too, each sample as if alone; all tokens are the most there are."""
    model, arguments = tiny_model(), inputs()
    for tokens in (30, SIDE * SIDE):
        together = model(*arguments, tokens=tokens)
        prediction, routing = together.prediction, together.routing
        assert (routing.boundary.sum(1) < tokens).all() and (routing.keep.sum(1) == tokens).all()
        assert prediction.isfinite().all()
        for k in range(4):
            alone = model(*select(arguments, k), tokens=tokens).prediction
            torch.testing.assert_close(alone[0], prediction[k], rtol=1e-4, atol=1e-5)


def test_nothing_waits_for_the_device_under_a_token_budget(smooth_on_grid):
    """Fake tensors have no values: whatever reads one fails."""
    with FakeTensorMode():
        model = tiny_model(perturbed=False)
        arguments = torch.empty(4, 4, SIDE, SIDE), torch.empty(4), torch.empty(4, dtype=torch.int64)
        assert model(*arguments, tokens=9).prediction.shape == (4, 8, SIDE, SIDE)
        assert model(*arguments, tokens=[9, 9, 5, 5]).prediction.shape == (4, 8, SIDE, SIDE)
        for drop in (None, 0.5):
            with pytest.raises(DataDependentOutputException):
                model(*arguments, drop)


def test_dropping_changes_the_output_but_not_the_decision():
    model = tiny_model()
    full, cheap = model(*inputs()), model(*inputs(), 0.5)
    assert torch.equal(full.routing.boundary, cheap.routing.boundary) and torch.equal(
        full.routing.prob, cheap.routing.prob
    )
    assert (full.prediction - cheap.prediction).abs().max() > 1e-4


def outputs_of_blocks(model, *arguments):
    """What the transformer blocks return in a forward pass, by hooks."""
    outputs = []
    hooks = [block.register_forward_hook(lambda *call: outputs.append(call[-1])) for block in model.blocks]
    model(*arguments)
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize(
    "changes", [{}, {"model__patch_size": 2, "training__multi_budget_training": "false"}]
)
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_hidden_tokens_are_those_after_the_block(changes, checkpointing):
    static = "model__patch_size" in changes
    model = tiny_model(not static, training__gradient_checkpointing=checkpointing, **changes)
    plain = model(*inputs())
    outputs = outputs_of_blocks(model, *inputs())
    asked = model(*inputs(), hidden=(0, 2))
    assert not plain.hidden and list(asked.hidden) == [0, 2]
    for index, tokens in asked.hidden.items():
        assert torch.equal(tokens, outputs[index]) and len(tokens) == asked.packing.lengths.sum()
    assert torch.equal(asked.prediction, plain.prediction)
    assert torch.equal(asked.packing.lengths, asked.routing.keep.sum(1))
    # Their gradient reaches this block and not the next
    asked.hidden[0].square().mean().backward()
    assert model.blocks[0].attn.qkv.weight.grad is not None and model.blocks[1].attn.qkv.weight.grad is None
    with pytest.raises(TypeError, match="cannot unpack"):
        _prediction, _routing = asked


def test_every_input_matters():
    model, arguments = tiny_model(), inputs()
    reference = model(*arguments).prediction
    for k, change in enumerate((0.1, 100, 1)):
        changed = list(arguments)
        changed[k] = (changed[k] + change) % (CLASSES + 1) if k == 2 else changed[k] + change
        assert (model(*changed).prediction - reference).abs().amax((1, 2, 3)).min() > 1e-4


# --------------------------------------------------------------------------------------------- initialisation


def zero_tensors(model) -> set[str]:
    names = {name for name, parameter in model.named_parameters() if not parameter.any()}
    return {name for name in names if not name.endswith(".bias")}


@pytest.mark.parametrize("init", ["adaln_zero", "released"])
def test_what_starts_at_zero(init):
    model = tiny_model(perturbed=False, model__init=init)
    head = {"final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight"}
    intended = {"residual_proj.weight", *(f"blocks.{k}.adaLN_modulation.1.weight" for k in range(3))}
    assert zero_tensors(model) == (head | intended if init == "adaln_zero" else head)
    assert not any(layer.bias.any() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    assert not model.x_embedder.bias.any()


@pytest.mark.parametrize("init", ["adaln_zero", "released"])
def test_the_first_output_is_zero(init):
    out = tiny_model(perturbed=False, model__init=init)(*inputs())
    assert (out.prediction == 0).all() and out.prediction.shape == (4, 8, SIDE, SIDE)
    assert 0.1 < out.routing.prob[:, 1:-1].mean() < 0.45  # near the usual target of one in four


def test_blocks_are_identities_at_the_start():
    model = tiny_model(perturbed=False)
    packing = plan_packing(torch.ones(2, 9, dtype=torch.bool))
    u = torch.randn(18, WIDTH)
    processed, _ = run_blocks(model.blocks, u, torch.randn(2, WIDTH), packing)
    assert torch.equal(processed, u)


def test_linear_layers_start_xavier_uniform():
    model = tiny_model(perturbed=False, model__init="released")
    for layer in (
        model.residual_proj,
        model.blocks[0].attn.qkv,
        model.encoder.blocks[0].cond_proj[1],
        model.blocks[0].mlp.fc1,
    ):
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound
    fan = model.x_embedder.weight[0].numel() + len(model.x_embedder.weight)
    assert 0.95 * (6 / fan) ** 0.5 < model.x_embedder.weight.abs().max() <= (6 / fan) ** 0.5
    for weight in (
        model.y_embedder.table.weight,
        model.t_embedder.mlp[0].weight,
        model.t_embedder.mlp[2].weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)


def test_building_is_a_function_of_the_seed():
    states = [tiny_model(perturbed=False).state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_options_shape_the_model():
    assert tiny_model(training__learn_sigma="false")(*inputs()).prediction.shape[1] == 4
    assert len(tiny_model().y_embedder.table.weight) == CLASSES + 1
    assert len(tiny_model(training__class_dropout_prob=0).y_embedder.table.weight) == CLASSES
    assert [block.mlp is None for block in tiny_model().blocks] == [False, True, False]
    narrow = tiny_model(model__hnet__enc_dec_dim_factor="[2, null]")
    assert narrow.x_embedder.out_channels == WIDTH // 2 and narrow(*inputs()).prediction.shape == (
        4,
        8,
        SIDE,
        SIDE,
    )


def test_positions_put_the_column_first():
    positions = tiny_model().pos_embed.view(SIDE, SIDE, WIDTH)
    half, quarter = WIDTH // 2, WIDTH // 4
    assert torch.equal(positions[0, :, :half], positions[3, :, :half])  # the first half knows the column only
    assert torch.equal(positions[:, 0, half:], positions[:, 4, half:])
    omega = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    want = torch.cat([(4 * omega).sin(), (4 * omega).cos(), (2 * omega).sin(), (2 * omega).cos()]).float()
    torch.testing.assert_close(positions[2, 4], want)


# --------------------------------------------------------------------------------------------- modes and precision


def gradients(model, drop=None):
    model.zero_grad()
    out = model(*inputs(), drop)
    (out.prediction.square().mean() + out.routing.prob.mean()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny_model()
    saving = tiny_model(training__gradient_checkpointing="true")
    calls = []
    saving.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    plain, recomputed = gradients(model, 0.3), gradients(saving, 0.3)
    assert len(calls) == 2  # it really ran twice
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_every_parameter_gets_a_gradient():
    for name, gradient in gradients(tiny_model()).items():
        if not name.startswith("blocks.1.adaLN"):  # half of an attention-only block's modulation is unused
            assert gradient is not None and gradient.abs().max() > 0, name


def test_training_and_evaluation_mode_are_the_same_function():
    """Label dropout belongs to the batches; there is no dropout and no batch statistics in the model."""
    model = tiny_model()
    first = model.train()(*inputs()).prediction
    assert torch.equal(model.eval()(*inputs()).prediction, first)
    assert torch.equal(model.train()(*inputs()).prediction, first)


@pytest.mark.parametrize("fp32_chunking", ["true", "false"])
@pytest.mark.parametrize("grid", [False, True])
def test_bfloat16_autocast(fp32_chunking, grid, request):
    if grid:
        request.getfixturevalue("smooth_on_grid")
    model = tiny_model(model__hnet__fp32_router_dechunk=fp32_chunking)
    plain = model(*inputs())
    seen = []
    model.residual_proj.register_forward_hook(lambda module, x, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*inputs())
    assert seen == [torch.float32 if fp32_chunking == "true" else torch.bfloat16]
    assert out.routing.prob.dtype == seen[0] and out.routing.prob.isfinite().all()
    # Some tokens near one half are decided differently, so single cells may differ: compare the bulk.
    difference = (out.prediction.float() - plain.prediction).norm() / plain.prediction.norm()
    assert 0 < difference < 0.15
    assert (out.routing.prob - plain.routing.prob).abs().mean() < 0.02
    loss = out.prediction.float().square().mean()
    loss.backward()
    assert all(
        parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None
    )


def test_a_model_can_be_copied_and_saved(tmp_path):
    """The EMA copies models, and the fixed tables are in the state dict only where the official code has them."""
    model = tiny_model()
    clone = copy.deepcopy(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = tiny_model(perturbed=False)
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    for other in (clone, fresh):
        assert torch.equal(other(*inputs()).prediction, model(*inputs()).prediction)
    assert "pos_embed" in model.state_dict() and "dechunk.kernel" not in model.state_dict()
