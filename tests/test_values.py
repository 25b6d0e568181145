"""Every value of the keys for research trains, resumes bitwise and samples. Independent keys share a run."""

import json
import shutil
from pathlib import Path
from typing import get_args, get_type_hints

import kills
import numpy as np
import pytest
from test_codecs import CHANNELS, STRIDES, codecs  # noqa: F401 - a fixture

import extract_features
import sample
from config_keys import DiffusionConfig, ModelConfig
from data.codecs import CODECS, PIXELS
from data.columns import add_column
from diffusion import OBJECTIVES
from models.embeddings import CONDITIONS
from models.router import ROUTERS
from training.losses import TERMS
from weights.checkpoint import load_checkpoint

# Kind of autoencoder, size of the images, and keys
RUNS = {
    "hnet": (
        "dc",
        [32],
        {
            "model.router": "hnet",
            "model.min_tokens": "9",
            "training.downsample_factor": "2",
            "diffusion.prediction": "velocity",
            "diffusion.timestep_sampling": "logit_normal",
        },
    ),
    "uniform": (
        "tiny",
        [32],
        {
            "model.router": "uniform",
            "model.hnet.dechunk_kernel_sigma": "0",
            "training.downsample_factor": "16",
            "diffusion.objective": "flow",
            "diffusion.flow_shift": "2",
        },
    ),
    "random": (
        "pixels-4",
        [32],
        {
            "model.router": "random",
            "model.init": "released",
            "training.downsample_factor": "8",
            "diffusion.noise_schedule": "squaredcos_cap_v2",
            "diffusion.cfg_channels": "all",
        },
    ),
    "contrast": (
        "pixels",
        [8, 12],
        {
            "model.router": "contrast",
            "model.residual_projection": "false",
            "training.downsample_factor": "4",
            "training.posthoc_ema_stds": "[0.05, 0.1]",
            "diffusion.prediction": "epsilon",
        },
    ),
    "learned": (
        "kl",
        [24, 40],
        {
            "model.router": "learned",
            "model.init": "adaln_zero",
            "training.downsample_factor_points": "0:2,500:4,1000:8",
            "training.terms.align": "{weight: 0.5, block: 0, column: tokens, hidden: 8}",
            "data.conditions": "{score: scalar, text: vector-3}",
            "diffusion.objective": "gaussian",
            "diffusion.noise_schedule": "linear",
            "diffusion.timestep_sampling": "uniform",
        },
    ),
    "static": (
        "kl",
        [24, 40],
        {
            "model.patch_size": "2",
            "training.terms.align": "{weight: 0.5, block: 0, column: tokens, hidden: 8}",
            "data.conditions": "{score: scalar, text: vector-3}",
            "diffusion.objective": "flow",
        },
    ),
}
# Packages whose values need a run; those of a module of one's own do not
PACKAGES = ("models", "diffusion", "training")


def names_of_own(registry):
    """The names in a registry that this repository has, whatever other tests have added."""
    found = set()
    for name, entry in registry.items():
        made_by = getattr(entry, "build", entry)  # an objective is made by a function
        if made_by.__module__.split(".")[0] in PACKAGES:
            found.add(name)
    return found


# Key -> the values that this repository has
CHOICES = {
    "model.router": names_of_own(ROUTERS),
    "model.init": set(get_args(get_type_hints(ModelConfig)["init"])),
    "diffusion.objective": names_of_own(OBJECTIVES),
    "diffusion.prediction": set(get_args(get_type_hints(DiffusionConfig)["prediction"])),
    "diffusion.timestep_sampling": set(get_args(get_type_hints(DiffusionConfig)["timestep_sampling"])),
    "diffusion.noise_schedule": set(get_args(get_type_hints(DiffusionConfig)["noise_schedule"])),
    "training.downsample_factor": {"2", "4", "8", "16"},
}
KINDS = names_of_own(CONDITIONS)
NAMES = names_of_own(TERMS) - {"ratio"}  # whose keys are others, and which every learned router has


@pytest.mark.parametrize("key", CHOICES)
def test_every_choice_has_a_run(key):
    assert {keys[key] for _, _, keys in RUNS.values() if key in keys} == CHOICES[key]


def test_every_condition_term_and_codec_has_a_run(codecs):  # noqa: F811
    every = str([keys for _, _, keys in RUNS.values()])
    for kind in KINDS:
        assert f": {kind.removesuffix('N')}" in every, kind
    for term in NAMES:
        assert f"training.terms.{term}" in every, term
    trained = {kind for kind, _, _ in RUNS.values()}
    assert trained == set(codecs)
    classes = {json.loads((path / "config.json").read_text())["_class_name"] for path in folders(codecs)}
    assert classes == set(CODECS)


def folders(codecs):  # noqa: F811
    """Those of the autoencoders that are diffusers folders."""
    return [Path(folder) for kind, folder in codecs.items() if not kind.startswith(PIXELS)]


@pytest.fixture
def features(codecs, tiny_images, tmp_path):  # noqa: F811
    """A function that extracts features with all columns, and returns the overrides that name them."""

    def extract(kind, size):
        folder = tmp_path / "features"
        argv = [
            "--data-path",
            tiny_images,
            "--features-path",
            folder,
            "--vae",
            codecs[kind],
            "--num-workers",
            0,
        ]
        extract_features.main([str(word) for word in [*argv, "--image-size", *size]])
        draw = np.random.default_rng(0)
        columns = {"score": np.linspace(0, 1, 10), "text": draw.normal(size=(10, 3))}
        columns["tokens"] = draw.normal(size=(10, 15, 5))
        for name, rows in columns.items():
            np.save(tmp_path / f"{name}.npy", rows)
            add_column(folder, name, tmp_path / f"{name}.npy")
        keys = {
            "data.feature_path": folder,
            "data.image_size": size if len(size) > 1 else size[0],
            "data.vae": codecs[kind],
            "data.latent_stride": STRIDES[kind],
            "data.latent_channels": CHANNELS[kind],
        }
        return [f"{key}={value}" for key, value in keys.items()]

    return extract


@pytest.mark.parametrize("name", RUNS)
def test_trains_resumes_and_samples(run, features, tmp_path, name):
    kind, size, keys = RUNS[name]
    changes = [*features(kind, size), *(f"{key}={value}" for key, value in keys.items())]
    assert run("whole", *changes)[0] == [0]
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "checkpoints" / "0000008.pt").unlink()
    codes, printed = run("parts", *changes)
    assert codes == [0] and "resuming from step 6" in printed
    kills.assert_same_training(tmp_path / "whole", tmp_path / "parts")

    checkpoint = tmp_path / "whole" / "checkpoints" / "0000008.pt"
    state = load_checkpoint(checkpoint)
    assert state["autoencoder"]["stride"] == STRIDES[kind]
    if name in ROUTERS:
        assert (state["config"]["training"]["ratio_loss_weight"] > 0) == ROUTERS[name].is_learned
    argv = ["--ckpt", checkpoint, "--num-sampling-steps", 2, "--classes", 0, 1, "--cfg-scale", 1.5]
    argv += ["--output", tmp_path / "out", "--no-visualize"]
    if "data.conditions" in keys:
        argv += ["--condition", "score=0.7", "--condition", f"text={tmp_path / 'one.npy'}"]
        np.save(tmp_path / "one.npy", np.arange(3))
    sample.main([str(word) for word in argv])
    assert (tmp_path / "out" / "sample.png").is_file()
    decoding = json.loads((tmp_path / "out" / "summary.json").read_text())["tflop_decoding"]
    assert (decoding > 0) != kind.startswith(PIXELS)
