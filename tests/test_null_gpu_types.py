"""Precisions of a bfloat16 step on a GPU, which hold whatever the values are.

The forward pass on tensors without values, which may claim to be on a GPU; the whole step on the null GPU.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from config import config_from_dict
from diffusion import create_diffusion
from models import attention, build_model
from training.losses import Weighted, ratio_loss, total_loss

BF16, FP32 = torch.bfloat16, torch.float32
BATCH, SIDE = 2, 16

# What the parts of a network return under autocast. The router, and what else is about chunking, stays in float32
PARTS = {
    "t_embedder": BF16,
    "encoder": BF16,
    "router": FP32,
    "residual_proj": FP32,
    "blocks.0.attn": BF16,
    "blocks.0": FP32,
    "norm": FP32,
    "dechunk": FP32,
    "decoder": BF16,
    "final_layer": BF16,
}


def observe_step(fp32_chunking: bool = True, backward: bool = True) -> dict[str, torch.dtype]:
    """Precision of what each part returns, and of the loss, in a training step on the device."""
    hnet = {"arch_layout": ["c1", ["D1"], "c1"], "d_model": [64, 64], "num_heads": [1, 1]}
    hnet |= {"enc_dec_dim_factor": [2, None], "fp32_router_dechunk": fp32_chunking}
    config = config_from_dict({"model": {"hnet": hnet}, "data": {"image_size": SIDE * 8, "num_classes": 3}})
    with torch.device("cuda"):
        model = build_model(config)
        x0 = torch.zeros(BATCH, 4, SIDE, SIDE)
        numbers = torch.zeros(BATCH, dtype=torch.int64)
    found: dict[str, torch.dtype] = {}

    def note(name: str):
        def hook(module, arguments, result):
            found[name] = (result[0] if isinstance(result, tuple) else result).dtype

        return hook

    for name in PARTS:
        model.get_submodule(name).register_forward_hook(note(name))

    # One step, as training/trainer.py makes it
    diffusion = create_diffusion("linear", 1000, learn_sigma=True)
    x_t = diffusion.add_noise(x0, numbers, x0)
    with torch.autocast("cuda", BF16):
        out = model(x_t, numbers, numbers, tokens=[140, 150])
    terms = diffusion.losses(out.prediction.float(), x0, x_t, numbers, x0)
    losses = total_loss(terms, {"ratio": Weighted(0.03, ratio_loss(out.routing, 4.0))})
    found["x_t"] = x_t.dtype
    found |= {name: values.dtype for name, values in losses.items()}
    if backward:
        losses["loss"].backward()
        assert {parameter.grad.dtype for parameter in model.parameters()} == {FP32}
    return found


def check(found: dict[str, torch.dtype]) -> None:
    assert {name: found[name] for name in PARTS} == PARTS
    for name in ("x_t", "loss", "mse", "vb", "ratio_loss"):
        assert found[name] == FP32, name


def test_of_tensors_without_values(monkeypatch):
    monkeypatch.setattr(attention.Attention, "attend", lambda self, qkv, packing: qkv[:, 0])
    # Without a GPU autocast would turn itself off
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with FakeTensorMode():
        check(observe_step(backward=False))


@pytest.mark.cuda
def test_on_a_gpu():
    check(observe_step())


@pytest.mark.cuda
def test_chunking_in_bfloat16():
    found = observe_step(fp32_chunking=False)
    assert found["router"] == found["residual_proj"] == BF16
    assert found["loss"] == FP32
