"""The model against numbers recorded from the official implementation."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from config import config_from_dict
from diffusion.guidance import guide
from models import build_model
from training.losses import ratio_loss
from weights.foreign import from_official, official_name

GOLDEN = Path(__file__).parent / "golden"
CASES = [
    "one_stage", "one_stage_tail_dropping", "one_stage_per_sample_dropping", "no_dim_factor",
    "coarse_target_multi_block",
]  # fmt: skip


class Golden:
    """One recorded case: tensors, metadata, and our model with its weights."""

    def __init__(self, name: str):
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            meta = {}
            for key, value in file.metadata().items():
                try:
                    meta[key] = json.loads(value)
                except json.JSONDecodeError:
                    meta[key] = value
        self.meta = meta
        state = {key[6:]: value for key, value in self.tensors.items() if key.startswith("state.")}
        config = config_from_dict(
            {
                "model": {"hnet": meta["hnet"], "mlp_ratio": meta["mlp_ratio"]},
                "training": {"learn_sigma": meta["learn_sigma"]},
                "data": {
                    "image_size": meta["input_size"],
                    "latent_stride": 1,
                    "num_classes": meta["num_classes"],
                },
            }
        )
        self.model = build_model(config)
        self.model.load_state_dict(from_official(state))
        drop = meta["tail_dropping_fraction"]
        self.drop = torch.tensor(drop) if isinstance(drop, list) else drop
        self.inputs = [self.tensors[f"in.{key}"] for key in ("x", "t", "y")]

    def loss(self):
        out = self.model(*self.inputs, self.drop)
        target = self.meta["downsample_factor"][0]
        ratio = ratio_loss(out.routing, target, self.meta["ratio_batch_size"])
        return out, ratio, (out.prediction**2).mean() + self.meta["ratio_loss_weight"] * ratio


@pytest.fixture(scope="module", params=CASES)
def golden(request):
    return Golden(request.param)


def test_outputs_and_masks(golden):
    out, ratio, loss = golden.loss()
    want = golden.tensors
    torch.testing.assert_close(out.prediction, want["out.model"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.routing.prob, want["out.stage0.boundary_prob"], atol=1e-6, rtol=1e-5)
    assert torch.equal(out.routing.boundary, want["out.stage0.boundary_mask_natural"].bool())
    assert torch.equal(out.routing.keep, want["out.stage0.boundary_mask"].bool())
    torch.testing.assert_close(ratio, want["out.ratio_loss"].squeeze(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(loss, want["out.loss"].squeeze(), atol=1e-5, rtol=1e-5)


def test_gradients(golden):
    golden.model.zero_grad()
    golden.loss()[2].backward()
    ours = {name: parameter.grad for name, parameter in golden.model.named_parameters()}
    norms = {key[10:]: value.item() for key, value in golden.tensors.items() if key.startswith("grad_norm.")}
    assert {official_name(name) for name in norms} == set(ours)
    # A gradient that is zero but for rounding has no relative error: 1e-6 of the largest norm is the floor.
    floor = 1e-6 * max(norms.values())
    for name, norm in norms.items():
        assert ours[official_name(name)].norm().item() == pytest.approx(norm, rel=1e-4, abs=floor), name
    for key, value in golden.tensors.items():
        if key.startswith("grad."):
            torch.testing.assert_close(
                ours[official_name(key[5:])], value, rtol=1e-4, atol=1e-4 * value.abs().max().item()
            )


def test_guidance():
    golden = Golden("one_stage")
    x, t, _ = golden.inputs
    y = golden.tensors["cfg.y"]

    def denoise(x, t, labels):
        return golden.model(x, t, labels).prediction

    with torch.no_grad():
        out = guide(denoise, {"labels": y[:4]}, {"labels": y[4:]}, golden.meta["cfg_scale"], channels=3)(x, t)
    want = golden.tensors["cfg.out"]
    torch.testing.assert_close(out, want[:4], atol=1e-5, rtol=1e-5)
