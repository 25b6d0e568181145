"""Closed-form FLOPs against torch's counter, component by component, and against the recorded table."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from config import config_from_dict, load_config
from grid import Grid
from models import architecture, build_model, flops
from models.flops import (
    STABLE_DIFFUSION,
    TokenCounts,
    decoder_config,
    decoder_flops,
    forward_flops,
    peak_flops,
    total_flops,
)

ATTEND = torch.ops.dc_dit.attend  # the counter does not know it
CONFIGS = Path(__file__).parent.parent / "configs"

# GFLOP per image at 256 of 1024 tokens, recorded from the official code. Its DiT blocks include attention;
# its router figure is whole for B only; it left out the residual projection.
TABLE = {
    "S": (0.00757, 1.26473, None, 12.11498, 1.26473, 0.00172),
    "B": (0.01573, 5.05892, 1.66134, 46.01571, 5.05892, 0.00374),
    "L": (0.02150, 8.99364, None, 161.43876, 8.99364, 0.00524),
    "XL": (0.02448, 11.38257, None, 237.29406, 11.38257, 0.00605),
}
COLUMNS = ("embeddings", "encoder", "router", "blocks", "decoder", "final_layer")


@pytest.mark.parametrize("size", TABLE)
def test_recorded_table(size):
    config = load_config(CONFIGS / f"DCDiT-{size}-N4.yaml")
    ours = forward_flops(architecture(config), TokenCounts(256, 256**2))
    ours["blocks"] += ours["attention"]
    for column, recorded in zip(COLUMNS, TABLE[size]):
        if recorded is not None:
            assert ours[column] / 1e9 == pytest.approx(recorded, abs=6e-6), column
    # Two products with (S, S) kernels cost what the dense one does at 256 tokens, and one channel more for
    # the weights.
    assert ours["dechunk"] == pytest.approx(2 * 256**2 * (config.d_model + 1))
    if size == "B":
        assert ours["residual_proj"] / 1e9 == pytest.approx(1.208, abs=1e-3)


def test_paper_table():
    """TFLOP per image over 250 steps without guidance, as read off the paper's figure (to its reading error)."""
    config = load_config(CONFIGS / "DCDiT-B-N4.yaml")
    for kept, recorded in ((256, 14.3), (256 * 0.4, 7.5)):
        assert total_flops(architecture(config), TokenCounts(kept, kept**2)) * 250 / 1e12 == pytest.approx(
            recorded, rel=0.07
        )


def tiny(factor="null", learn_sigma=True):
    hnet = {"arch_layout": ["c2", ["D1d2"], "c1"], "d_model": [64, 64], "num_heads": [4, 4]}
    hnet["enc_dec_dim_factor"] = None if factor == "null" else [factor, None]
    return config_from_dict(
        {
            "model": {"hnet": hnet, "mlp_ratio": 2.5},
            "training": {"learn_sigma": learn_sigma},
            "data": {"image_size": 6, "latent_stride": 1, "num_classes": 3, "latent_channels": 3},
            "diffusion": {"cfg_channels": 3},
        }
    )


@pytest.mark.parametrize("factor, learn_sigma", [("null", True), (2, True), (2, False)])
def test_against_the_counter(factor, learn_sigma, smooth_on_grid, flop_counter):
    """Attention without its softmax (3 per head and pair), and the dechunk with grid products."""
    config = tiny(factor, learn_sigma)
    model = build_model(config)
    with torch.no_grad():
        model.router.residual_scorer[-1].weight.normal_(std=3)
    batch = 3
    with torch.no_grad(), flop_counter:
        out = model(
            torch.randn(batch, 3, 6, 6),
            torch.arange(batch),
            torch.arange(batch),
            torch.tensor([0.0, 0.3, 0.6]),
        )
    counts = out.routing.keep.sum(1).double()
    assert counts.min() < counts.max()
    ours = forward_flops(
        architecture(config), TokenCounts(counts.mean().item(), counts.square().mean().item())
    )
    parts = {
        name: sum(operations.values()) / batch for name, operations in flop_counter.get_flop_counts().items()
    }

    for name in ("encoder", "decoder", "router", "residual_proj", "final_layer", "dechunk"):
        assert ours[name] == pytest.approx(parts[f"DCDiT.{name}"]), name
    assert ours["embeddings"] == pytest.approx(parts["DCDiT.x_embedder"] + parts["DCDiT.t_embedder"])
    blocks = sum(parts[f"DCDiT.blocks.{k}"] for k in range(3))
    softmax = 3 * 3 * 4 * counts.square().mean().item()
    assert ours["blocks"] + ours["attention"] - softmax == pytest.approx(blocks)
    assert sum(ours.values()) - softmax == pytest.approx(parts["Global"])


def test_fewer_tokens_cost_less_in_the_transformer_only():
    config = tiny()
    full, half = (
        forward_flops(architecture(config), TokenCounts(36, 36**2)),
        forward_flops(architecture(config), TokenCounts(18, 18**2)),
    )
    assert {name for name in full if full[name] != half[name]} == {"blocks", "attention"}
    assert half["attention"] == full["attention"] / 4


@pytest.mark.parametrize("size", TABLE)
def test_every_component_of_the_paper_sizes_against_the_counter(size, smooth_on_grid):
    """With fake tensors, so that no weights exist."""

    def attention_products(qkv, lengths, out_val=None, out_shape=None):
        return 2 * 2 * qkv[2] * qkv[3] * qkv[0] ** 2 // lengths[0]  # all lengths are equal

    config, batch, tokens = load_config(CONFIGS / f"DCDiT-{size}-N4.yaml"), 2, 256
    with FakeTensorMode():
        model = build_model(config)
        arguments = torch.empty(batch, 4, 32, 32), torch.empty(batch), torch.empty(batch, dtype=torch.int64)
        with (
            torch.no_grad(),
            FlopCounterMode(display=False, custom_mapping={ATTEND: attention_products}) as counter,
        ):
            model(*arguments, tokens=tokens)
    ours = forward_flops(architecture(config), TokenCounts(tokens, tokens**2))
    parts = {name: sum(operations.values()) / batch for name, operations in counter.get_flop_counts().items()}
    for name in ("encoder", "decoder", "router", "residual_proj", "final_layer", "dechunk"):
        assert ours[name] == parts[f"DCDiT.{name}"], name
    assert ours["embeddings"] == parts["DCDiT.x_embedder"] + parts["DCDiT.t_embedder"]
    blocks = range(len(model.blocks))
    softmax = len(blocks) * 3 * config.model.hnet.num_heads[1] * tokens**2
    assert ours["blocks"] + ours["attention"] - softmax == sum(parts[f"DCDiT.blocks.{k}"] for k in blocks)
    assert sum(ours.values()) - softmax == parts["Global"]


VAES = {
    "stable diffusion": {**STABLE_DIFFUSION, "latent_channels": 4},
    "small": {"block_out_channels": (8, 16, 16), "layers_per_block": 1, "latent_channels": 3, "out_channels": 3,
              "norm_num_groups": 4, "mid_block_add_attention": False, "use_post_quant_conv": False},
}  # fmt: skip


@pytest.mark.parametrize("vae", VAES)
def test_decoder_against_the_counter(vae):
    from diffusers import AutoencoderKL

    config, side = VAES[vae], 8
    stages = len(config["block_out_channels"])
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * stages,
        "up_block_types": ("UpDecoderBlock2D",) * stages,
    }
    with torch.device("meta"):
        model = AutoencoderKL(**config, **blocks)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.decode(torch.empty(1, config["latent_channels"], side, side))
    softmax = 3 * side**4 if config.get("mid_block_add_attention", True) else 0
    assert sum(decoder_flops(model.config, Grid(side, side)).values()) - softmax == counter.get_total_flops()


def test_the_table_needs_no_weights(capsys):
    flops.main(
        [
            "--config",
            str(CONFIGS / "DCDiT-B-N4.yaml"),
            "--budgets",
            "0",
            "0.6",
            "--num-sampling-steps",
            "1000",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:28].strip(): line[28:].split() for line in lines}
    assert rows["kept tokens"] == ["256", "102"] and rows["residual_proj"] == ["1.208", "1.208"]
    assert rows["GFLOP per forward pass"] == ["59.123", "30.907"] == rows["TFLOP per image, 1000 steps"]
    assert "autoencoder: 0.622 TFLOP more" in lines[-1]
    flops.main(["--config", str(CONFIGS / "DCDiT-B-N4.yaml"), "--dry-run"])
    printed = capsys.readouterr().out
    assert "arch_layout" in printed and "GFLOP" not in printed


def test_peaks_by_the_drivers_name():
    peaks = {
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA L40S": 362e12,
        "NVIDIA GeForce RTX 4090": 165e12, "Tesla V100-SXM2-16GB": None, "NVIDIA A1000": None,
    }  # fmt: skip
    assert {name: peak_flops(name) for name in peaks} == peaks


@pytest.mark.parametrize("name", ["ema", "mse", "stabilityai/sd-vae-ft-ema", "stabilityai/sd-vae-ft-mse"])
def test_the_published_decoders_by_any_name(name):
    assert decoder_config(name) is STABLE_DIFFUSION
