"""The textbook versions are oracles: every stage and the whole model agree with them, on less memory."""

import json
import os
import pickle
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import benchmarks.__main__ as command
from benchmarks import attention, budgets, meters, plan, recipes, report, roofline, runner, stages, steps
from benchmarks.step_functions import TrainingStep, sampling_step
from benchmarks.workload import Case, Setup, build_workload, varied_masks
from config import UserError, config_from_dict
from models import architecture, build_model, flops
from models.ops.rows import modulate

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SETUP = Setup(CPU, bf16=False, seconds=0)
SHAPES = Case("shapes", 2)


@pytest.fixture(scope="module")
def workload():
    hnet = {"arch_layout": ["c1", ["D2"], "c1"], "d_model": [64, 64], "num_heads": [2, 2]}
    config = config_from_dict({"model": {"hnet": hnet}, "data": {"image_size": 128, "num_classes": 3}})
    return build_workload(config, 3, SETUP)


def test_stages_agree_and_keep_less(workload):
    rows = {row["stage"]: row for row in stages.compare_stages(workload, SETUP)}
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


@pytest.fixture(scope="module")
def report_folder(tmp_path_factory) -> Path:
    """Where the whole command wrote its file and its report, in tiny sizes."""
    folder = tmp_path_factory.mktemp("benchmarks") / "new"
    done = run_command(folder / "out.json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


def run_command(output: Path, *more: str, device="cpu", launcher=("-m", "benchmarks")):
    """python -m benchmarks in a process of its own."""
    argv = ["--device", device, "--smoke", "--seconds", "0", "--output", str(output), *more]
    command = [sys.executable, *launcher, *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def measured(folder: Path) -> dict:
    """Part -> job -> result, of the one machine in the file."""
    (parts,) = json.loads((folder / "out.json").read_text()).values()
    return parts


def test_every_part_is_measured_and_reported(report_folder):
    report = (report_folder / "out.md").read_text()
    jobs = plan.plan_jobs(plan.choose_sizes("cpu", smoke=True))
    for job in jobs:
        result = measured(report_folder)[job.part][job.name]
        assert result.get("rows"), (job, result)
        assert f"## {job.part.capitalize()}\n" in report
    assert "not measured" not in report
    # The parts that only large sizes or several processes have
    assert set(plan.PARTS) - {job.part for job in jobs} == {"compiled", "graphs", "resolutions", "processes"}


def test_the_device_computes_what_was_recorded(report_folder):
    rows = [row for job in measured(report_folder)["correctness"].values() for row in job["rows"]]
    assert {row["precision"] for row in rows} == {"float32", "bfloat16"} and len(rows) == 12
    for row in rows:
        assert row["right"] == "yes", row
        if row["precision"] == "float32":
            assert row["tokens decided differently"] == 0 and row["prediction"] < 1e-5


def test_the_command_resumes(report_folder, tmp_path):
    """It measures what is missing or failed, and leaves the rest."""
    file = tmp_path / "out.json"
    content = json.loads((report_folder / "out.json").read_text())
    (machine,) = content
    before = content[machine]["loading"]
    del content[machine]["updates"]
    content[machine]["batches"] = {"shapes, batch 2": {"failed": "It took longer."}}
    content["another machine"] = {"loading": {}}
    file.write_text(json.dumps(content))
    done = run_command(file)
    assert done.returncode == 0 and "2 of 2 measured" in done.stdout, done.stdout + done.stderr
    after = json.loads(file.read_text())
    assert after["another machine"] == {"loading": {}} and after[machine]["loading"] == before
    assert after[machine]["updates"] and "rows" in after[machine]["batches"]["shapes, batch 2"]


def end_process(setup):
    os._exit(9)


def raise_error(setup):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_job_that_fails_loses_its_own_rows_only(tmp_path, capsys):
    file = tmp_path / "out.json"
    for measure, reason in ((end_process, "ended with status 9"), (raise_error, "CUDA out of memory")):
        assert not runner.run_job(plan.Job("steps", measure.__name__, measure), SETUP, file, "here")
        assert reason in capsys.readouterr().out
    results = report.read_json(file)["here"]
    report.write_report(tmp_path / "out.md", "here", {"GPU": "none"}, results, plan.PARTS)
    text = (tmp_path / "out.md").read_text()
    assert "**end_process**: not measured." in text and "- GPU: none" in text


def test_a_slow_job_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LONGEST", 0.1)
    assert not runner.run_job(plan.Job("steps", "slow", wait_long), SETUP, tmp_path / "out.json", "here")
    assert "longer than" in report.read_json(tmp_path / "out.json")["here"]["steps"]["slow"]["failed"]


def wait_long(setup):
    time.sleep(600)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_jobs_of_every_device(device):
    """Names are unique in their part, and every configuration exists."""
    jobs = plan.plan_jobs(plan.choose_sizes(device, smoke=False))
    names = [(job.part, job.name) for job in jobs]
    assert len(set(names)) == len(names)
    for job in jobs:
        for argument in getattr(job.measure, "args", ()):
            if isinstance(argument, Case):
                assert argument.config()
        pickle.dumps(job)


def test_chosen_jobs():
    def chosen(*argv, done=frozenset()):
        return [(job.part, job.name) for job in command.chosen_jobs(command.parse([*argv]), set(done))]

    everything = chosen("--device", "cpu")
    assert chosen("--device", "cpu", done=everything) == []
    assert chosen("--device", "cpu", done=everything[1:]) == everything[:1]
    assert chosen("--device", "cpu", "--only", "loading", done=everything) == [("loading", "stores")]
    own = chosen("--device", "cpu", "--model", "DCDiT-B-N4", "--batch", "3")
    assert own == [("steps", "DCDiT-B-N4, batch 3"), ("compiled", "DCDiT-B-N4, batch 3")]
    assert chosen("--device", "cpu", "--only", "loading", "--tf32") == [("loading", "stores, TF32")]


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


def test_dropping_rows_start_at_one():
    rows = steps.measure_dropping(SHAPES, SETUP)
    assert [row["dropped"] for row in rows] == [0, 0.2, 0.4, 0.6]
    assert rows[0]["time"] == rows[0]["flops"] == 1
    assert rows[3]["flops"] < rows[1]["flops"] < 1


def test_costs_of_budgets_are_those_of_the_account():
    """FLOPs fall with the budget, and Lite-CFG saves half of what it drops."""
    rows = budgets.measure_budgets(SHAPES, SETUP)
    cost = {(row["way"], row["dropped"]): row["FLOPs"] for row in rows}
    assert cost["guidance", 0] == 1
    assert cost["guidance", 0.9] < cost["guidance", 0.6] < cost["guidance", 0.3] < 1
    assert cost["Lite-CFG", 0.9] == cost["guidance", 0.9]
    half = (cost["guidance", 0] + cost["guidance", 0.9]) / 2
    assert cost["Lite-CFG", 0] == pytest.approx(half, rel=1e-3)
    for row in rows:
        assert row["ms per image and step"] > 0 and row["excess"] == pytest.approx(row["time"] / row["FLOPs"])


def test_masks_differ_in_the_number_of_tokens(workload):
    counts = [int((mask > 0.5).sum()) for mask in varied_masks(workload)]
    assert len(set(counts)) == len(counts) > 1


def test_attention_kernels_are_compared_with_softmax():
    rows = attention.measure_kernels(SHAPES, SETUP)
    ran = {(row["kernel"], row["precision"]): row for row in rows if not row["cannot run because"]}
    assert set(ran) == {(kernel, dtype) for kernel in ("sdpa", "auto") for dtype in ("bfloat16", "float32")}
    for (_, precision), row in ran.items():
        assert row["gradient error"] < (1e-5 if precision == "float32" else 2e-2)


# ----------------------------------------------------------------------------------------------- roofline


def test_bytes_of_an_operation():
    """By hand: an addition reads two tensors and writes one, a gather reads the rows it takes, a view nothing."""
    with FakeTensorMode(), roofline.Counter(tf32=False) as counter:
        x = torch.empty(100, 10, device="cuda")
        index = torch.empty(5, dtype=torch.int64, device="cuda")
        x + x.view(100, 10)
        assert counter.counts.bytes == 3 * 4000 and counter.counts.launches == 1
        x.index_select(0, index)
        assert counter.counts.bytes == 12000 + 2 * 200 + 40
        x + x[:1].expand(100, 10)
        assert counter.counts.launches == 3


def test_a_chosen_model_has_no_precisions_on_a_gpu():
    case = Case("DCDiT-S-N4", 1)
    assert command.with_steps_of(plan.CPU, case).precisions == (case,)
    assert command.with_steps_of(plan.CUDA, case).precisions == ()


def test_bytes_of_a_triton_kernel():
    """By hand: one launch that reads tokens, modulators and the sample of each token, and writes tokens."""
    pytest.importorskip("triton")
    with roofline.fake_gpu(), roofline.Counter(tf32=False) as counter:
        x, modulators = torch.empty(100, 64, device="cuda"), torch.empty(2, 64, device="cuda")
        sample = torch.empty(100, dtype=torch.int64, device="cuda")
        modulate(x, modulators, modulators, sample, 1e-6, torch.bfloat16)
    assert counter.counts.launches == 1
    assert counter.counts.bytes == counter.counts.pass_bytes == 25600 + 2 * 512 + 800 + 12800


def test_products_count_as_the_formulas_say():
    """FLOPs of a guided step are those of models/flops.py, in float32 those of router, projection and dechunk."""
    case = Case("DCDiT-B-N4", 2)
    counts = roofline.count_sampling(case, dropped=0.6)
    network = architecture(case.config())
    expected = flops.forward_flops(network, flops.TokenCounts(102, 102**2))
    softmax = network.heads * 3 * 102**2 * 12
    assert counts.all_flops == pytest.approx(4 * (sum(expected.values()) - softmax), rel=0.01)
    scaffold = expected["router"] + expected["residual_proj"] + expected["dechunk"]
    assert counts.flops["float32"] == pytest.approx(4 * scaffold, rel=0.01)


def test_a_training_step_is_three_forward_passes():
    """In products; bytes, launches and time of the whole table are finite and positive."""
    case = Case("shapes", 4)
    counts = roofline.count_training(case, tf32=True)
    network = architecture(case.config())
    forward = flops.total_flops(network, flops.TokenCounts(64, 64**2))
    assert counts.all_flops == pytest.approx(3 * 4 * forward, rel=0.1)
    assert counts.flops["float32"] == 0 and counts.flops["TF32"] > 0
    assert 0 < counts.device_seconds <= counts.seconds


def test_recipes_are_of_the_configurations_that_there_are():
    """docs/recipes.md has a row for every one, and the numbers of one of them are those of today's code."""
    rows = {}
    for line in recipes.PAGE.read_text().splitlines():
        if line.startswith("| `"):
            name, *cells = line.strip("| ").split(" | ")
            rows[name.strip("`")] = cells
    shipped = {file.stem for file in (ROOT / "configs").glob("*DiT-*.yaml")}
    assert rows.keys() == shipped and shipped > recipes.PAPER_FID.keys()
    _, *values = recipes.recipe("DCDiT-S-N16").values()
    shown = rows["DCDiT-S-N16"]
    assert shown[1] == values[1]
    for text, value in zip([shown[0], *shown[2:6]], [values[0], *values[2:6]], strict=True):
        assert float(text) == pytest.approx(value, rel=0.05)


def test_gradients_node_by_node():
    """`backward` gives every parameter the gradient that PyTorch's engine gives it."""
    config = Case("shapes", 2).config()
    model = build_model(config)
    x, t, labels = torch.randn(2, 4, 16, 16), torch.tensor([5, 900]), torch.tensor([0, 3])

    def gradients(run):
        model.zero_grad()
        out = model(x, t, labels, tokens=20)
        run(out.prediction.square().sum() + out.routing.prob.sum())
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients(torch.Tensor.backward)
    for ours, wanted in zip(gradients(roofline.backward), expected, strict=True):
        torch.testing.assert_close(ours, wanted)
