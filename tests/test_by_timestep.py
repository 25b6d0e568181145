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
