"""The precision that the launcher and the configuration ask for, and what stays in float32 whatever they ask."""

import pytest
import torch

from config import load_config
from models.types import Routing
from training.launch import choose_precision
from training.losses import ratio_loss


@pytest.mark.parametrize(
    "key, launcher, device, precision",
    [
        ("auto", "no", "cuda", "no"),
        ("auto", "bf16", "cuda", "bf16"),
        ("fp32", "bf16", "cuda", "no"),
        ("no", "bf16", "cuda", "no"),
        ("bf16", "no", "cuda", "bf16"),
    ],
)
def test_the_launcher_decides_unless_the_configuration_does(key, launcher, device, precision, monkeypatch):
    """`accelerate launch --mixed_precision no` means float32, on CUDA too."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    config = load_config(None, [f"training.precision={key}"])
    assert choose_precision(config, torch.device(device)) == precision


def test_the_ratio_loss_averages_in_float32():
    """Probabilities in bfloat16 are rounded once, by the router, and not again by their mean."""
    torch.manual_seed(0)
    prob = torch.rand(16, 1024).bfloat16()
    boundary = prob > 0.5
    found = ratio_loss(Routing(prob, boundary, boundary), 4.0)
    exact = ratio_loss(Routing(prob.double(), boundary, boundary), 4.0)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), abs=1e-6)
