"""torch.compile of blocks, encoder and decoder: whole graphs, no compilation after the second batch, the same numbers."""

import copy
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from config import config_from_dict
from models import build_model, compile_parts


def small_model(blocks: str) -> torch.nn.Module:
    """Weights that leave no term at zero."""
    hnet = {"arch_layout": ["c1", [blocks], "c1"], "d_model": [64, 64], "num_heads": [2, 2]}
    model = build_model(config_from_dict({"model": {"hnet": hnet}, "data": {"image_size": 64, "num_classes": 3}}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def step(model, seed: int):
    """Output, gradients and kept tokens of one batch of its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    t, labels = torch.randint(1000, (3,), generator=generator), torch.randint(4, (3,), generator=generator)
    out = model(x, t, labels)
    model.zero_grad()
    (out.prediction**2).mean().backward()
    return out.prediction.detach(), [p.grad for p in model.parameters()], int(out.routing.keep.sum())


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("backend, blocks, steps", [("aot_eager", "D1d1", 6), ("inductor", "D1", 3)])
def test_one_compilation_serves_all_token_counts(backend, blocks, steps):
    torch._dynamo.reset()
    counters.clear()
    plain = small_model(blocks)
    compiled = copy.deepcopy(plain)
    compile_parts(compiled, backend)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    kept, graphs = set(), None
    for seed in range(steps):
        ours, theirs = step(compiled, seed), step(plain, seed)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
        for a, b in zip(ours[1], theirs[1]):
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item() + 1e-7)
        kept.add(ours[2])
        if seed == 1:
            graphs = counters["stats"]["unique_graphs"]
    assert len(kept) == steps
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
