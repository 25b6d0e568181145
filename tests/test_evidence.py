"""Evidence: the configurations are of equal cost, a run becomes a summary, and summaries become tables."""

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config import UserError, load_config
from evaluation import evidence, pareto
from figures import evidence as figures
from figures import evidence_tables as tables
from models import architecture, build_model
from models.flops import TokenCounts, total_flops
from sampling.load import load_trained
from sampling.sample_folder import SETTINGS
from scripts import evidence as measuring
from weights.checkpoint import newest_checkpoint

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs" / "evidence"
MANUAL = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
SAMPLES = 6


# ------------------------------------------------------------------------------------------------- configurations


def cost(name: str) -> float:
    """FLOPs of a forward pass where 1 token in N is kept."""
    config = load_config(CONFIGS / f"{name}.yaml")
    kept = config.tokens / (1 if config.is_static else config.training.downsample_factor)
    return total_flops(architecture(config), TokenCounts(kept, kept**2))


def parameters(name: str) -> int:
    with torch.device("meta"):
        model = build_model(load_config(CONFIGS / f"{name}.yaml"))
    return sum(tensor.numel() for tensor in model.parameters())


def test_models_of_equal_cost():
    assert cost("dit2") == pytest.approx(cost("dc"), rel=0.03)
    assert cost("dit4") == pytest.approx(cost("dc"), rel=0.03)
    assert parameters("dit2-params") == pytest.approx(parameters("dc"), rel=0.03)
    assert cost("dc-budgets") == cost("dc")
    # The budgets of one model are those of the models for one budget
    for name, drop in (("dc-kept20", 0.2), ("dc-kept15", 0.4), ("dc-kept10", 0.6)):
        factor = load_config(CONFIGS / f"{name}.yaml").training.downsample_factor
        assert 1 / factor == pytest.approx((1 - drop) / 4, rel=1e-4)


def test_the_manual_has_every_model_and_its_cost():
    rows = re.findall(r"^\| `(.+)\.yaml` \| .* \| ([\d.]+) M \| .* \| ([\d.]+) \|$", MANUAL, re.MULTILINE)
    expected = []
    for file in CONFIGS.glob("*.yaml"):
        if file.stem != "base":
            size = f"{parameters(file.stem) / 1e6:.2f}"
            expected.append((file.stem, size, f"{cost(file.stem) / 1e9:.3f}"))
    assert sorted(rows) == sorted(expected)


def test_the_donor_has_the_blocks_of_the_upcycled_model():
    donor = load_config(CONFIGS / "dit-donor.yaml")
    upcycled = load_config(CONFIGS / "dc-upcycled.yaml")
    assert donor.model.hnet.d_model == upcycled.model.hnet.d_model
    assert donor.model.hnet.arch_layout[1] == upcycled.model.hnet.arch_layout[1]
    assert f"{donor.training.max_steps:07d}.pt" in str(upcycled.training.init_from)


@pytest.mark.parametrize("name", ["dc", "dc-upcycled", "dit4"])
def test_the_command_of_a_run_names_its_configuration(name):
    config = load_config(CONFIGS / f"{name}.yaml", ["training.seed=2"])
    command = measuring.training_command(config, Path("runs/x"))
    words = f"--config configs/evidence/{name}.yaml --set training.seed=2 --output runs/x"
    assert command == f"python train.py {words}"


# ------------------------------------------------------------------------------------------------ measuring a run


@pytest.fixture
def masks(tiny_images, tmp_path) -> Path:
    """A mask of every tiny image, whose left half is the object."""
    half = np.zeros((32, 32), np.uint8)
    half[:, :16] = 255
    for file in tiny_images.rglob("*.png"):
        mask = tmp_path / "masks" / file.relative_to(tiny_images)
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(half).save(mask)
    return tmp_path / "masks"


def test_a_run_becomes_a_summary(
    whole_run, masks, tiny_images, tiny_extractor, tmp_path, monkeypatch, capsys
):
    """All its points, routing and training; the same call samples nothing, and a table and figures follow."""
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", images)
    argv = [whole_run, "--reference", tmp_path / "reference.npz", "--features", tiny_extractor]
    argv += ["--images", tiny_images, "--masks", masks, "--num-samples", SAMPLES, "--num-sampling-steps", 2]
    argv += ["--budgets", "0.5", "--output", tmp_path / "results", "--batch-size", 4]
    measuring.main([str(word) for word in argv])
    summary = json.loads((tmp_path / "results" / "run" / "summary.json").read_text())
    points = [(row["cfg_scale"], row["budget"], row.get("lite_cfg")) for row in summary["rows"]]
    assert points == [(1, 0, None), (2, 0, None), (2, 0, 0.8), (1, 0.5, None), (2, 0.5, None)]
    for row in summary["rows"]:
        assert row["images"] == SAMPLES and row["sampler"] == "ddim" and row["tflop_per_image"] > 0
        assert {"frechet_distance", "kid", "class_accuracy", "ms_per_image"} <= row.keys()
    assert [row["t"] for row in summary["routing"]] == [
        0.05,
        0.15,
        0.25,
        0.35,
        0.45,
        0.55,
        0.65,
        0.75,
        0.85,
        0.95,
    ]
    for row in summary["routing"]:
        assert row["all"] == pytest.approx((row["object"] + row["background"]) / 2)
    assert summary["step"] == 8 and [step for step, _ in summary["loss"]] == [4, 8]
    assert summary["training seconds"] > 0 and summary["command"].startswith(
        "python train.py --config configs/"
    )

    # The same again finds every point
    monkeypatch.setattr(pareto, "measure_point", None)
    measuring.main([str(word) for word in argv])
    again = json.loads((tmp_path / "results" / "run" / "summary.json").read_text())
    assert again == summary

    # A part of it keeps the other points, and the command that measured them
    measuring.main([*(str(word) for word in argv), "--cfg-scale", "1", "--budgets", "0"])
    part = json.loads((tmp_path / "results" / "run" / "summary.json").read_text())
    assert part["rows"] == summary["rows"]
    (first,) = summary["measured by"]
    assert part["measured by"] == [first, f"{first} --cfg-scale 1 --budgets 0"]
    figures.main([str(tmp_path / "results"), "--output", str(tmp_path / "assets")])
    assert "1 runs of 1 models: tables.md, pareto.png, routing.png" in capsys.readouterr().out


def test_more_points_of_a_run(whole_run, masks, tiny_images, tiny_extractor, tmp_path):
    """A later call takes the times of all points again, and keeps the routing that it is not asked for."""
    np.savez(tmp_path / "reference.npz", np.zeros((20, 32, 32, 3), np.uint8))
    argv = [whole_run, "--reference", tmp_path / "reference.npz", "--features", tiny_extractor]
    argv += ["--num-samples", 4, "--num-sampling-steps", 1, "--output", tmp_path / "results"]
    argv += ["--budgets", 0, "--lite-cfg", "none"]
    known = ["--images", tiny_images, "--masks", masks]
    measuring.main([str(word) for word in [*argv, *known, "--cfg-scale", 1]])
    path = tmp_path / "results" / "run" / "summary.json"
    first = json.loads(path.read_text())
    # A time that no second measurement gives
    first["times"] = dict.fromkeys(first["times"], 1e9)
    path.write_text(json.dumps(first))
    measuring.main([str(word) for word in [*argv, "--cfg-scale", 2]])
    summary = json.loads(path.read_text())
    assert summary["routing"] == first["routing"] != []
    assert [row["cfg_scale"] for row in summary["rows"]] == [1, 2]
    assert summary["times"] == {row["point"]: row["ms_per_image"] for row in summary["rows"]}
    assert max(summary["times"].values()) < 1e9
    # That of an earlier checkpoint is not the model's
    path.write_text(json.dumps({**summary, "step": 4}))
    measuring.main([str(word) for word in [*argv, "--cfg-scale", 2]])
    assert json.loads(path.read_text())["routing"] == []


@pytest.mark.parametrize(
    "options, message",
    [
        (["--budgets", "0,1.2"], "argument --budgets: '0,1.2' has a number that is not in"),
        (["--lite-cfg", "1"], "argument --lite-cfg: '1' has a number that is not in"),
        (["--seed", "-1"], "--seed -1: must be 0 or greater"),
        (["--masks", "shapes"], "--masks: needs --images"),
        (["--floors", "vae"], "--floors: needs --images"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        measuring.main(["run", "--reference", "x", "--output", str(tmp_path / "out"), *options])


def test_masks_must_belong_to_the_images(tmp_path):
    pixels, mask, _ = measuring.shapes.render(12, 24)
    assert np.array_equal(measuring.read_mask("ring/000012.png", pixels, "shapes"), mask)
    with pytest.raises(UserError, match="is no image of toy.shapes"):
        measuring.read_mask("ring/000013.png", pixels, "shapes")
    with pytest.raises(UserError, match="has no a/1.png"):
        measuring.read_mask("a/1.png", pixels, "nowhere")
    # Rectangles, other sizes, and a file that was cut off
    wide = np.zeros((24, 48), np.uint8)
    wide[:, :9] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    found = measuring.read_mask("wide.png", np.zeros((24, 48, 3), np.uint8), str(tmp_path))
    assert np.array_equal(found, wide == 255)
    with pytest.raises(UserError, match=r"is \(24, 48\), and the image \(24, 24\); give one of its size"):
        measuring.read_mask("wide.png", pixels, str(tmp_path))
    whole = (tmp_path / "wide.png").read_bytes()
    (tmp_path / "wide.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="unreadable mask wide.png: .*; give another"):
        measuring.read_mask("wide.png", pixels, str(tmp_path))


@pytest.mark.parametrize("columns", [0, 1, 32])
def test_masks_need_objects_and_background(columns, whole_run, masks, tiny_images):
    """A column of pixels is less than half of every cell."""
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :columns] = 255
    for file in masks.rglob("*.png"):
        Image.fromarray(mask).save(file)
    trained = load_trained(newest_checkpoint(whole_run))
    args = Namespace(images=tiny_images, masks=str(masks), seed=0)
    with pytest.raises(UserError, match="--masks '.*': no cell is on an object, or none is on background"):
        measuring.routing_by_timestep(trained, args)


def test_images_of_the_routing_that_are_none(whole_run, masks, tiny_images, tmp_path):
    trained = load_trained(newest_checkpoint(whole_run))
    folder = tmp_path / "images"
    shutil.copytree(tiny_images, folder)
    image = next(folder.rglob("*.png"))
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(UserError, match=f"unreadable image .*{image.name}.*; remove it"):
        measuring.read_masked_images(trained, folder, str(masks))
    (folder / SETTINGS).write_text("{}")
    with pytest.raises(UserError, match="--images '.*': holds samples, which have no classes"):
        measuring.read_masked_images(trained, folder, str(masks))


def test_floors(tiny_images, tiny_vae, tiny_extractor, tmp_path):
    """The images themselves are at no distance, and the autoencoder's are."""
    folder = tmp_path / "real"
    for file in tiny_images.rglob("*.png"):
        target = folder / file.relative_to(tiny_images)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).crop((0, 0, 32, 32)).save(target)
    argv = ["--floors", tiny_vae, "--images", folder, "--reference", folder, "--features", tiny_extractor]
    argv += ["--output", tmp_path / "results", "--num-samples"]
    with pytest.raises(UserError, match="10 images cannot be compared with 11 samples"):
        measuring.main([str(word) for word in [*argv, 11]])
    with pytest.raises(UserError, match="--floors nowhere: is neither"):
        measuring.main([str(word) for word in [*argv, 10, "--floors", "nowhere"]])
    np.savez(tmp_path / "small.npz", np.zeros((20, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match="the samples are 32 x 32 pixels and the reference's images 16 x 16"):
        measuring.main([str(word) for word in [*argv, 10, "--reference", tmp_path / "small.npz"]])
    measuring.main([str(word) for word in [*argv, 10]])
    rows = {}
    for name in ("real-images", "autoencoder"):
        summary = json.loads((tmp_path / "results" / f"floor-{name}" / "summary.json").read_text())
        rows[name] = summary["rows"][0]
    assert rows["real-images"]["frechet_distance"] < 1e-6 < rows["autoencoder"]["frechet_distance"]
    assert rows["autoencoder"].keys() == rows["real-images"].keys() >= {"kid", "class_accuracy"}
    # Points of other images cannot be compared with them
    write_run(tmp_path / "results", "dc", 0, [row(3.0, images=10.0)], [1.0])
    with pytest.raises(UserError, match="floor-autoencoder/summary.json': has features torchscript:.*"):
        evidence.read(tmp_path / "results")


# -------------------------------------------------------------------------------------------- tables and figures


def row(distance: float, scale: float = 1.0, drop: float = 0.0, **more: float) -> dict:
    cost = scale * (1 - drop / 2)
    point = {
        "point": f"{scale} {drop}",
        "cfg_scale": scale,
        "budget": drop,
        "images": 64.0,
        "steps": 20.0,
        "seed": 0.0,
        "features": "f",
        "sampler": "ddim",
    }
    point |= {"tflop_per_image": cost, "ms_per_image": 10 * cost, "kept_share": (1 - drop) / 4}
    quality = {"frechet_distance": distance, "kid": distance / 10, "precision": 0.75, "recall": 0.25}
    return {**point, **quality, "class_accuracy": 0.5, **more}


def write_run(folder: Path, config: str, seed: int, rows: list[dict], losses: list[float], **more) -> None:
    """A summary of a run that nobody trained."""
    shape = load_config(CONFIGS / f"{config}.yaml", [f"training.seed={seed}"])
    summary = {
        "run": f"{config}-{seed}", "model": shape.model.name, "step": 50 * len(losses), "seed": seed,
        "parameters": 1_500_000, "config": measuring.shaping_keys(shape), "command": f"train {config} {seed}",
        "hardware": "a processor", "training seconds": 600.0, "measured by": ["measure"], "rows": rows,
        "routing": [],
        "times": {point["point"]: point["ms_per_image"] for point in rows},
        "loss": [[50 * (k + 1), loss] for k, loss in enumerate(losses)], **more,
    }  # fmt: skip
    path = folder / f"{config}-{seed}" / "summary.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(summary))


@pytest.fixture
def results(tmp_path) -> Path:
    """Two seeds of a DC-DiT and a static DiT, and one of each other kind."""
    folder = tmp_path / "results"
    falling = [1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2]
    routing = [{"t": 0.25, "object": 0.5, "background": 0.1, "all": 0.3}]
    routing += [{"t": 0.75, "object": 0.1, "background": 0.1, "all": 0.1}]
    for seed in (0, 1):
        rows = [
            row(100 + 10 * seed),
            row(150, drop=0.4),
            row(80, 2.0),
            row(81, 2.0, lite_cfg=0.8, ms_per_image=15.0, tflop_per_image=1.6, class_accuracy=0.49),
        ]
        write_run(folder, "dc", seed, rows, falling, routing=routing)
        write_run(folder, "dit2", seed, [row(200 + seed), row(70, 2.0)], falling)
    write_run(folder, "dc-budgets", 0, [row(104), row(108, drop=0.4), row(81, 2.0)], falling)
    write_run(
        folder, "dc-kept15", 0, [row(107, kept_share=0.15, tflop_per_image=0.85), row(79, 2.0)], falling
    )
    write_run(folder, "dc-upcycled", 0, [row(99)], [0.6, 0.4, 0.3, 0.2, 0.1])
    return folder


def section(text: str, title: str) -> list[str]:
    """The lines of a table, without its header."""
    part = text.split(f"## {title}\n")[1].split("## ")[0]
    return [line for line in part.splitlines() if line.startswith("| ")][2:]


def test_a_key_that_is_newer_than_a_summary_has_its_default(results):
    labels = [model.label for model in evidence.read(results).models]
    path = results / "dc-1" / "summary.json"
    summary = json.loads(path.read_text())
    del summary["config"]["training.averages"]
    path.write_text(json.dumps(summary))
    assert [model.label for model in evidence.read(results).models] == labels


def test_a_summary_with_one_command(tmp_path):
    """Of an older version: the command is a text."""
    write_run(tmp_path, "dc", 0, [row(100.0)], [0.5], **{"measured by": "one command"})
    (path,) = tmp_path.rglob("summary.json")
    assert measuring.commands(evidence.read_summary(path), "another") == ["one command", "another"]
    assert tables.measuring_commands(evidence.read(tmp_path)) == "- `one command`\n"


def test_every_table_and_figure(results, tmp_path):
    figures.main([str(results), "--output", str(tmp_path / "assets")])
    names = {path.name for path in (tmp_path / "assets").iterdir()}
    assert names == {"tables.md", "pareto.png", "routing.png", "budgets.png", "upcycling.png"}
    text = (tmp_path / "assets" / "tables.md").read_text()
    # The upcycled model and that for one budget are compared with their own kind
    against = section(text, "DC-DiT against models of about equal FLOPs")
    start = "| DC-DiT | DiT, P = 2, equal FLOPs | "
    assert [line.removeprefix(start) for line in against if line.startswith("| DC-DiT | ")] == [
        "none | +0.0% | Fréchet distance | 105.0 ± 7.1 | 200.5 ± 0.7 | -47.6% | no |",
        "none | +0.0% | KID | 10.5 ± 0.707 | 20.1 ± 0.0707 | -47.6% | no |",
        "2 | +0.0% | Fréchet distance | 80.0 ± 0.0 | 70.0 ± 0.0 | +14.3% | no |",
        "2 | +0.0% | KID | 8 ± 0 | 7 ± 0 | +14.3% | no |",
    ]
    assert len(against) == 8 and all(line.endswith("| one seed |") for line in against if "many" in line)
    quality = section(text, "Quality against cost")
    cells = [
        "DC-DiT",
        "none",
        "0%",
        "25.0% ± 0.0%",
        "1",
        "10.0 ± 0.0",
        "105.0 ± 7.1",
        "10.5 ± 0.707",
        "0.75 ± 0.00",
        "0.25 ± 0.00",
        "50.0% ± 0.0%",
        "2",
    ]
    assert f"| {' | '.join(cells)} |" in quality and len(quality) == 12
    assert section(text, "Kept tokens on objects and on background") == [
        "| DC-DiT | 30.0% ± 0.0% | 10.0% ± 0.0% | 3.00 ± 0.00 | 30.0% ± 0.0% | 10.0% ± 0.0% | 2 |"
    ]
    (lite,) = section(text, "Lite-CFG against full guidance")
    assert lite == "| DC-DiT | 2 | 80% | -20.0% | -25.0% | +1.2% | +1.2% | 50.0% ± 0.0% | 49.0% ± 0.0% | 2 |"
    # Only the pair that differs in multi-budget training, and only the models that differ in N
    dropped = section(text, "Tail dropping with and without multi-budget training")
    assert [line.split(" | ")[1:4:2] + line.split(" | ")[-2:] for line in dropped] == [
        ["no", "0%", "+0.0%", "2 |"], ["no", "40%", "+43.2%", "2 |"], ["no", "0%", "+0.0%", "2 |"],
        ["yes", "0%", "+0.0%", "1 |"], ["yes", "40%", "+3.8%", "1 |"], ["yes", "0%", "+0.0%", "1 |"],
    ]  # fmt: skip
    # 104 at cost 1 and 108 at cost 0.8; at scale 2 one budget was measured, and nothing lies between
    assert section(text, "One checkpoint at many budgets") == [
        "| none | DC-DiT | 25.0% ± 0.0% | 1 | 105.0 ± 7.1 | 104.0 | -1.0% | 2 and 1 |",
        "| none | DC-DiT, N = 6.7 | 15.0% | 0.85 | 107.0 | 107.0 | +0.0% | 1 and 1 |",
    ]
    assert "| DC-DiT | 50.0% ± 0.0% | 50.0% ± 0.0% | 2 |" in section(text, "Class accuracy")
    # The running means are 0.8, 0.633, ... and 0.433, 0.3, 0.2
    assert section(text, "Upcycling")[-1] == "| DC-DiT, upcycled | 0.2500 | 400 | 250 | 1.6 | 1 |"
    assert len(section(text, "Runs")) == 7


def test_the_figure_of_quality_against_cost(results):
    """A panel per scale; the budgets of a model are a line; a bar only where there are several seeds.

    A model that predicts something else has no place there.
    """
    write_run(results, "dc-epsilon", 0, [row(900)], [1.0])
    measured = evidence.read(results)
    axes = figures.draw_pareto(measured).axes
    assert [axis.get_title() for axis in axes] == ["guidance: none", "guidance: 2"]
    curves = {}
    for curve in axes[0].containers:
        assert curve.lines[0].get_linestyle() == "None"
        bars = curve.lines[2][0].get_segments()
        curves[curve.get_label()] = (
            curve.lines[0].get_xydata().tolist(),
            [bar[1][1] - bar[0][1] for bar in bars if len(bar)],
        )
    # Budgets that a model was not trained for are in the figure of the budgets only
    assert curves["DC-DiT"] == ([[1, 105]], pytest.approx([200**0.5]))
    (untrained, *_) = figures.draw_budgets(measured).axes[0].containers
    assert untrained.lines[0].get_xydata().tolist() == [[1, 105], [0.8, 150]]
    assert curves["DC-DiT, many budgets"] == ([[1, 104], [0.8, 108]], [])
    assert curves.keys() == {"DC-DiT", "DC-DiT, many budgets", "DiT, P = 2, equal FLOPs"}


def test_the_lines_of_a_figure_join_the_same_seeds(tmp_path):
    """A mean of two seeds at the first point and one seed at the second would look like a slope."""
    write_run(tmp_path, "dc-budgets", 0, [row(40.0), row(60.0, drop=0.4)], [1.0])
    write_run(tmp_path, "dc-budgets", 1, [row(80.0)], [1.0])
    (axis,) = figures.draw_pareto(evidence.read(tmp_path)).axes
    (points,) = axis.containers
    assert points.lines[0].get_xydata().tolist() == [[1, 60], [0.8, 60]]
    joined = [line.get_xydata().tolist() for line in axis.lines if line.get_linestyle() == "-"]
    assert joined == [[[1, 40], [0.8, 60]]]


def test_budgets_of_one_cost_and_models_that_keep_more(tmp_path):
    assert evidence.interpolate([(1, 5), (1, 6), (2, 7)], 1) == 6
    write_run(tmp_path, "dc-budgets", 0, [row(40.0), row(60.0, drop=0.4)], [1.0])
    write_run(tmp_path, "dc-kept15", 0, [row(41.0)], [1.0])
    path = tmp_path / "dc-kept15-0" / "summary.json"
    summary = json.loads(path.read_text())
    summary["config"]["training.downsample_factor"] = 3.0
    path.write_text(json.dumps(summary))
    measured = evidence.read(tmp_path)
    assert measured.budget_pairs() == [] and len(measured.main_models()) == 2


def test_an_upcycled_run_of_a_few_log_lines_has_no_row(tmp_path):
    write_run(tmp_path, "dc", 0, [row(40.0)], [1.0, 0.5])
    write_run(tmp_path, "dc-upcycled", 0, [row(40.0)], [1.0, 0.5])
    assert tables.upcycling(evidence.read(tmp_path)) is None


def test_routing_counts_the_seeds_that_have_it(results):
    path = results / "dc-1" / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "routing": []}))
    line = "| DC-DiT | 30.0% | 10.0% | 3.00 | 30.0% | 10.0% | 1 |"
    assert tables.kept_by_place(evidence.read(results)).splitlines()[2:] == [line]


def test_control_routers_have_bars_and_no_curve(results):
    routing = [{"t": 0.25, "object": 0.25, "background": 0.25, "all": 0.25}]
    write_run(results, "dc-uniform", 0, [row(110)], [1.0], routing=routing)
    bars, curves = figures.draw_routing(evidence.read(results)).axes
    assert [label.get_text() for label in bars.get_yticklabels()] == ["DC-DiT", "DC-DiT, uniform router"]
    assert [curve.get_label() for curve in curves.containers] == ["DC-DiT"]


def test_seeds_overlap_when_their_ranges_do():
    two = evidence.Number((1.0, 3.0))
    assert tables.overlap(two, evidence.Number((3.1, 5.0))) == "no"
    assert tables.overlap(two, evidence.Number((2.9, 5.0))) == "yes"
    assert tables.overlap(two, evidence.Number((9.0,))) == "one seed"


def test_a_point_of_one_seed_among_several_says_so(tmp_path):
    write_run(tmp_path / "results", "dc", 0, [row(3.0), row(4.0, drop=0.4)], [1.0])
    write_run(tmp_path / "results", "dc", 1, [row(5.0)], [1.0])
    lines = tables.quality_and_cost(evidence.read(tmp_path / "results")).splitlines()[2:]
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [(line[2], line[6], line[-1]) for line in cells] == [("0%", "4.0 ± 1.4", "2"), ("40%", "4.0", "1")]


@pytest.mark.parametrize("name", ["evidence", "openmoji"])
def test_the_stored_tables_are_those_of_the_stored_summaries(name, tmp_path):
    stored = ROOT / "docs" / name
    files = figures.write(evidence.read(stored), tmp_path)
    assert (tmp_path / "tables.md").read_text() == (stored / "tables.md").read_text(), (
        f"python -m figures.evidence docs/{name} --output docs/{name} writes them again"
    )
    assert all((stored / name).is_file() for name in files)


def test_times_of_points_that_did_not_take_turns_are_left_out(tmp_path):
    write_run(tmp_path, "dc", 0, [row(3.0), row(4.0, drop=0.4)], [1.0], times={"1.0 0.0": 10.0})
    write_run(tmp_path, "dit2", 0, [row(3.0)], [1.0], times={})
    dynamic, static = evidence.read(tmp_path).models
    assert dynamic.at(evidence.Point(1.0), "ms_per_image").mean == 10
    assert dynamic.at(evidence.Point(1.0, 0.4), "ms_per_image") is None
    assert static.at(evidence.Point(1.0), "ms_per_image") is None


def test_what_has_no_data_is_left_out(tmp_path):
    write_run(tmp_path / "results", "dit2", 0, [row(3.0)], [1.0, 0.5, 0.2])
    figures.main([str(tmp_path / "results"), "--output", str(tmp_path / "assets")])
    text = (tmp_path / "assets" / "tables.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "## Quality against cost",
        "## Class accuracy",
        "## Runs",
        "## Commands that measured them",
    ]
    assert {path.name for path in (tmp_path / "assets").iterdir()} == {"tables.md", "pareto.png"}


def test_summaries_that_cannot_be_compared(tmp_path):
    with pytest.raises(UserError, match="has no summary.json of a run"):
        evidence.read(tmp_path)
    write_run(tmp_path, "dc", 0, [row(3.0)], [1.0])
    write_run(tmp_path, "dc", 1, [row(3.0, images=32.0)], [1.0])
    with pytest.raises(UserError, match="has images 32.0, and others 64.0"):
        evidence.read(tmp_path)
    (tmp_path / "dc-1" / "summary.json").write_text("[]")
    with pytest.raises(UserError, match="is no summary of scripts.evidence"):
        evidence.read(tmp_path)


def test_numbers_of_unequal_seeds_are_not_mixed(tmp_path):
    """A budget that one seed has is compared with that seed, not with the mean of all."""
    write_run(tmp_path, "dc-budgets", 0, [row(40.0), row(60.0, drop=0.4)], [1.0])
    write_run(tmp_path, "dc-budgets", 1, [row(80.0)], [1.0])
    (model,) = evidence.read(tmp_path).models
    ratio = model.relative(evidence.Point(1.0, 0.4), evidence.Point(1.0), "frechet_distance")
    assert ratio.values == (1.5,)
    assert model.at(evidence.Point(1.0), "frechet_distance", also=[evidence.Point(1.0, 0.4)]).values == (
        40.0,
    )
    # Costs 1 and 0.8
    between = model.at_cost(1.0, 0.9, "frechet_distance")
    assert between.values == (pytest.approx(50.0),)
    assert model.at_cost(1.0, 0.7, "frechet_distance") is None


def test_runs_that_are_no_seeds_of_one_model(tmp_path):
    """The trained weights beside the EMA, another sampler, or the same seed twice would pass for a spread."""
    write_run(tmp_path, "dc", 0, [row(3.0)], [1.0])
    write_run(tmp_path, "dc", 1, [row(3.0, weights="model")], [1.0])
    with pytest.raises(UserError, match="dc-1/summary.json': has weights model, and others ema"):
        evidence.read(tmp_path)
    shutil.rmtree(tmp_path / "dc-1")
    write_run(tmp_path, "dc", 1, [row(3.0, sampler="ddpm")], [1.0])
    with pytest.raises(UserError, match="has samples by ddpm, and others of the same model by ddim"):
        evidence.read(tmp_path)
    shutil.rmtree(tmp_path / "dc-1")
    shutil.copytree(tmp_path / "dc-0", tmp_path / "copy" / "dc-0")
    with pytest.raises(UserError, match="is of the same model and seed as '.*'; remove one of them"):
        evidence.read(tmp_path)


def test_a_summary_of_another_run_stays(tmp_path, whole_run, tiny_extractor):
    argv = ["--reference", "x", "--features", str(tiny_extractor), "--output", str(tmp_path)]
    with pytest.raises(UserError, match="RUN: two folders are called run, as their summaries would be"):
        measuring.main([str(whole_run), str(tmp_path / "run"), *argv])
    with pytest.raises(UserError, match="RUN: is missing"):
        measuring.main(argv)
    write_run(tmp_path, "dc", 0, [row(3.0)], [1.0])
    (tmp_path / "dc-0").rename(tmp_path / "run")
    before = (tmp_path / "run" / "summary.json").read_bytes()
    with pytest.raises(UserError, match="is of a run with model DC-DiT, and this one has tiny; give another"):
        measuring.main([str(whole_run), *argv])
    assert (tmp_path / "run" / "summary.json").read_bytes() == before
    # Nor are the trained weights measured into the summary of the EMA
    summary = json.loads(before) | {"model": "tiny"}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match="has points of the weights ema; give another --output"):
        measuring.main([str(whole_run), *argv, "--weights", "model"])


def test_models_of_one_name_are_told_apart(tmp_path):
    write_run(tmp_path, "dc", 0, [row(3.0)], [1.0])
    write_run(tmp_path, "dc", 1, [row(3.0)], [1.0, 0.5])
    labels = [model.label for model in evidence.read(tmp_path).models]
    assert labels == ["DC-DiT, 100 steps", "DC-DiT, 50 steps"]
