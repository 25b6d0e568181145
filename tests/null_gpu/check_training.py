"""Training on the null GPU: train.py as a user runs it, and exact counts of a step."""

import pytest
import torch

import train


def test_train_and_resume(tiny_config, tmp_path, capsys):
    argv = ["--config", str(tiny_config), "--output", str(tmp_path / "run")]
    train.main([*argv, "--set", "training.max_steps=4"])
    assert "x cuda, bf16" in (tmp_path / "run" / "log.txt").read_text()
    train.main([*argv, "--set", "training.max_steps=6"])
    assert "resuming from step 4, 1 x cuda" in (tmp_path / "run" / "log.txt").read_text()
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "0000006.pt", weights_only=True)
    assert checkpoint["step"] == 6
