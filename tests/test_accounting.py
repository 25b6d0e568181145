"""The account of a sampling run: each image's cost from its own counts, and sums that add up."""

import errno

import numpy as np
import pytest
import torch

from config import UserError, config_from_dict
from figures import canvas, cost
from models import architecture, flops
from sampling.accounting import (
    SamplingRecord,
    Seconds,
    StepCounts,
    image_flops,
    image_tflop,
    read_records,
    report,
    save_record,
    save_summary,
    stack_kept,
    summarise,
)

DECODING = 1.24e12
CONFIG = config_from_dict({"data": {"image_size": 64, "num_classes": 3}})  # 64 tokens
TIMESTEPS = [900, 500, 100]
LABELS = [0, 2, 2, 0, 2, 2]


def run(images=6) -> list[StepCounts]:
    """Counts of some images; the unconditional branch is computed in the middle step only."""
    counts = torch.randint(2, 65, (4, images))
    return [
        StepCounts(900, counts[0], None),
        StepCounts(500, counts[1], counts[3]),
        StepCounts(100, counts[2], None),
    ]


def one_pass(count: int) -> float:
    return flops.total_flops(architecture(CONFIG), flops.TokenCounts(count, count**2))


def account(kept: list[StepCounts]) -> dict:
    record = SamplingRecord(TIMESTEPS, stack_kept(kept), LABELS, Seconds(3.0, 0.6), 500_000_000)
    return summarise(CONFIG, DECODING, ["a", "b", "c"], record)


def test_cost_of_each_image():
    kept = run()
    want = [
        sum(one_pass(int(counts[k])) for step in kept for counts in step[1:] if counts is not None) / 1e12
        for k in range(6)
    ]
    np.testing.assert_allclose(image_tflop(CONFIG, kept), want, rtol=1e-12)


def test_a_branch_without_steps_is_absent():
    counts = stack_kept(run())
    assert (counts[:, [0, 2], 1] == 0).all() and (counts[:, 1, 1] > 0).all()
    assert list(image_flops(CONFIG, counts)) == ["conditional", "unconditional"]
    assert list(image_flops(CONFIG, counts[:, [0, 2]])) == ["conditional"]


def test_summary():
    kept = run()
    summary = account(kept)
    cost = image_tflop(CONFIG, kept)
    assert summary["tflop_per_image"] == pytest.approx(
        {"mean": cost.mean(), "std": cost.std(), "min": cost.min(), "max": cost.max()}
    )
    for split in ("tflop_by_branch", "tflop_by_component"):
        assert sum(summary[split].values()) == pytest.approx(cost.mean())
    assert summary["tflop_decoding"] == DECODING / 1e12
    assert summary["seconds_per_image"] == pytest.approx({"denoising": 0.5, "decoding": 0.1})
    assert summary["ms_per_image"] == pytest.approx(500) and summary["peak_memory_mb"] == 500
    assert [(row["t"], row["unconditional"] is None) for row in summary["kept_by_step"]] == [
        (900, True),
        (500, False),
        (100, True),
    ]
    middle = kept[1].conditional.double()
    assert summary["kept_by_step"][1]["conditional"]["mean"] == pytest.approx(middle.mean().item())
    assert summary["kept_by_step"][1]["conditional"]["std"] == pytest.approx(middle.std(correction=0).item())
    rows = {row["name"]: row for row in summary["kept_by_class"]}
    assert {name: row["images"] for name, row in rows.items()} == {"a": 2, "c": 4}
    share = torch.stack([step.conditional for step in kept]).double().mean(0) / 64
    assert rows["a"]["share"]["mean"] == pytest.approx(share[[0, 3]].mean().item())
    text = report(summary)
    assert "unconditional branch" in text and "in 1 steps" in text and "6 images, 0.60 s each" in text
    assert "peak memory 500 MB" in text


def test_records_of_batches_make_the_whole(tmp_path):
    whole = run()
    parts = [
        [StepCounts(t, *(x if x is None else x[part] for x in counts)) for t, *counts in whole]
        for part in (slice(4), slice(4, 6))
    ]
    for k, part in enumerate(parts):
        save_record(part, Seconds(1.0 + k, 0.5), 10 - k, tmp_path / f"{k}.npz")
    files = [tmp_path / "0.npz", tmp_path / "1.npz"]
    record = read_records(files, LABELS)
    assert record.timesteps == TIMESTEPS and record.labels == LABELS
    assert np.array_equal(record.counts, stack_kept(whole)) and record.seconds == Seconds(3.0, 1.0)
    assert record.peak_memory == 10
    record = read_records(files, LABELS[:5])  # half of the last batch
    assert len(record.counts) == 5 and record.seconds == Seconds(2.0, 0.75)


def test_a_full_disk_is_not_a_wrong_file(tmp_path, monkeypatch):
    def full(path, write):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(canvas, "write_file", full)
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="is not a summary.json of a sampling run"):
        cost.main([str(tmp_path / "summary.json")])
    save_summary(account(run()), tmp_path / "summary.json")
    with pytest.raises(OSError, match="No space left"):
        cost.main([str(tmp_path / "summary.json")])


def test_pictures(tmp_path, capsys):
    """Drawn from the file alone, also for a run without guidance and with many classes."""
    save_summary(account(run()), tmp_path / "summary.json")
    cost.main([str(tmp_path / "summary.json")])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*cost.PICTURES, "summary.json"])
    counts = np.random.default_rng(0).integers(2, 65, (100, 3, 1))
    counts = np.concatenate([counts, 0 * counts], 2)
    record = SamplingRecord(TIMESTEPS, counts, range(100), Seconds(1, 1), 0)
    summary = summarise(CONFIG, DECODING, None, record)
    save_summary(summary, tmp_path / "many" / "summary.json")
    cost.main([str(tmp_path / "many" / "summary.json"), "--output", str(tmp_path / "pictures")])
    (
        tmp_path / "many" / "settings.json"
    ).touch()  # a folder of samples, among which a chart would be an odd one
    cost.main([str(tmp_path / "many" / "summary.json")])
    assert sorted(path.name for path in (tmp_path / "many.charts").iterdir()) == sorted(cost.PICTURES)
    for name in cost.PICTURES:
        assert (tmp_path / "pictures" / name).read_bytes() != (tmp_path / name).read_bytes()
