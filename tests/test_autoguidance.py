"""examples/autoguidance.py: a model that guides itself gives the samples that guidance and no guidance give."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_demo import save_random

from config import UserError, load_config
from examples import autoguidance
from sampling.budgets import Budget
from sampling.generate import draw_labels, generate, summarise_run
from sampling.load import load_trained
from sampling.options import SamplingOptions

MODEL = str(Path(__file__).parent.parent / "assets" / "shapes")
SAMPLES = 4
SMALL = ["--num-samples", str(SAMPLES), "--num-sampling-steps", "4", "--batch-size", "3"]


def sample(tmp_path, *options):
    file = tmp_path / "guided.npz"
    autoguidance.main(["--ckpt", MODEL, "--guide", MODEL, *SMALL, *options, "--output", str(file)])
    return np.load(file)


def expected(**options):
    """Images (n, H, W, 3) of the plain sampler, their labels and their TFLOP per image."""
    trained = load_trained(MODEL)
    chosen = SamplingOptions(num_sampling_steps=4, sampler="ddim", **options)
    labels = draw_labels(0, list(range(SAMPLES)), trained.config.data.num_classes)
    (batch,) = generate(trained, list(range(SAMPLES)), labels, chosen)
    tflop = summarise_run(trained, chosen, batch.record())["tflop_per_image"]["mean"]
    return batch.images.permute(0, 2, 3, 1), labels, tflop


@pytest.mark.parametrize("drop", [0.0, 0.8])
def test_the_model_as_its_own_guide_is_guidance(tmp_path, capsys, drop):
    samples = sample(tmp_path, "--cfg-scale", "2", "--guide-drop", str(drop))
    uncond = Budget.fraction(drop) if drop else None
    images, labels, tflop = expected(cfg_scale=2.0, uncond=uncond)
    assert samples["arr_1"].tolist() == labels
    torch.testing.assert_close(torch.from_numpy(samples["arr_0"]), images, rtol=0, atol=1)
    assert f"{SAMPLES} samples, {tflop:.4f} TFLOP per image" in capsys.readouterr().out


def test_a_guide_that_knows_what_the_model_knows_changes_nothing(tmp_path):
    samples = sample(tmp_path, "--cfg-scale", "3", "--tell-class")
    images, _, _ = expected()
    torch.testing.assert_close(torch.from_numpy(samples["arr_0"]), images, rtol=0, atol=1)


def test_what_cannot_guide_is_refused(tiny_config, tmp_path):
    static = str(save_random(load_config(tiny_config, ["model.patch_size=2"]), tmp_path))
    with pytest.raises(UserError, match="--guide .* has another diffusion process, latent size or number"):
        sample(tmp_path, "--guide", static)
    with pytest.raises(UserError, match="--guide-drop 0.5: a static DiT has no router"):
        sample(tmp_path, "--ckpt", static, "--guide", static, "--guide-drop", "0.5")
    with pytest.raises(UserError, match="--cfg-scale 1: 1 is no guidance"):
        sample(tmp_path, "--cfg-scale", "1")
    assert not (tmp_path / "guided.npz").exists()
