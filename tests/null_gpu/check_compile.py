"""torch.compile on the null GPU: Triton compiles its kernels for the device that it sees."""

import copy

import torch
from torch._dynamo.utils import counters

import sample
import train
from config import config_from_dict
from models import build_model, compile_parts
from null_gpu.counts import counting


def test_a_block_is_compiled_twice_and_never_again(kept_tokens):
    """Once for the first number of tokens, and once for all others."""
    hnet = {"arch_layout": ["c1", ["D1"], "c1"], "d_model": [64, 64], "num_heads": [1, 1]}
    config = config_from_dict({"model": {"hnet": hnet}, "data": {"image_size": 64, "num_classes": 3}})
    plain = build_model(config).cuda()
    model = copy.deepcopy(plain)
    compile_parts(model)
    kept_tokens.vary = 5
    graphs = []
    for _ in range(4):
        launches = step(model)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] < graphs[1] == graphs[3]
    assert not counters["graph_break"]
    assert launches < step(plain)


def step(model: torch.nn.Module) -> int:
    """Launches of a forward and backward pass."""
    x = torch.zeros(2, 4, 8, 8, device="cuda")
    numbers = torch.zeros(2, dtype=torch.int64, device="cuda")
    with counting() as counts:
        with torch.autocast("cuda", torch.bfloat16):
            prediction = model(x, numbers, numbers).prediction
        prediction.float().sum().backward()
    return counts.launches


def test_scripts(tiny_config, tmp_path):
    """Training, and sampling with a compiled network inside a CUDA graph."""
    run = tmp_path / "run"
    train.main(
        ["--config", str(tiny_config), "--output", str(run), "--compile", "--set", "training.max_steps=3"]
    )
    checkpoint = str(run / "checkpoints" / "0000003.pt")
    options = [
        "--num-sampling-steps",
        "3",
        "--classes",
        "0",
        "--token-budget",
        "20",
        "--cuda-graph",
        "--compile",
    ]
    sample.main(["--ckpt", checkpoint, "--output", str(tmp_path), *options])
    assert (tmp_path / "sample.png").exists()
