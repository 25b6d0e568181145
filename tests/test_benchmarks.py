"""The textbook versions are oracles: every stage and the whole model agree with them, on less memory."""

import json
import weakref

import pytest
import torch

import benchmarks.__main__ as command
from benchmarks import meters, report, stages, steps
from benchmarks.step_functions import TrainingStep, sampling_step
from benchmarks.workload import Setup, build_workload
from config import UserError, config_from_dict

CPU = torch.device("cpu")
SETUP = Setup(CPU, bf16=False, seconds=0)


@pytest.fixture(scope="module")
def workload():
    hnet = {"arch_layout": ["c1", ["D2"], "c1"], "d_model": [64, 64], "num_heads": [2, 2]}
    config = config_from_dict({"model": {"hnet": hnet}, "data": {"image_size": 128, "num_classes": 3}})
    return build_workload(config, 3, SETUP)


def test_stages_agree_and_keep_less(workload):
    rows = {row["stage"]: row for row in stages.measure_stages(workload, SETUP)}
    assert set(rows) == {"encoder", "decoder", "router", "pack", "attention", "block", "dechunk"}
    for name, row in rows.items():
        assert row["difference"] < 1e-5, name
    assert rows["block"]["ratio saved"] < 0.5
    assert rows["dechunk"]["ratio saved"] < 1 / 3 and rows["dechunk"]["ratio peak"] < 0.6


def test_whole_model_agrees_and_keeps_less(workload):
    out = workload.model(*workload.inputs)
    expected = workload.textbook_forward(*workload.inputs)
    torch.testing.assert_close(out.prediction, expected.prediction, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.routing.keep, expected.routing.keep)
    assert out.routing.keep.float().mean() < 0.4
    saved = TrainingStep(workload, workload.model).saved_bytes()
    textbook = TrainingStep(workload, workload.textbook_forward, is_textbook=True).saved_bytes()
    assert saved < 0.75 * textbook, saved / textbook


def test_lite_guidance_gives_the_branches_their_own_masks(workload):
    seen = []

    def forward(*inputs):
        out = workload.model(*inputs)
        seen.append(out.routing.keep.sum(1))
        return out

    before = workload.prob
    sampling_step(workload, forward, workload.prob, lite=True)()
    conditional, unconditional = seen[0].chunk(2)
    assert torch.equal(conditional, (workload.prob > 0.5).sum(1))
    assert (unconditional < conditional / 2).all()
    assert workload.prob is before


def test_memory_counters_on_known_sizes():
    x = torch.randn(1000, 100, requires_grad=True)  # 400 kB
    assert meters.saved_bytes(lambda: x.exp().exp(), [x]) == 800_000  # exp keeps its result
    assert meters.saved_bytes(lambda: x * x, [x]) == 0
    assert meters.peak_bytes(lambda: x.detach() + 1 + 1, CPU) == pytest.approx(800_000, rel=0.01)


def test_counting_memory_frees_the_graph():
    """exp keeps its own result for the backward pass: a hook that kept it would hold the graph for ever."""
    x = torch.randn(10, requires_grad=True)
    results = []

    def forward():
        result = x.exp()
        results.append(weakref.ref(result))
        return result.sum()

    assert meters.saved_bytes(forward, [x]) == 40
    assert results[0]() is None


def test_command_line(tmp_path, capsys, monkeypatch):
    nothing = [{"what": "nothing", "ms": 0.0}]
    monkeypatch.setattr(command.updates, "measure_updates", lambda *arguments: nothing)  # takes GB
    measure_loading = command.loading.measure_loading
    monkeypatch.setattr(
        command.loading, "measure_loading", lambda images, seconds: measure_loading(16, seconds)
    )
    file = tmp_path / "out.json"
    machine = report.machine(CPU)
    earlier = {"another machine": {"loading": []}, machine: {"loading": [], "steps": [{"ms": 1}]}}
    file.write_text(json.dumps(earlier))
    command.main(["--device", "cpu", "--only", "around", "--seconds", "0", "--output", str(file)])
    content = json.loads(file.read_text())
    tables = content[machine]

    # Other measurements stay
    assert content["another machine"] == {"loading": []}
    assert tables["steps"] == [{"ms": 1}]
    assert {row["store"] for row in tables["loading"]} == {"moments", "sample", "official"}
    assert "| official |" in capsys.readouterr().out


MISTAKES = [
    ("--only nothing", "--only"),
    ("--batch 0", "--batch 0: must be at least 1"),
    ("--model DiT-B-2", "--model DiT-B-2: is a static DiT"),
    ("--output {file}", "holds no measurements"),
]


@pytest.mark.parametrize("options, part", MISTAKES)
def test_mistakes(tmp_path, options, part):
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(UserError, match=part):
        command.main(options.format(file=tmp_path / "other.json").split())


def test_the_default_device_is_one_with_benchmarks(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert command.parse([]).device in ("cpu", "cuda")


def test_a_row_of_steps(monkeypatch, workload):
    monkeypatch.setattr(steps, "load", lambda name: workload.config)
    row = steps.measure_step("small", 2, SETUP, peak=1e12, compiled=False)
    assert row["model"] == "small"
    assert all(value > 0 for key, value in row.items() if key != "model")


def test_rows_of_dropping_start_at_one(monkeypatch, workload):
    monkeypatch.setattr(steps, "load", lambda name: workload.config)
    rows = steps.measure_dropping("small", 2, SETUP)
    assert [row["dropped"] for row in rows] == [0, 0.2, 0.4, 0.6]
    assert rows[0]["time"] == rows[0]["flops"] == 1
    assert rows[3]["flops"] < rows[1]["flops"] < 1
