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


def test_whole_model_agrees_and_keeps_at_most_half(case):
    ours, theirs = case.model(*case.inputs), plain_forward(case, *case.inputs)
    torch.testing.assert_close(ours.prediction, theirs.prediction, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.routing.keep, theirs.routing.keep) and ours.routing.keep.float().mean() < 0.4
    lean = steps.Training(case, case.model).saved()
    assert lean < steps.Training(case, lambda *inputs: plain_forward(case, *inputs), textbook=True).saved()


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
    monkeypatch.setattr(command.around, "measure_updates", lambda *arguments: [{"what": "nothing", "ms": 0.0}])  # takes GB
    loading = command.around.measure_loading
    monkeypatch.setattr(command.around, "measure_loading", lambda images, seconds: loading(16, seconds))
    command.main(["--device", "cpu", "--only", "around", "--seconds", "0", "--output", str(tmp_path / "out.json")])
    tables = json.loads((tmp_path / "out.json").read_text())["tables"]
    assert {row["layout"] for row in tables["loading"]} == {"memory map", "file per image"}
    assert "| memory map |" in capsys.readouterr().out
    with pytest.raises(UserError, match="--only"):
        command.main(["--only", "nothing"])
