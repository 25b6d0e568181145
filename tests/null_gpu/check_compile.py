"""torch.compile and CUDA graphs on the null GPU: Triton compiles its kernels for the device that it sees."""

from torch._dynamo.utils import counters

import sample
import sample_ddp
import train
from training.trainer import Trainer


def test_training_and_sampling(tiny_config, tmp_path, monkeypatch, capsys):
    """Compiled for the first number of tokens and for all others, and never again; then inside a CUDA graph."""
    graphs: list[int] = []
    step = Trainer.optimizer_step

    def count_graphs(trainer, batches):
        step(trainer, batches)
        graphs.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(Trainer, "optimizer_step", count_graphs)
    run = tmp_path / "run"
    overrides = ["--set", "training.max_steps=4", "--set", "training.gradient_accumulation_steps=1"]
    train.main(["--config", str(tiny_config), "--output", str(run), "--compile", *overrides])
    assert graphs[0] < graphs[1] == graphs[3]
    assert not counters["graph_break"]

    checkpoint = str(run / "checkpoints" / "0000004.pt")
    options = [
        "--num-sampling-steps",
        "3",
        "--classes",
        "0",
        "--token-budget",
        "20",
        "--cuda-graph",
        "--compile",
    ]
    sample.main(["--ckpt", checkpoint, "--output", str(tmp_path), *options])
    assert (tmp_path / "sample.png").exists()

    # Without the compiler, graphs are the default under a token budget
    options = ["--num-sampling-steps", "2", "--num-fid-samples", "4", "--per-proc-batch-size", "2"]
    argv = ["--ckpt", checkpoint, "--output-dir", str(tmp_path / "samples"), *options]
    sample_ddp.main([*argv, "--token-budget", "20"])
    assert "evaluations run as CUDA graphs" in capsys.readouterr().out
    assert len(list((tmp_path / "samples").glob("*.png"))) == 4
