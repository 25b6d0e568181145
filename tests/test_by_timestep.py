"""Loss and kept share in tenths of the timesteps, from the averages to the picture."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from config import UserError
from figures import by_timestep
from training.tracking import LogSums, flatten_statistics


def test_each_value_goes_to_its_tenth():
    averages = LogSums(SimpleNamespace(num_processes=1))
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    averages.add_by_timestep({"loss": values}, torch.tensor([0, 99, 100, 999]), 1000)
    averages.add_by_timestep({"loss": values}, torch.tensor([0, 0, 0, 999]), 1000)
    averages.add({"kept_natural": values, "kept_effective": values})
    statistics = averages.reduce()
    assert statistics["loss_t0"]["mean"] == pytest.approx((1 + 2 + 1 + 2 + 4) / 5)
    assert (statistics["loss_t0"]["min"], statistics["loss_t0"]["max"]) == (1.0, 4.0)
    assert statistics["loss_t1"]["mean"] == 4.0
    assert statistics["loss_t9"]["mean"] == 8.0
    assert math.isnan(statistics["loss_t5"]["mean"])
    # A tenth without samples has no entry
    scalars = flatten_statistics(statistics)
    assert {key for key in scalars if key.startswith("loss_t")} == {"loss_t0", "loss_t1", "loss_t9"}


def test_a_finished_run_has_the_numbers_and_the_picture(whole_run, tmp_path, capsys):
    rows = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        # The tenths together have the samples of the whole
        losses = [row[key] for key in row if key.startswith("loss_t")]
        assert min(losses) <= row["diffusion_loss"] <= max(losses)
        kept = [row[key] for key in row if key.startswith("kept_t")]
        assert min(kept) <= row["kept_natural_mean"] <= max(kept)
    assert (whole_run / "by_timestep.png").stat().st_size > 1000

    by_timestep.main([str(whole_run), str(whole_run), "--output", str(tmp_path / "both.png")])
    assert (tmp_path / "both.png").stat().st_size > 1000
    assert "diffusion loss, t rising: " in capsys.readouterr().out
    with pytest.raises(UserError, match="no readable metrics.jsonl"):
        by_timestep.main([str(tmp_path)])
    with pytest.raises(
        UserError, match=r"--output 'both.jpg': must end in one of .png, .pdf, .svg; try both.png"
    ):
        by_timestep.main([str(whole_run), "--output", "both.jpg"])


def test_every_run_is_in_the_legend(tmp_path, monkeypatch):
    """By what tells its folder from the others; matplotlib by itself leaves out names that begin with "_"."""
    figures = []
    monkeypatch.setattr(by_timestep, "save_figure", lambda figure, path: figures.append(figure))
    folders = [tmp_path / ("long" * 20) / "a" / "run", tmp_path / "b" / "run", tmp_path / "_other"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"loss_t0": 1.0, "kept_t0": 0.5}\n')
    by_timestep.main([*map(str, folders), "--output", str(tmp_path / "picture.png")])
    for axes in figures[0].axes:
        texts = [text.get_text() for text in axes.get_legend().get_texts()]
        assert texts == ["a/run", "b/run", "_other"]


def test_the_ending_of_a_figure_is_its_format(tmp_path):
    for ending, start in ((".pdf", b"%PDF"), (".svg", b"<?xml"), (".png", b"\x89PNG")):
        by_timestep.draw({"run": [{"loss_t0": 1.0, "kept_t0": 0.5}]}, tmp_path / f"picture{ending}")
        assert (tmp_path / f"picture{ending}").read_bytes().startswith(start)
