"""Sampling under a token budget can be recorded and replayed: the host reads no value, no shape depends on one."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import steps, workload
from benchmarks.workload import Case, Setup
from config import config_from_dict
from models import attention, build_model, compile_parts
from sampling.cuda_graph import GraphedDenoiser
from sampling.half_weights import replace_weights, with_half_weights

BATCH, SIDE = 2, 8
BUDGETS = ([20, 20], [30, 9])  # the second is that of Lite-CFG


def small_model(patch: int | None = None) -> torch.nn.Module:
    hnet = {"arch_layout": ["c1", ["D1d1"], "c1"], "d_model": [64, 64], "num_heads": [2, 2]}
    model = build_model(
        config_from_dict(
            {"model": {"hnet": hnet, "patch_size": patch}, "data": {"image_size": SIDE * 8, "num_classes": 3}}
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def inputs(seed: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, 4, SIDE, SIDE, generator=generator)
    t, labels = (
        torch.randint(1000, (BATCH,), generator=generator),
        torch.randint(4, (BATCH,), generator=generator),
    )
    return x.to(device), t.to(device), labels.to(device)


class Tape(TorchDispatchMode):
    """A CUDA graph's stand-in: records operations with their tensors, and does them again on the same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.calls.append((function, arguments, options or {}, result))
        return result

    def replay(self):
        for function, arguments, options, result in self.calls:
            for old, new in zip(tensors(result), tensors(function(*arguments, **options))):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tensors(nested) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def tapes(smooth_on_grid, monkeypatch):
    """CUDA's place is taken by the CPU, with the dechunk as on a GPU; a list of the recordings."""
    made = []

    def make():
        made.append(Tape())
        return made[-1]

    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "CUDAGraph": make,
        "graph": lambda tape, pool, stream, **options: tape,
        "graph_pool_handle": lambda: None,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: contextlib.nullcontext(),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made


@pytest.mark.parametrize("patch", [None, 2])
@torch.inference_mode()
def test_replays_equal_evaluations(tapes, patch):
    model = small_model(patch)
    graphed = GraphedDenoiser(model)
    budgets = BUDGETS if patch is None else [None]
    earlier = []
    for seed in range(3):
        for tokens in budgets:
            ours, theirs = graphed(*inputs(seed), tokens=tokens), model(*inputs(seed), tokens=tokens)
            torch.testing.assert_close(ours.prediction, theirs.prediction)
            assert torch.equal(ours.routing.keep, theirs.routing.keep)
            assert torch.equal(ours.packing.token_index, theirs.packing.token_index)
            earlier.append((ours, theirs))
    assert len(tapes) == len(budgets)
    for ours, theirs in earlier:  # a later replay changes nothing that was handed out
        torch.testing.assert_close(ours.prediction, theirs.prediction)


@pytest.mark.parametrize("patch", [None, 2])
@torch.inference_mode()
def test_weights_cast_once_give_what_autocast_gives(patch):
    model = small_model(patch)
    half = with_half_weights(model, torch.bfloat16)
    kept = {name for name, parameter in half.named_parameters() if parameter.dtype == torch.float32}
    assert "blocks.0.mlp.fc1.weight" not in kept and "y_embedder.table.weight" in kept
    assert patch or {"router.proj.weight", "residual_proj.bias"} <= kept
    assert half.pos_embed is model.pos_embed and model.blocks[0].attn.qkv.weight.dtype == torch.float32
    tokens = None if patch else [20, 9]
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(*inputs(0), tokens=tokens)
        ours = half(*inputs(0), tokens=tokens)
    assert torch.equal(ours.prediction, expected.prediction)
    assert torch.equal(ours.routing.prob, expected.routing.prob)


def test_a_copy_has_every_child_of_its_module():
    """Also a layer of two names, and a name without a layer."""
    layer = torch.nn.Linear(2, 2)
    module = torch.nn.Module()
    for name, child in {"first": layer, "second": layer, "none": None}.items():
        module.register_module(name, child)
    twin = replace_weights(module, {}, "")
    assert twin.none is None and twin.second.weight is twin.first.weight is layer.weight


def test_a_compiled_network_keeps_its_weights():
    model = small_model()
    compile_parts(model, "eager")
    assert with_half_weights(model, torch.bfloat16) is model


@torch.inference_mode()
def test_without_a_budget_nothing_is_recorded(tapes):
    model = small_model()
    prediction = GraphedDenoiser(model)(*inputs(0), drop=0.5).prediction
    assert torch.equal(prediction, model(*inputs(0), drop=0.5).prediction)
    assert not tapes


def test_the_benchmark_of_graphs(tapes, monkeypatch):
    hnet = {"arch_layout": ["c1", ["D1"], "c1"], "d_model": [64, 64], "num_heads": [2, 2]}
    config = config_from_dict({"model": {"hnet": hnet}, "data": {"image_size": 64, "num_classes": 3}})
    monkeypatch.setattr(workload, "load", lambda name: config)
    setup = Setup(torch.device("cpu"), bf16=False, seconds=0)
    (row,) = steps.measure_graph(Case("small", 2), setup)
    assert row["tokens"] == 16 and row["difference"] < 1e-6 and len(tapes) == 1


class Transfers(TorchDispatchMode):
    """Names of the operations with tensors of the host and of the device, which a CUDA graph cannot hold."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        number = (
            function is torch.ops.aten.fill_.Tensor
        )  # written into a tensor, by older versions: the kernel is given it
        if len({x.device.type for x in tensors((arguments, options, result))}) > 1 and not number:
            self.found.append(function.overloadpacket.__name__)
        return result


@pytest.mark.parametrize("tokens", BUDGETS)
def test_an_evaluation_moves_nothing_between_host_and_device(tokens, monkeypatch):
    """On tensors without values, which may claim to be on a GPU; a value that is read raises there."""
    monkeypatch.setattr(attention.Attention, "attend", lambda self, qkv, packing: qkv[:, 0])
    # Autograd counts devices at the first backward pass of a process, and starts a thread for each, which a later
    # test could not fork: count before there seems to be a GPU
    torch.zeros(1, requires_grad=True).sum().backward()
    with FakeTensorMode(), torch.no_grad():
        with torch.device("cuda"):
            model = small_model()
            x, t, labels = torch.empty(BATCH, 4, SIDE, SIDE), *torch.zeros(2, BATCH, dtype=torch.int64)
        with Transfers() as transfers:
            out = model(x, t, labels, tokens=tokens)
        assert out.prediction.device.type == out.routing.keep.device.type == "cuda"
        assert not transfers.found
        with Transfers() as transfers:
            torch.tensor(tokens).to("cuda")
        assert transfers.found == ["_to_copy"]


@pytest.mark.cuda
@pytest.mark.parametrize("patch", [None, 2])
@torch.inference_mode()
def test_cuda_graphs_equal_evaluations(patch):
    model = small_model(patch).cuda()
    graphed = GraphedDenoiser(model)
    for seed in range(3):
        for tokens in BUDGETS if patch is None else [None]:
            with torch.autocast("cuda", torch.bfloat16):
                ours, theirs = (
                    graphed(*inputs(seed, "cuda"), tokens=tokens),
                    model(*inputs(seed, "cuda"), tokens=tokens),
                )
            torch.testing.assert_close(ours.prediction, theirs.prediction)
            assert torch.equal(ours.routing.keep, theirs.routing.keep)
    assert len(graphed.recordings) == (len(BUDGETS) if patch is None else 1)
