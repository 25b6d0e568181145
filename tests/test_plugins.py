"""A user's own router, objective and loss term, in a module that --import names."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from config import UserError
from examples import autoguidance
from figures import ema_lengths, kept_tokens, pareto
from scripts import evidence

ROOT = Path(__file__).parent.parent


def command(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=120)


def test_a_module_of_the_user_trains_and_samples(tiny_config, tmp_path):
    shutil.copy(ROOT / "examples" / "my_paper.py", tmp_path)
    train = [str(ROOT / "train.py"), "--config", str(tiny_config), "--output", str(tmp_path / "run")]
    keys = ["--set", "model.router=centre", "--set", "diffusion.objective=steep_flow"]
    keys += ["--set", "training.terms.confidence.weight=0.1"]
    refused = command(tmp_path, *train, *keys)
    assert refused.returncode == 2
    assert "model.router: 'centre' must be one of learned, " in refused.stderr
    assert "name the module that adds another with --import" in refused.stderr

    trained = command(tmp_path, *train, "--import", "my_paper", *keys)
    assert trained.returncode == 0, trained.stderr
    assert "confidence_loss" in (tmp_path / "run" / "metrics.jsonl").read_text()
    sample = [str(ROOT / "sample.py"), "--ckpt", str(tmp_path / "run" / "checkpoints" / "0000008.pt")]
    sample += ["--num-sampling-steps", "2", "--output", str(tmp_path / "out")]
    # Loading a checkpoint executes nothing: the module must be named again
    refused = command(tmp_path, *sample)
    assert refused.returncode == 2 and "--import" in refused.stderr
    sampled = command(tmp_path, *sample, "--import", "my_paper", "--sampler", "steep-euler")
    assert sampled.returncode == 0, sampled.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["options"]["sampler"] == "steep-euler"

    # Every other program that loads a checkpoint can name it, too
    hub = ["-m", "sampling.hub", "--ckpt", sample[2], "--output", str(tmp_path / "hub")]
    published = subprocess.run(
        [sys.executable, *hub, "--import", "examples.my_paper"], cwd=ROOT, capture_output=True, text=True
    )
    assert published.returncode == 0, published.stderr

    missing = command(tmp_path, *train, "--import", "my_papers")
    assert missing.returncode == 2
    assert missing.stderr.splitlines()[-1].startswith("error: --import my_papers: ModuleNotFoundError")


@pytest.mark.parametrize(
    "parse, needed",
    [
        (pareto.parse, ["--ckpt", "x", "--reference", "x"]),
        (ema_lengths.parse, ["x", "--reference", "x"]),
        (kept_tokens.parse, ["x"]),
        (evidence.parse, ["x", "--reference", "x"]),
        (autoguidance.parse, ["--ckpt", "x", "--guide", "x"]),
    ],
)
def test_programs_that_load_checkpoints_import_modules(parse, needed):
    with pytest.raises(UserError, match="--import no_such_module: ModuleNotFoundError"):
        parse([*needed, "--import", "no_such_module"])
