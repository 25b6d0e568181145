"""An average of one's own: by its definition, resumed, started late, and used in place of the EMA."""

import importlib
import shutil
import sys

import kills
import pytest
import torch
from torch import nn

import plugins
import sample
from config import UserError, load_config
from sampling import hub
from sampling.load import load_trained
from weights import convert
from weights.averages import AVERAGES, WeightAverages, read_settings
from weights.checkpoint import load_checkpoint

MEAN = ["training.averages.mean.start=5", "logging.ckpt_every=1"]


@pytest.fixture(autouse=True)
def example(monkeypatch):
    """Knows the average of the example in one test alone; other tests list what the repository has."""
    monkeypatch.delitem(sys.modules, "examples.my_paper", raising=False)
    for name in ("add_router", "add_term", "add_objective", "add_average"):
        monkeypatch.setattr(plugins, name, lambda *_: None)
    module = importlib.import_module("examples.my_paper")
    monkeypatch.setitem(AVERAGES, "mean", module.MeanAverage)
    yield
    # Whoever imports it next has it registered
    sys.modules.pop("examples.my_paper")


def test_trains_resumes_and_samples(run, tmp_path, monkeypatch):
    assert run("whole", *MEAN)[0] == [0]
    checkpoints = tmp_path / "whole" / "checkpoints"
    states = {step: load_checkpoint(checkpoints / f"{step:07d}.pt") for step in range(5, 9)}
    # The mean of the weights after steps 6 to 8
    average = states[8]["weight_averages"]["mean"]["weights"]
    for name, value in average.items():
        mean = sum(states[step]["model"][name] for step in (6, 7, 8)) / 3
        torch.testing.assert_close(value, mean)

    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for step in (7, 8):
        (tmp_path / "parts" / "checkpoints" / f"{step:07d}.pt").unlink()
    codes, printed = run("parts", *MEAN)
    assert codes == [0] and "resuming from step 6" in printed
    kills.assert_same_training(tmp_path / "whole", tmp_path / "parts")

    # In place of the EMA, from the checkpoint and from a weights file of it, without the module that adds it
    monkeypatch.delitem(AVERAGES, "mean")
    last = str(checkpoints / "0000008.pt")
    trained = load_trained(last, weights="mean")
    assert all(torch.equal(value, average[name]) for name, value in trained.model.named_parameters())
    assert "Weights of the average `mean` after 8 steps." in hub.model_card(trained)
    few = ["--num-sampling-steps", "2", "--classes", "0"]
    sample.main(["--ckpt", last, "--weights", "mean", *few, "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "sample.png").is_file()
    convert.main([last, str(tmp_path / "mean.safetensors"), "--weights", "mean"])
    assert load_trained(tmp_path / "mean.safetensors").fingerprint == trained.fingerprint
    with pytest.raises(
        UserError, match="holds the 'mean' weights only, so --weights model has nothing to take"
    ):
        load_trained(tmp_path / "mean.safetensors", weights="model")
    with pytest.raises(UserError, match="has no average 'mean'; --weights takes one of ema, model"):
        load_trained(checkpoints / "0000005.pt", weights="mean")


def test_starts_in_a_run_that_resumes_before_its_first_step(run, tmp_path):
    assert run("before")[0] == [0]
    start = f"training.resume_from_ckpt={tmp_path / 'before' / 'checkpoints' / '0000006.pt'}"
    codes, printed = run("late", start, "training.averages.mean.start=5")
    assert codes == [2]
    assert "training.averages.mean: is not in the checkpoint with these settings" in printed
    assert run("early", start, "training.averages.mean.start=6")[0] == [0]
    first = tmp_path / "early" / "checkpoints" / "0000008.pt"
    # Of other settings, it is another average
    again = f"training.resume_from_ckpt={first}"
    codes, printed = run("other", again, "training.averages.mean.start=7", "training.max_steps=9")
    assert codes == [2] and "is not in the checkpoint with these settings" in printed
    # The remedy in a run's own folder is a command that works: with the step, too, it would not
    for folder, *changes in (
        ("early", start, "training.averages.mean.start=5"),
        ("before", "training.posthoc_ema_stds=[0.1]"),
    ):
        codes, printed = run(folder, *changes, "training.max_steps=9")
        assert codes == [2] and "start at step 0 from its weights with" in printed


def test_what_has_not_begun_writes_nothing(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(AVERAGES["mean"], "save_snapshot", lambda self, run, step: written.append(step))
    averages = WeightAverages(load_config(None, MEAN), nn.Linear(2, 2))
    for step in (5, 6):
        averages.save_snapshots(tmp_path, step)
    assert written == [6]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            "training.averages.median.start=1",
            "training.averages.median: is no known average; name the module",
        ),
        ("training.averages.mean={}", "training.averages.mean.start: is missing; give it"),
        ("training.averages.mean={start: 1, end: 2}", "unknown key 'training.averages.mean.end'"),
        ("training.averages.mean.start=-1", "training.averages.mean.start: -1 must be at least 0"),
        ("training.averages.posthoc={}", "its lengths are training.posthoc_ema_stds"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(UserError, match=message):
        read_settings(load_config(None, [change]))
