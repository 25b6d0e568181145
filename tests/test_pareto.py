"""Quality against cost, evaluation during training, and the small classifier, all on tiny models."""

import csv
import json
import re
import warnings
from pathlib import Path

import kills
import numpy as np
import pytest
import torch
from PIL import Image

import train
from config import UserError, load_config, to_dict
from data.features import open_features
from evaluation import sample_features
from evaluation.extractors import load_extractor
from evaluation.metrics import Gaussian, frechet_distance
from evaluation.pareto import PointTable
from evaluation.sample_features import SamplePlan, measure_samples
from figures import elastic_grid, pareto
from figures.pareto import Curve, Mark, compare_curves, read_curves
from models import architecture, build_model, flops
from processes import group, lock
from sampling.budgets import Budget
from sampling.generate import SamplingOptions, draw_labels, generate, load_trained
from toy import classifier, shapes
from weights.checkpoint import save_checkpoint

CPU = torch.device("cpu")
ALONE = group.Processes(0, 1, CPU)
SAMPLES, STEPS = 6, 2


@pytest.fixture(scope="module", autouse=True)
def on_one_thread_of_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "default_device", lambda local_rank=0: CPU)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tiny_config, tmp_path_factory) -> Path:
    """Models a.pt and b.pt, large.pt of larger images, static.pt, a static DiT, classless.pt, and reference.npz."""
    folder = tmp_path_factory.mktemp("pareto")
    overrides_of = {"a": [], "b": [], "large": ["data.image_size=64"], "static": ["model.patch_size=2"]}
    overrides_of["classless"] = ["training.class_dropout_prob=1.0"]
    for step, (name, overrides) in enumerate(overrides_of.items(), 1):
        config = load_config(tiny_config, [f"model.name={name}", *overrides])
        torch.manual_seed(step)
        model = build_model(config)
        for tensor in model.parameters():
            tensor.data += 0.05 * torch.randn_like(tensor)  # zero initialisation would make all models equal
        if name != "static":
            # Keeps all 64 tokens, so that every budget drops some
            model.router.residual_scorer[-1].bias.data.fill_(20.0)
        weights = model.state_dict()
        store = open_features(config.data.feature_path, 32)
        state = {"step": step, "config": to_dict(config), "model": weights, "ema": weights, "optimizer": {}}
        save_checkpoint(
            folder, state | {"autoencoder": store.autoencoder, "class_names": store.class_names}, keep=0
        )
        (folder / f"{step:07d}.pt").rename(folder / f"{name}.pt")
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "reference.npz", images)
    return folder


def arguments(place: Path, output: Path, extractor: Path, *more) -> list[str]:
    fixed = [
        "--reference",
        place / "reference.npz",
        "--features",
        extractor,
        "--num-samples",
        SAMPLES,
        "--output",
        output,
    ]
    fixed += ["--num-sampling-steps", STEPS, "--batch-size", 4]
    return [str(part) for part in (*fixed, *more)]


# Columns that differ from run to run
CHANGING = ("ms_per_image", "peak_memory_mb", "measured")


def exact(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows without what differs from run to run."""
    return [{key: row[key] for key in row if key not in CHANGING} for row in rows]


def read(output: Path) -> list[dict[str, str]]:
    with open(output / "pareto.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def test_table_of_points(place, tiny_extractor, tmp_path, monkeypatch, capsys):
    """Every budget, scale and Lite-CFG of both models. The same call samples nothing; more budgets add rows."""
    models = ["--ckpt", place / "a.pt", "--ckpt", place / "b.pt", "--cfg-scale", "1,2", "--lite-cfg", "0.75"]
    argv = arguments(place, tmp_path, tiny_extractor, *models, "--budgets", "0,0.5")
    pareto.main(argv)
    rows, printed = read(tmp_path), capsys.readouterr().out
    points = [(row["name"], float(row["cfg_scale"]), float(row["budget"]), row["lite_cfg"]) for row in rows]
    of_one = [(1, 0, ""), (1, 0.5, ""), (2, 0, ""), (2, 0.5, ""), (2, 0, "0.75"), (2, 0.5, "0.75")]
    assert points == [(name, *point) for name in "ab" for point in of_one]
    assert (
        "the samples: 6 images give 9 features a covariance of rank 5 at most" in printed
        and "12 points" in printed
    )
    assert Image.open(tmp_path / "pareto.png").size[0] > 600  # two panels
    assert {path.name for path in tmp_path.iterdir()} == {"pareto.csv", "pareto.png", "reference"}

    for whole, half in zip(rows[0::2], rows[1::2]):
        assert float(half["tflop_per_image"]) < float(whole["tflop_per_image"])
        assert float(half["kept_share"]) < float(whole["kept_share"])
    cost = {point: float(row["tflop_per_image"]) for point, row in zip(points, rows)}
    assert cost["a", 1, 0, ""] < cost["a", 2, 0, "0.75"] < cost["a", 2, 0, ""]
    for row in rows:
        assert (row["seed"], row["images"], row["steps"], row["reference_images"]) == ("0", "6", "2", "20")
        assert float(row["ms_per_image"]) > 0 and float(row["peak_memory_mb"]) > 0
        # One call has measured them all, and their times can be compared
        assert row["measured"] == rows[0]["measured"] != ""
        assert 0 <= float(row["precision"]) <= 1 and 0 <= float(row["class_accuracy"]) <= 1

    with monkeypatch.context() as patch:
        patch.setattr(sample_features, "generate", None)
        pareto.main(argv)
    assert read(tmp_path) == rows
    table = (tmp_path / "pareto.csv").read_text().splitlines(keepends=True)
    (tmp_path / "pareto.csv").write_text("".join(table[:5] + table[6:]))  # without one point
    pareto.main(arguments(place, tmp_path, tiny_extractor, *models, "--budgets", "0,0.25,0.5"))
    again = read(tmp_path)
    assert len(again) == 18 and all(row in exact(again) for row in exact(rows))


def test_a_point_is_what_sampling_and_comparing_give(place, tiny_extractor, tmp_path):
    pareto.main(
        arguments(
            place, tmp_path, tiny_extractor, "--ckpt", place / "a.pt", "--cfg-scale", "2", "--budgets", "0.5"
        )
    )
    (row,) = read(tmp_path)
    run = load_trained(place / "a.pt")
    labels = draw_labels(0, list(range(SAMPLES)), 3)
    options = SamplingOptions(cfg_scale=2.0, num_sampling_steps=STEPS, budget=Budget.fraction(0.5))
    batches = list(generate(run, list(range(SAMPLES)), labels, options, batch_size=4))
    images = torch.cat([batch.images for batch in batches]).numpy()
    with np.load(place / "reference.npz") as arrays:
        reference = arrays["arr_0"].transpose(0, 3, 1, 2)

    def gaussian(x):
        x = np.concatenate([x.astype(np.float32).mean((2, 3)), x[:, :, 0, 0], x[:, :, -1, -1]], axis=1)
        return Gaussian(x.mean(0), np.cov(x, rowvar=False), len(x))

    assert float(row["frechet_distance"]) == pytest.approx(
        frechet_distance(gaussian(images), gaussian(reference)), rel=1e-4
    )
    accuracy = (images.astype(np.float32).mean((2, 3)).argmax(1) == labels).mean()
    assert float(row["class_accuracy"]) == pytest.approx(accuracy)
    kept = [torch.stack([step.conditional for step in batch.kept]).double().mean(0) / 64 for batch in batches]
    assert float(row["kept_share"]) == pytest.approx(torch.cat(kept).mean().item())


def test_a_static_model_is_one_point_per_scale(place, tiny_extractor, tmp_path, capsys):
    models = [
        "--ckpt",
        place / "a.pt",
        "--ckpt",
        place / "static.pt",
        "--budgets",
        "0,0.5",
        "--cfg-scale",
        "1,2",
    ]
    pareto.main(arguments(place, tmp_path, tiny_extractor, *models, "--lite-cfg", "0.75"))
    rows = read(tmp_path)
    assert len(rows) == 6 + 2
    static = [row for row in rows if row["static"] == "True"]
    assert [(row["name"], row["cfg_scale"], row["budget"], row["lite_cfg"]) for row in static] == [
        ("static", "1.0", "0.0", ""),
        ("static", "2.0", "0.0", ""),
    ]
    config = load_trained(place / "static.pt").config
    forward = flops.total_flops(architecture(config), flops.TokenCounts(16, 16**2)) / 1e12  # 4 x 4 patches
    for row, branches in zip(static, (1, 2)):
        assert float(row["kept_share"]) == 1
        assert float(row["tflop_per_image"]) == pytest.approx(branches * STEPS * forward, rel=1e-6)
    printed = capsys.readouterr().out
    assert "a, 1 steps against static, 4 steps" in printed and "Lite-CFG 75% against static" in printed


def test_without_a_scale_each_model_has_the_one_that_it_can_do(place, tiny_extractor, tmp_path, capsys):
    """Samples without a class have no class accuracy; and TF32 is another question."""
    models = ["--ckpt", place / "a.pt", "--ckpt", place / "classless.pt"]
    pareto.main(arguments(place, tmp_path, tiny_extractor, *models))
    rows = read(tmp_path)
    assert [(row["name"], row["cfg_scale"]) for row in rows] == [("a", "1.0"), ("classless", "0.0")]
    assert rows[0]["class_accuracy"] and not rows[1]["class_accuracy"]
    with pytest.raises(UserError, match=r"holds points with features torchscript:\w* instead of .*\+tf32"):
        pareto.main(arguments(place, tmp_path, tiny_extractor, *models, "--tf32"))


def test_samples_do_not_depend_on_the_processes(place, tiny_extractor, tmp_path):
    run, extractor = load_trained(place / "a.pt"), load_extractor(str(tiny_extractor), None, CPU)
    options, labels = SamplingOptions(num_sampling_steps=STEPS), [0, 1, 2, 0, 1, 2, 0]
    plan = SamplePlan(options, labels, batch_size=2)
    one = measure_samples(run, plan, extractor, tmp_path / "one", ALONE)
    for rank in (1, 0):
        two = measure_samples(run, plan, extractor, tmp_path / "two", group.Processes(rank, 2, CPU))
    assert len(one.ranges) == 4
    for name in ("features", "logits", "tflop", "kept"):
        assert np.array_equal(one.read(name), two.read(name)) and len(one.read(name)) == 7


def test_two_processes_measure_the_same_points(place, tiny_extractor, tmp_path, one_cpu_thread):
    """And a fraction of 0 for the unconditional branch is a point, too."""
    argv = ["--ckpt", place / "a.pt", "--cfg-scale", 2, "--budgets", 0.5, "--lite-cfg", 0]
    for processes in (1, 2):
        whole = arguments(place, tmp_path / str(processes), tiny_extractor, *argv)
        codes = kills.attempt(pareto.main, whole, tmp_path / "printed", [None] * processes)
        assert codes == [0] * processes, (tmp_path / "printed").read_text()
    one, two = read(tmp_path / "1"), read(tmp_path / "2")
    assert exact(one) == exact(two) and [row["lite_cfg"] for row in one] == ["", "0.0"]


def test_a_second_run_in_the_folder_is_refused(place, tiny_extractor, tmp_path, one_cpu_thread):
    argv = arguments(place, tmp_path / "out", tiny_extractor, "--ckpt", place / "a.pt")

    def impatient():
        lock.PATIENCE = 0.0

    with lock.FolderLock(tmp_path / "out", "") as first:
        first.acquire()
        assert kills.attempt(pareto.main, argv, tmp_path / "printed", [impatient]) == [2]
    assert "is in use by process" in (tmp_path / "printed").read_text()


def test_what_cannot_be_compared_is_refused(place, tiny_extractor, tmp_path):
    def refusal(*more, output=tmp_path / "new") -> str:
        with pytest.raises(UserError) as caught:
            pareto.main(arguments(place, output, tiny_extractor, *more))
        return str(caught.value)

    a, large = ["--ckpt", place / "a.pt"], ["--ckpt", place / "large.pt"]
    assert "data.image_size 64" in refusal(*a, *large)
    assert "64 x 64 pixels and the reference's images 32 x 32" in refusal(*large)
    assert "--lite-cfg" in refusal(*a, "--lite-cfg", "0.5")
    assert "argument --budgets: '0,1' has a number that is not in" in refusal(*a, "--budgets", "0,1")
    assert "not a list of numbers" in refusal(*a, "--budgets", "many")
    assert "--num-samples 3" in refusal(*a, "--num-samples", "3")
    assert not (tmp_path / "new").exists()
    pareto.main(arguments(place, tmp_path / "old", tiny_extractor, *a))
    assert "holds points with seed 0 instead of 1" in refusal(*a, "--seed", "1", output=tmp_path / "old")
    for content in (b"\xff\xfe\x00", b"point;name\n1;2\n"):
        (tmp_path / "odd").mkdir(exist_ok=True)
        (tmp_path / "odd" / "pareto.csv").write_bytes(content)
        assert "give another --output" in refusal(*a, output=tmp_path / "odd")
    np.savez(place / "more.npz", np.zeros((21, 32, 32, 3), np.uint8))
    message = refusal(*a, "--reference", place / "more.npz", output=tmp_path / "old")
    assert "reference_images 20 instead of 21" in message


# ----------------------------------------------------------------------------------------------------- figure


def test_curves_are_interpolated():
    """By hand: a static model at (4, 10), and a curve that reaches 10 at cost 2.5 and 8 at cost 4."""
    static = Curve("static", True, "", [Mark(4, 10, 0)])
    ours = Curve("ours", False, "", [Mark(1, 16, 0.4), Mark(2, 12, 0.2), Mark(3, 8, 0.1), Mark(5, 8, 0)])
    ((comparison, curve, mark),) = compare_curves([ours, static])
    assert curve is ours and mark == static.marks[0]
    assert comparison.saving == pytest.approx(1 - 2.5 / 4) and comparison.gain == pytest.approx(2)
    assert str(comparison) == "ours against static: 37.5% less TFLOP at equal quality, 2 lower at equal TFLOP"
    assert ours.metric_at(0.5) is None and ours.metric_at(6) is None and ours.cost_at(7) is None
    assert ours.metric_at(3) == ours.metric_at(5) == 8


def test_without_a_static_model_the_first_curve_is_the_baseline():
    shared = {"name": "m", "step": "5", "static": "False", "model": "x", "cfg_scale": "2.0"}
    rows = []
    for lite, budget, cost, fid in (
        ("", 0.0, 8, 10),
        ("", 0.5, 6, 14),
        ("0.9", 0.0, 7, 11),
        ("0.9", 0.5, 5, 15),
    ):
        own = {"budget": str(budget), "lite_cfg": lite, "fid": str(fid), "tflop_per_image": str(cost)}
        rows.append({**shared, **own})
    # Lite-CFG comes last, and each model has one colour in all panels
    other = {**rows[0], "model": "y", "name": "n"}
    assert ["Lite-CFG" in curve.label for curve in read_curves([*rows, other], "2.0")] == [False, False, True]
    full, lite = read_curves(rows, "2.0")
    assert full.marks == [Mark(6, 14, 0.5), Mark(8, 10, 0)] and "Lite-CFG 90%" in lite.label
    # Full guidance: 12 at cost 7, and 11 at cost 7.5
    ((comparison, curve, mark),) = compare_curves([full, lite])
    assert curve is full and mark == Mark(7, 11, 0)
    assert comparison.saving == pytest.approx(1 - 7 / 7.5) and comparison.gain == pytest.approx(1)
    ((comparison, _, _),) = compare_curves([full, lite._replace(marks=[Mark(7, 13, 0)])])
    assert comparison.gain == pytest.approx(-1) and "1 higher at equal TFLOP" in str(comparison)
    assert compare_curves([full]) == []
    # The same in time, where one call has measured every row
    timed = [{**row, "ms_per_image": str(10 * float(row["tflop_per_image"]))} for row in rows]
    assert pareto.compare_times(timed, "2.0") == []
    timed = [{**row, "measured": "monday"} for row in timed]
    (comparison,) = pareto.compare_times(timed, "2.0")
    assert comparison.saving == pytest.approx(1 - 7 / 7.5) and "less time at equal quality" in str(comparison)
    assert pareto.compare_times([*timed[:-1], {**timed[-1], "measured": "tuesday"}], "2.0") == []
    assert read_curves(rows, "1.0") == []


def test_curves_of_models_with_one_name():
    """Seeds, and trained weights beside the EMA, are named; tables of earlier versions have the fingerprint."""
    shared = {"name": "m", "step": "100", "static": "False", "cfg_scale": "1.0", "lite_cfg": "", "budget": "0",
              "fid": "5", "tflop_per_image": "1"}  # fmt: skip
    seeds = [
        {**shared, "model": "a", "training_seed": "0", "weights": "ema"},
        {**shared, "model": "b", "training_seed": "1", "weights": "ema"},
        {**shared, "model": "c", "training_seed": "0", "weights": "model"},
    ]
    labels = [curve.label for curve in read_curves(seeds, "1.0")]
    start = "m, 100 steps"
    assert labels == [
        f"{start}, seed 0, weights ema",
        f"{start}, seed 1",
        f"{start}, seed 0, weights model",
    ]
    old = [{**shared, "model": "a"}, {**shared, "model": "b"}]
    assert [curve.label for curve in read_curves(old, "1.0")] == [f"{start}, model a", f"{start}, model b"]
    assert [curve.label for curve in read_curves(old[:1], "1.0")] == [start]


# --------------------------------------------------------------------------------------------------- training


def test_evaluation_during_training(tiny_config, tiny_extractor, place, tmp_path, capsys):
    """Rows with quality, kept share and cost; training is untouched by it, and a resumed run repeats the rows."""
    keys = {"every": 4, "reference": place / "reference.npz", "features": tiny_extractor, "num_samples": SAMPLES,
            "num_sampling_steps": STEPS, "batch_size": 4, "cfg_scale": 2}  # fmt: skip
    argv = ["--config", str(tiny_config), "--output", str(tmp_path / "run")]
    for key, value in keys.items():
        argv += ["--set", f"evaluation.{key}={value}"]
    train.main(argv)
    assert capsys.readouterr().out.count("because the classifier has no class names") == 1
    lines = (tmp_path / "run" / "evaluation.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [row["step"] for row in rows] == [4, 8]
    for row in rows:
        assert {
            "frechet_distance",
            "precision",
            "recall",
            "class_accuracy",
            "kept",
            "tflop_per_image",
        } <= row.keys()
        assert 0 < row["kept"] <= 1 and row["tflop_per_image"] > 0
    assert rows[0]["frechet_distance"] != rows[1]["frechet_distance"]
    assert [path.name for path in (tmp_path / "run" / "evaluation").iterdir()] == ["reference"]
    assert "frechet_distance=" in (tmp_path / "run" / "log.txt").read_text()

    train.main(["--config", str(tiny_config), "--output", str(tmp_path / "plain")])
    assert (tmp_path / "plain" / "metrics.jsonl").read_text() == (
        tmp_path / "run" / "metrics.jsonl"
    ).read_text()
    assert not (tmp_path / "plain" / "evaluation.jsonl").exists()
    for name in ("0000006.pt", "0000008.pt"):
        (tmp_path / "run" / "checkpoints" / name).unlink()
    train.main(argv)
    assert (tmp_path / "run" / "evaluation.jsonl").read_text() == lines

    run = load_trained(
        tmp_path / "run" / "checkpoints" / "0000008.pt"
    )  # the last row is that of the EMA in the last checkpoint
    options = SamplingOptions(cfg_scale=2.0, num_sampling_steps=STEPS, sampler="ddim")
    labels = draw_labels(0, list(range(SAMPLES)), 3)
    extractor = load_extractor(str(tiny_extractor), None, CPU)
    plan = SamplePlan(options, labels, batch_size=4)
    chunks = measure_samples(run, plan, extractor, tmp_path / "again", ALONE)
    assert rows[1]["tflop_per_image"] == pytest.approx(chunks.read("tflop").mean(), rel=1e-12)
    assert rows[1]["class_accuracy"] == (chunks.read("logits").argmax(1) == labels).mean()


def test_evaluation_during_training_on_two_processes(run, tiny_extractor, place, tmp_path, one_cpu_thread):
    """One row per evaluation, and the cost and quality that the checkpoint has on one process."""
    keys = {"every": 8, "reference": place / "reference.npz", "features": tiny_extractor, "num_samples": SAMPLES,
            "num_sampling_steps": STEPS, "batch_size": 4, "cfg_scale": 2}  # fmt: skip
    codes, printed = run(
        "run", *(f"evaluation.{key}={value}" for key, value in keys.items()), plans=[None, None]
    )
    assert codes == [0, 0], printed
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    trained, labels = (
        load_trained(tmp_path / "run" / "checkpoints" / "0000008.pt"),
        draw_labels(0, list(range(SAMPLES)), 3),
    )
    options = SamplingOptions(cfg_scale=2.0, num_sampling_steps=STEPS, sampler="ddim")
    extractor = load_extractor(str(tiny_extractor), None, CPU)
    plan = SamplePlan(options, labels, batch_size=4)
    chunks = measure_samples(trained, plan, extractor, tmp_path / "again", ALONE)
    assert row["step"] == 8 and row["tflop_per_image"] == pytest.approx(
        chunks.read("tflop").mean(), rel=1e-12
    )
    assert row["class_accuracy"] == (chunks.read("logits").argmax(1) == labels).mean()


class Unmeasurable(torch.nn.Module):
    """Features that no sample has, only the reference."""

    def forward(self, images):
        return (
            (images.float().mean((2, 3)) - 255).log() if images.shape[0] == 4 else images.float().mean((2, 3))
        )


def test_training_outlives_features_that_are_not_finite(tiny_config, place, tmp_path, capsys):
    """Weeks of training do not end because a classifier overflows on a sample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Unmeasurable()), tmp_path / "odd.pt")
    changes = ["every=2", "num_samples=4", "num_sampling_steps=2", "batch_size=4"]
    changes += [f"reference={place / 'reference.npz'}", f"features={tmp_path / 'odd.pt'}"]
    words = [word for change in changes for word in ("--set", f"evaluation.{change}")]
    train.main(
        [
            "--config",
            str(tiny_config),
            "--output",
            str(tmp_path / "run"),
            "--set",
            "training.max_steps=2",
            *words,
        ]
    )
    assert "warning: no evaluation at step 2: evaluation at step 2, sample 0: its" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "0000002.pt").is_file()


def test_a_damaged_table_is_refused(tmp_path):
    """Before any sampling; an unfinished file of a spreadsheet would fail the figure after it."""
    whole = {
        "point": "a",
        "name": "m",
        "cfg_scale": "1.0",
        "budget": "0.0",
        "tflop_per_image": "1",
        "step": "5",
    }
    for row in (
        {"cost": "3"},
        whole,
        {**whole, "fid": "1,5"},
        {**whole, "fid": "nan"},
        {**whole, "fid": "1", "step": ""},
    ):
        with open(tmp_path / "pareto.csv", "w", newline="") as stream:
            writer = csv.DictWriter(stream, list(row))
            writer.writeheader()
            writer.writerow(row)
        with pytest.raises(UserError, match="is not a table of points"):
            PointTable(tmp_path / "pareto.csv", {})
    (tmp_path / "pareto.csv").write_text("my,notes\n")
    with pytest.raises(UserError, match="is not a table of points"):
        PointTable(tmp_path / "pareto.csv", {})


def test_mistakes_in_the_section_are_found_before_training(tiny_config, tiny_extractor, place, tmp_path):
    def refusal(*settings) -> str:
        with pytest.raises(UserError) as caught:
            argv = [part for setting in settings for part in ("--set", f"evaluation.{setting}")]
            train.main(["--config", str(tiny_config), "--output", str(tmp_path / "run"), *argv])
        return str(caught.value)

    assert "does not exist" in refusal(
        "every=4", f"reference={tmp_path / 'none.npz'}", f"features={tiny_extractor}"
    )
    assert "is neither" in refusal("every=4", f"reference={place / 'reference.npz'}", "features=nowhere")
    np.savez(tmp_path / "large.npz", np.zeros((5, 64, 64, 3), np.uint8))
    assert "64 x 64" in refusal(
        "every=4", f"reference={tmp_path / 'large.npz'}", f"features={tiny_extractor}"
    )
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------- grid of budgets


def test_elastic_grid(place, tmp_path, capsys):
    """A column per fraction with its cost; another budget and a folder in place of the file are refused."""
    argv = [
        "--ckpt",
        str(place / "a.pt"),
        "--num-sampling-steps",
        "2",
        "--classes",
        "0",
        "2",
        "--fractions",
        "0",
        "0.5",
    ]
    elastic_grid.main([*argv, "--output", str(tmp_path / "grid.png")])
    found = r"(\d+)% dropped: (\S+) TFLOP, \S+ ms per image, peak memory \d+ MB"
    costs = re.findall(found, capsys.readouterr().out)
    assert [fraction for fraction, _ in costs] == ["0", "50"] and float(costs[1][1]) < float(costs[0][1])
    assert np.asarray(Image.open(tmp_path / "grid.png")).std() > 1
    with pytest.raises(UserError, match="leave the other budget out"):
        elastic_grid.main([*argv, "--token-budget", "9", "--output", str(tmp_path / "grid.png")])
    with pytest.raises(UserError, match=f"--output '{tmp_path}': is a folder"):
        elastic_grid.main([*argv, "--output", str(tmp_path)])


# ------------------------------------------------------------------------------------------------- classifier


def test_classifier_of_the_embedded_data_set(tmp_path, capsys):
    """Enough steps to tell eight classes apart; the features depend on more than the class."""
    shapes.write_images(tmp_path / "images", 160, 24)
    argv = [
        "--images",
        tmp_path / "images",
        "--output",
        tmp_path / "classifier.pt",
        "--image-size",
        24,
        "--steps",
        50,
    ]
    classifier.main([str(part) for part in argv])
    assert "of 20 held-out images right, 112 features" in capsys.readouterr().out
    extractor = load_extractor(str(tmp_path / "classifier.pt"), None, CPU)
    images, labels = zip(
        *((image, label) for image, _, label in (shapes.render(1000 + i, 24) for i in range(80)))
    )
    outputs = extractor(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    assert extractor.class_names == sorted(path.name for path in (tmp_path / "images").iterdir())
    assert outputs.features.shape == (80, 112) and outputs.logits.shape == (80, 8)
    assert (outputs.logits.argmax(1) == torch.tensor(labels)).double().mean() > 0.9
    assert outputs.features[::8].std(0).min() > 0
