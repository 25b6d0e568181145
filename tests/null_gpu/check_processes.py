"""Two processes on one null GPU, which talk by gloo: NCCL refuses two on one device.

The processes are forks of this one, which has imported everything but diffusers: that would ask for a device, and
forks of a process that has asked for one cannot use it.
"""

from pathlib import Path

import kills
import numpy as np
import pytest
from conftest import TINY_CONFIG, save_tiny_vae

import evaluate
import extract_features
import sample_ddp
import train


@pytest.fixture
def in_two_processes(tmp_path, monkeypatch):
    """Run the main function of a script; what both processes printed."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    printed = tmp_path / "printed"

    def run(main, *arguments: object) -> str:
        printed.unlink(missing_ok=True)
        codes = kills.attempt(main, list(arguments), printed, [None, None])
        assert codes == [0, 0], printed.read_text()[-4000:]
        return printed.read_text()

    return run


@pytest.fixture
def vae(tmp_path) -> Path:
    process = kills.FORK.Process(target=save_tiny_vae, args=(tmp_path / "vae",))
    process.start()
    process.join()
    return tmp_path / "vae"


def test_the_workflow(in_two_processes, tiny_images, vae, tiny_extractor, tmp_path):
    features = tmp_path / "features"
    paths = ["--data-path", tiny_images, "--features-path", features, "--vae", vae]
    printed = in_two_processes(extract_features.main, *paths, "--image-size", 32, "--num-workers", 0)
    assert "10 of 10 images to encode" in printed

    config, run = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(TINY_CONFIG.format(folder=tmp_path, vae=vae))
    in_two_processes(train.main, "--config", config, "--output", run, "--set", "training.max_steps=3")
    assert "2 x cuda:0, bf16" in (run / "log.txt").read_text()

    checkpoint, samples = run / "checkpoints" / "0000003.pt", tmp_path / "samples"
    options = ["--num-sampling-steps", 2, "--num-fid-samples", 6, "--per-proc-batch-size", 2]
    in_two_processes(sample_ddp.main, "--ckpt", checkpoint, "--output-dir", samples, *options)
    archive = tmp_path / "samples.npz"
    assert np.load(archive)["arr_0"].shape == (6, 32, 32, 3)

    cache = tmp_path / "cache"
    in_two_processes(evaluate.main, archive, archive, "--features", tiny_extractor, "--cache", cache)
    assert (tmp_path / "samples.evaluation.json").exists()
