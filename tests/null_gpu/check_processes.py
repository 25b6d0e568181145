"""Two processes on one null GPU, which talk by gloo: NCCL refuses two on one device."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]


def torchrun(*arguments: object) -> str:
    """Run a script in two processes; its output."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "tests/null_gpu/script.py", *(str(argument) for argument in arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def test_the_workflow(tiny_config, tiny_images, tiny_vae, tiny_extractor, tmp_path):
    features = tmp_path / "features"
    paths = ["--data-path", tiny_images, "--features-path", features, "--vae", tiny_vae]
    assert "10 images" in torchrun("extract_features.py", *paths, "--image-size", 32, "--num-workers", 0)

    run = tmp_path / "run"
    torchrun("train.py", "--config", tiny_config, "--output", run, "--set", "training.max_steps=3")
    assert "2 x cuda:0, bf16" in (run / "log.txt").read_text()
    torchrun(
        "sample_ddp.py", "--ckpt", run / "checkpoints" / "0000003.pt", "--output-dir", tmp_path / "samples",
        "--num-sampling-steps", 2, "--num-fid-samples", 6, "--per-proc-batch-size", 2, "--no-cuda-graph",
    )  # fmt: skip
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (6, 32, 32, 3)

    archive = tmp_path / "samples.npz"
    cache = tmp_path / "cache"
    torchrun("evaluate.py", archive, archive, "--features", tiny_extractor, "--cache", cache)
    assert (tmp_path / "samples.evaluation.json").exists()
