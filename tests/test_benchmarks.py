"""The benchmarks' textbook versions are oracles: every stage and the whole model agree with them, on less memory."""

import json

import pytest
import torch

import benchmarks.__main__ as command
from benchmarks import measure, stages, steps
from benchmarks.cases import make_case, plain_forward
from config import UserError, config_from_dict

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def case():
    hnet = {"arch_layout": ["c1", ["D2"], "c1"], "d_model": [64, 64], "num_heads": [2, 2]}
    config = config_from_dict({"model": {"hnet": hnet}, "data": {"image_size": 128, "num_classes": 3}})
    return make_case(config, 3, CPU, bf16=False)


def test_stages_agree_and_keep_less(case):
    rows = {row["stage"]: row for row in stages.measure_stages(case, seconds=0)}
    assert set(rows) == {"encoder", "decoder", "router", "pack", "attention", "block", "dechunk"}
    for name, row in rows.items():
        assert row["difference"] < 1e-5, name
    assert rows["block"]["ratio saved"] < 0.5
    assert rows["dechunk"]["ratio saved"] < 1 / 3 and rows["dechunk"]["ratio peak"] < 0.6


def test_whole_model_agrees_and_keeps_less(case):
    ours, theirs = case.model(*case.inputs), plain_forward(case, *case.inputs)
    torch.testing.assert_close(ours.prediction, theirs.prediction, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.routing.keep, theirs.routing.keep) and ours.routing.keep.float().mean() < 0.4
    lean = steps.Training(case, case.model).saved()
    textbook = steps.Training(case, lambda *inputs: plain_forward(case, *inputs), textbook=True).saved()
    assert lean < 0.75 * textbook, lean / textbook


def test_lite_guidance_gives_the_branches_their_own_masks(case):
    seen = []

    def forward(*inputs):
        out = case.model(*inputs)
        seen.append(out.routing.keep.sum(1))
        return out

    steps.sampling(case, forward, lite=True)()
    conditional, unconditional = seen[0].chunk(2)
    assert torch.equal(conditional, (case.prob > 0.5).sum(1)) and (unconditional < conditional / 2).all()


def test_memory_counters_on_known_sizes():
    x = torch.randn(1000, 100, requires_grad=True)  # 400 kB
    assert measure.saved_bytes(lambda: x.exp().exp(), [x]) == 800_000  # exp keeps its result
    assert measure.saved_bytes(lambda: x * x, [x]) == 0
    assert measure.peak_bytes(lambda: x.detach() + 1 + 1, CPU) == pytest.approx(800_000, rel=0.01)


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        command.around, "measure_updates", lambda *arguments: [{"what": "nothing", "ms": 0.0}]
    )  # takes GB
    loading = command.around.measure_loading
    monkeypatch.setattr(command.around, "measure_loading", lambda images, seconds: loading(16, seconds))
    file = tmp_path / "out.json"
    earlier = {
        "another machine": {"loading": []},
        measure.machine(CPU): {"loading": [], "steps": [{"ms": 1}]},
    }
    file.write_text(json.dumps(earlier))
    command.main(["--device", "cpu", "--only", "around", "--seconds", "0", "--output", str(file)])
    content = json.loads(file.read_text())
    tables = content[measure.machine(CPU)]
    assert content["another machine"] == {"loading": []} and tables["steps"] == [
        {"ms": 1}
    ]  # other measurements stay
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


def test_a_row_of_steps(monkeypatch, case):
    monkeypatch.setattr(steps, "load", lambda name: case.config)
    row = steps.measure_step("small", 2, CPU, False, 1e12, 0.0, False)
    assert row["model"] == "small" and all(value > 0 for key, value in row.items() if key != "model")
