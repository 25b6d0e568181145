"""Averages of chosen length: their profile, the reconstruction against a direct average, and a run."""

import csv

import numpy as np
import pytest
import torch
from torch import nn

import sample
from config import UserError
from figures import ema_lengths
from weights import reconstruct as command
from weights.averages import PowerAverages, PowerSettings
from weights.checkpoint import load_checkpoint
from weights.posthoc import Snapshot, exponent, list_snapshots, overlap, reconstruct, residual


def profile(std, step):
    """Share of each step's weights in a power-function average, by its definition: (step,)."""
    s = np.arange(1, step + 1)
    shares = s ** exponent(std) / step ** (exponent(std) + 1)
    return shares / shares.sum()


def test_the_exponent_gives_the_standard_deviation():
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01)  # the two of the paper
    assert exponent(0.10) == pytest.approx(6.94, abs=0.01)
    for std in (0.02, 0.05, 0.1, 0.25):
        step = 20000
        shares = profile(std, step)
        times = np.arange(1, step + 1) / step
        mean = (shares * times).sum()
        assert ((shares * (times - mean) ** 2).sum()) ** 0.5 == pytest.approx(std, rel=1e-2)


def test_overlaps_are_integrals():
    one, other = Snapshot(600, 0.05), Snapshot(1000, 0.1)
    a, b = exponent(0.05), exponent(0.1)
    s = (np.arange(600_000) + 0.5) / 1000
    product = (a + 1) * s**a / 600 ** (a + 1) * (b + 1) * s**b / 1000 ** (b + 1)
    assert overlap(one, other) == pytest.approx(product.sum() / 1000, rel=1e-4)
    assert residual([one, other], other) == pytest.approx(0, abs=1e-6)


class Walk(nn.Module):
    """A weight that moves by a random step each time."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(50, dtype=torch.float64))


def test_reconstruction_is_the_average_that_was_not_tracked(tmp_path):
    """Of a random walk: from snapshots of 0.05 and 0.1 at every 100 steps, the averages of other lengths."""
    model, history = Walk(), []
    parameters = {"weight": model.weight.detach()}
    tracked = PowerAverages(PowerSettings(stds=[0.05, 0.1]), parameters)
    direct = PowerAverages(PowerSettings(stds=[0.07, 0.12]), parameters)
    for step in range(1, 2001):
        with torch.no_grad():
            model.weight += torch.randn(50, dtype=torch.float64)
        history.append(model.weight.detach().clone())
        tracked.update(parameters, step)
        direct.update(parameters, step)
        if step % 100 == 0:
            tracked.save_snapshot(tmp_path, step)
    spread = torch.stack(history).std()
    files = list_snapshots(tmp_path)
    assert len(files) == 40
    for std in (0.07, 0.12):
        # The running update is the profile
        by_definition = (torch.stack(history) * torch.from_numpy(profile(std, 2000))[:, None]).sum(0)
        assert (direct.tracked[std]["weight"] - by_definition).abs().max() < 0.01 * spread
        # And the reconstruction is the running update
        found = reconstruct(files, Snapshot(2000, std))["weight"]
        assert residual(list(files), Snapshot(2000, std)) < 0.02
        assert (found - direct.tracked[std]["weight"]).abs().max() < 0.03 * spread


def test_a_run_with_snapshots_resumes_and_is_reconstructed(run, tiny_extractor, tmp_path, capsys):
    change = "training.posthoc_ema_stds=[0.05,0.1]"
    assert run("whole", change, "logging.ckpt_every=1")[0] == [0]
    assert run("parts", change, "logging.ckpt_every=1", "training.max_steps=5")[0] == [0]
    assert run("parts", change, "logging.ckpt_every=1")[0] == [0]
    last = [load_checkpoint(tmp_path / name / "checkpoints" / "0000008.pt") for name in ("whole", "parts")]
    for std in ("0.05", "0.1"):
        for name, value in last[0]["posthoc"][std].items():
            assert torch.equal(value, last[1]["posthoc"][std][name])
    assert len(list_snapshots(tmp_path / "whole")) == 16

    # A tracked length comes back as it is, in half precision
    command.main([str(tmp_path / "whole"), "--std", "0.1", "--output", str(tmp_path / "a.safetensors")])
    assert "from 16 snapshots, profile reproduced to 0.0%" in capsys.readouterr().out
    weights = load_checkpoint(tmp_path / "a.safetensors")["ema"]
    for name, value in last[0]["posthoc"]["0.1"].items():
        torch.testing.assert_close(weights[name], value, atol=1e-3, rtol=1e-2)

    # Another length samples
    argv = [
        str(tmp_path / "whole"),
        "--std",
        "0.08",
        "--step",
        "6",
        "--output",
        str(tmp_path / "b.safetensors"),
    ]
    command.main(argv)
    assert load_checkpoint(tmp_path / "b.safetensors")["step"] == 6
    sample.main(
        [
            "--ckpt",
            str(tmp_path / "b.safetensors"),
            "--num-sampling-steps",
            "2",
            "--output",
            str(tmp_path / "s"),
        ]
    )
    assert (tmp_path / "s" / "sample.png").is_file()
    # A short run's EMA is young; this is another average
    assert "warning" not in capsys.readouterr().out

    # The figure of distance against length has a point for each length, and one for the EMA of training
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", images)
    argv = (
        f"{tmp_path}/whole --reference {tmp_path}/reference.npz --features {tiny_extractor} --num-samples 4"
    )
    argv += " --num-sampling-steps 2 --stds"
    ema_lengths.main([*argv.split(), "0.05,0.1"])
    first = read_points(tmp_path / "whole" / "ema_lengths" / "pareto.csv")
    assert list(first) == ["tiny", "std 0.05", "std 0.1"] and len(set(first.values())) == 3
    picture = tmp_path / "whole" / "ema_lengths" / "ema_lengths.png"
    before = picture.read_bytes()
    ema_lengths.main([*argv.split(), "0,0.1"])
    second = read_points(tmp_path / "whole" / "ema_lengths" / "pareto.csv")
    assert second == first | {"std 0": second["std 0"]} and picture.read_bytes() != before


def read_points(path):
    """Name -> Fréchet distance."""
    with open(path, newline="") as stream:
        return {row["name"]: float(row["frechet_distance"]) for row in csv.DictReader(stream)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--std", "0.3", "--output", "x.safetensors"], "--std 0.3: must be above 0 and below 0.28"),
        (["--std", "0.1", "--output", "x.pt"], "is a weights file, whose name ends in .safetensors"),
        (["--std", "0.1", "--output", "x.safetensors"], "has no snapshots in posthoc/"),
    ],
)
def test_mistakes(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        command.main([str(tmp_path), *options])


def test_an_average_cannot_start_in_the_middle(run, tmp_path):
    assert run("before")[0] == [0]
    start = f"training.resume_from_ckpt={tmp_path / 'before' / 'checkpoints' / '0000006.pt'}"
    codes, printed = run("after", start, "training.posthoc_ema_stds=[0.1]", "training.max_steps=9")
    assert codes == [2]
    assert "training.posthoc_ema_stds: 0.1 is not tracked in the checkpoint" in printed
