"""torch.compile of blocks, encoder and decoder: whole graphs, two compilations, the same numbers."""

import copy
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from config import config_from_dict
from models import attention, build_model, compile_parts


def small_model(blocks: str, checkpointing: bool = False) -> torch.nn.Module:
    """Weights that leave no term at zero."""
    hnet = {"arch_layout": ["c1", [blocks], "c1"], "d_model": [64, 64], "num_heads": [2, 2]}
    sections = {"model": {"hnet": hnet}, "data": {"image_size": 64, "num_classes": 3}}
    model = build_model(config_from_dict(sections | {"training": {"gradient_checkpointing": checkpointing}}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def step(model, seed: int, batch: int = 3, bf16: bool = False):
    """Output, gradients and kept tokens of one batch of its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 8, 8, generator=generator)
    t, labels = (
        torch.randint(1000, (batch,), generator=generator),
        torch.randint(4, (batch,), generator=generator),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(x, t, labels)
    model.zero_grad()
    (out.prediction.float() ** 2).mean().backward()
    return out.prediction.detach().float(), [p.grad for p in model.parameters()], int(out.routing.keep.sum())


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "backend, blocks, steps, bf16, checkpointing",
    [
        ("aot_eager", "D1d1", 6, False, False),
        ("aot_eager", "D1", 3, True, False),
        ("aot_eager", "D1", 3, False, True),
        ("inductor", "D1", 3, False, False),
    ],
)
def test_one_compilation_serves_all_token_counts(backend, blocks, steps, bf16, checkpointing):
    torch._dynamo.reset()
    counters.clear()
    plain = small_model(blocks, checkpointing)
    compiled = copy.deepcopy(plain)
    compile_parts(compiled, backend)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    kept, graphs = set(), None
    for seed in range(steps):
        ours, theirs = step(compiled, seed, bf16=bf16), step(plain, seed, bf16=bf16)
        close(ours, theirs, bf16)
        kept.add(ours[2])
        if seed == 1:
            graphs = counters["stats"]["unique_graphs"]
    assert len(kept) == steps
    assert counters["stats"]["unique_graphs"] == graphs
    close(
        step(compiled, steps, batch=2, bf16=bf16), step(plain, steps, batch=2, bf16=bf16), bf16
    )  # a last, smaller batch
    assert not counters["graph_break"]


def test_attention_sample_by_sample_stays_out_of_the_graphs(monkeypatch):
    """As on CUDA in float32: compilation ends all the same."""
    torch._dynamo.reset()
    counters.clear()

    def attend(self, qkv, packing):
        return self.attend_by_sample(qkv, packing)

    monkeypatch.setattr(attention.Attention, "attend", attend)
    plain = small_model("d1")
    compiled = copy.deepcopy(plain)
    compile_parts(compiled, "eager")
    graphs = []
    for seed in range(4):
        close(step(compiled, seed), step(plain, seed), bf16=False)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[3]


def close(ours, theirs, bf16: bool) -> None:
    """Output and gradients agree; in bfloat16, where a compiled part rounds less often, on the whole."""
    for a, b in [(ours[0], theirs[0]), *zip(ours[1], theirs[1])]:
        if b is not None and bf16:
            assert (a - b).norm() < 0.05 * b.norm() + 1e-7
        elif b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item() + 1e-7)
