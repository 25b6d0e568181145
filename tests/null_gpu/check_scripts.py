"""Every script on the null GPU as a user runs it: in bfloat16, with and without budgets."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import evaluate
import extract_features
import sample
import sample_ddp
import train
from data.features import open_features
from figures import elastic_grid, pareto
from figures.side_by_side import Choice, SideBySide
from null_gpu.counts import counting
from sampling.load import load_trained
from sampling.pipeline import DCDiTPipeline
from toy import classifier, shapes


@pytest.fixture(autouse=True)
def new_accelerator():
    """Accelerate keeps the precision of a process; every run here has its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def checkpoint(tiny_config, tmp_path_factory) -> Path:
    """A checkpoint of two steps on the device."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train.main(["--config", str(tiny_config), "--output", str(folder), "--set", "training.max_steps=2"])
    return folder / "checkpoints" / "0000002.pt"


def test_training_resumes(tiny_config, tmp_path):
    folder = tmp_path / "run"
    argv = ["--config", str(tiny_config), "--output", str(folder)]
    train.main([*argv, "--set", "training.max_steps=4"])
    assert "starting, 1 x cuda, bf16" in (folder / "log.txt").read_text()
    train.main([*argv, "--set", "training.max_steps=6"])
    assert "resuming from step 4, 1 x cuda, bf16" in (folder / "log.txt").read_text()
    assert (folder / "checkpoints" / "0000006.pt").exists()


# What changes which CUDA code runs
VARIANTS = {
    "static DiT": ["model.patch_size=2"],
    "gradient checkpointing": ["training.gradient_checkpointing=true"],
    "float32": ["training.precision=fp32"],
    "loader processes": ["data.num_workers=2"],
    "samples and evaluation": ["logging.sample_every=2", "evaluation.every=2", "evaluation.num_samples=4"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_with(variant, tiny_config, tiny_extractor, tmp_path):
    folder = tmp_path / "run"
    reference = save_images(tmp_path / "reference.npz")
    paths = [f"evaluation.reference={reference}", f"evaluation.features={tiny_extractor}"]
    overrides = []
    for override in ["training.max_steps=2", *paths, *VARIANTS[variant]]:
        overrides += ["--set", override]
    train.main(["--config", str(tiny_config), "--output", str(folder), *overrides])
    assert (folder / "checkpoints" / "0000002.pt").exists()


# Graphs need the caching allocator, which is switched off here: check_compile.py has them
BUDGETS = {
    "nothing": [],
    "a share": ["--tail-dropping-fraction", "0.5"],
    "tokens": ["--token-budget", "20", "--no-cuda-graph"],
    "lite": ["--token-budget", "20", "--lite-cfg", "--uncond-token-budget", "10", "--no-cuda-graph"],
    "flops": ["--tflops-per-image", "1"],
    "schedule": ["--budget-schedule", "1000:0.6,0:0"],
}


@pytest.mark.parametrize("budget", BUDGETS)
def test_sampling(budget, checkpoint, tmp_path):
    steps = ["--num-sampling-steps", "3", "--classes", "0", "1"]
    sample.main(["--ckpt", str(checkpoint), "--output", str(tmp_path), *steps, *BUDGETS[budget]])
    assert Image.open(tmp_path / "sample.png").size[1] >= 32
    assert json.loads((tmp_path / "summary.json").read_text())


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_samplers(sampler, checkpoint, tmp_path):
    steps = ["--num-sampling-steps", "3", "--classes", "0", "--sampler", sampler, "--no-visualize"]
    sample.main(["--ckpt", str(checkpoint), "--output", str(tmp_path), *steps])


def test_sampling_many(checkpoint, tmp_path):
    """Seven images in batches of three, then three more."""
    folder = tmp_path / "samples"
    argv = ["--ckpt", str(checkpoint), "--output-dir", str(folder), "--num-sampling-steps", "2"]
    sample_ddp.main([*argv, "--num-fid-samples", "7", "--per-proc-batch-size", "3"])
    sample_ddp.main([*argv, "--num-fid-samples", "10", "--per-proc-batch-size", "3"])
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (10, 32, 32, 3)


def test_extraction(tiny_images, tiny_vae, tmp_path):
    """Latents come from the device, and encoding a batch reads it once."""
    paths = ["--data-path", str(tiny_images), "--features-path", str(tmp_path), "--vae", str(tiny_vae)]
    with counting() as counts:
        extract_features.main([*paths, "--image-size", "32", "--num-workers", "0"])
    assert len(open_features(tmp_path, 32)) == 10
    assert counts.convolutions > 0 and counts.to_host == 1


def test_evaluation(tiny_extractor, tmp_path):
    samples = save_images(tmp_path / "a.npz")
    reference = save_images(tmp_path / "b.npz")
    cache = ["--features", str(tiny_extractor), "--cache", str(tmp_path / "cache")]
    evaluate.main([str(samples), str(reference), *cache])
    assert "frechet_distance" in json.loads((tmp_path / "a.evaluation.json").read_text())


def save_images(path: Path) -> Path:
    """Twenty images of 32 x 32 pixels."""
    np.savez(path, np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8))
    return path


def test_figures(checkpoint, tiny_extractor, tmp_path):
    reference = save_images(tmp_path / "reference.npz")
    command = ["--ckpt", str(checkpoint), "--reference", str(reference), "--features", str(tiny_extractor)]
    plan = ["--num-samples", "8", "--num-sampling-steps", "2", "--budgets", "0,0.5", "--bf16"]
    pareto.main([*command, *plan, "--output", str(tmp_path / "pareto")])
    assert (tmp_path / "pareto" / "pareto.csv").exists()
    grid = [
        "--ckpt",
        str(checkpoint),
        "--num-sampling-steps",
        "2",
        "--classes",
        "0",
        "--fractions",
        "0",
        "0.5",
    ]
    elastic_grid.main([*grid, "--output", str(tmp_path / "grid.png")])
    assert (tmp_path / "grid.png").exists()


def test_pipeline(checkpoint):
    """The scheduler is the host's: a step reads the number of kept tokens and waits for nothing else."""
    pipe = DCDiTPipeline.from_pretrained(checkpoint, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    waits = []
    for steps in (2, 3):
        with counting() as counts:
            output = pipe([0, 1], drop_fraction=0.4, num_inference_steps=steps, generator=generator)
        waits.append(counts.waits)
    assert len(output.images) == 2
    assert waits[1] - waits[0] == 1


def test_toy_classifier(tmp_path):
    images = tmp_path / "images"
    shapes.write_images(images, 32, image_size=16)
    argv = ["--images", str(images), "--image-size", "16", "--steps", "2"]
    classifier.main([*argv, "--output", str(tmp_path / "classifier.pt")])


def test_demo(checkpoint):
    """The function behind the page."""
    drawing = SideBySide(load_trained(checkpoint, "cuda"), 2, "ddim")
    *_, last = drawing.views(Choice(0, 0, 2.0, 0.5, 0.8), 0)
    assert last.image.shape == (288, 288, 3)
