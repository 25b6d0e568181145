"""examples/autoguidance.py: a model that guides itself gives the samples that guidance and no guidance give."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_demo import save_random

from config import UserError, load_config
from diffusion.guidance import guide
from examples import autoguidance
from sampling.budgets import Budget
from sampling.generate import draw_labels, generate, summarise_run
from sampling.load import load_trained
from sampling.options import SamplingOptions

MODEL = str(Path(__file__).parent.parent / "assets" / "shapes")
SAMPLES = 4
SMALL = ["--num-samples", str(SAMPLES), "--num-sampling-steps", "4", "--batch-size", "3"]


def sample(tmp_path, *options):
    file = tmp_path / "new" / "guided.npz"
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


def test_samples_are_not_replaced(tmp_path):
    (tmp_path / "keep.npz").write_bytes(b"others")
    with pytest.raises(UserError, match="keep.npz': exists; give another file"):
        autoguidance.parse(["--ckpt", "x", "--guide", "x", "--output", str(tmp_path / "keep.npz")])
    with pytest.raises(UserError, match="--guide 'nowhere'"):
        sample(tmp_path, "--guide", "nowhere")


def test_a_guide_that_knows_what_the_model_knows_changes_nothing(tmp_path):
    samples = sample(tmp_path, "--cfg-scale", "3", "--tell-class")
    images, _, _ = expected()
    torch.testing.assert_close(torch.from_numpy(samples["arr_0"]), images, rtol=0, atol=1)


def test_guidance_goes_from_the_guide_to_the_model(tiny_config, tmp_path):
    """In a step of a random DC-DiT and a random static DiT of the same latents: g + scale * (m - g)."""
    config = load_config(tiny_config)
    model = load_trained(save_random(config, tmp_path / "model"))
    static = load_config(tiny_config, ["model.patch_size=2"])
    weaker = load_trained(save_random(static, tmp_path / "guide"))
    pair = autoguidance.GuidedModel(model, weaker, tell_class=True)
    x, t, labels = torch.randn(2, *config.latent_shape), torch.tensor([500, 500]), torch.tensor([0, 1])
    null = torch.full_like(labels, config.data.num_classes)
    with torch.inference_mode():
        guided = guide_by(pair, {"labels": labels}, {"labels": null}, 3.0, channels=4)(x, t)
        own, other = model.model(x, t, labels).prediction, weaker.model(x, t, labels).prediction
    expected = other[:, :4] + 3 * (own[:, :4] - other[:, :4])
    torch.testing.assert_close(guided[:, :4], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided[:, 4:], own[:, 4:], rtol=1e-4, atol=1e-5)


def guide_by(pair, conditional, unconditional, scale, channels):
    """Guidance as the sampler does it."""

    def denoise(x, t, **conditioning):
        return pair(x, t, **conditioning).prediction

    return guide(denoise, conditional, unconditional, scale, channels)


def test_what_cannot_guide_is_refused(tiny_config, tmp_path):
    static = str(save_random(load_config(tiny_config, ["model.patch_size=2"]), tmp_path))
    with pytest.raises(UserError, match="--guide .* has other classes, another diffusion process"):
        sample(tmp_path, "--guide", static)
    with pytest.raises(UserError, match="--guide-drop: --ckpt is a static DiT, which drops nothing"):
        sample(tmp_path, "--ckpt", static, "--guide", static, "--guide-drop", "0.5")
    for change, reason in (
        ("training.class_dropout_prob=0", "--ckpt: was trained only with classes, or only without"),
        ("model.router=random", "--ckpt: has a router that draws at random"),
    ):
        other = str(save_random(load_config(tiny_config, [change]), tmp_path / change))
        with pytest.raises(UserError, match=reason):
            sample(tmp_path, "--ckpt", other, "--guide", other)
    with pytest.raises(UserError, match="--guide-drop 1.5: must be at least 0 and below 1"):
        sample(tmp_path, "--guide-drop", "1.5")
    with pytest.raises(UserError, match="--cfg-scale 1: 1 is no guidance"):
        sample(tmp_path, "--cfg-scale", "1")
    assert not (tmp_path / "new").exists()
