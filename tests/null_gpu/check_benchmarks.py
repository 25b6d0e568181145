"""All benchmarks on the null GPU, in tiny sizes: every part runs there, and the report is written."""

import dataclasses
import json

import numpy as np
import pytest

import benchmarks.__main__ as command
import extract_features
from benchmarks import plan, runner, stages, workload
from models import dc_dit, packing


def plan_packing(keep, lengths=None):
    """Of masks on the device, a quarter is kept: what the host reads there means nothing."""
    if lengths is None and keep.is_cuda:
        keep.sum(1).tolist()
        lengths = keep.shape[1] // 4
    return packing.plan_packing(keep, lengths)


def encode_images(autoencoder, images, indices, settings):
    """The autoencoder's kernels, and zeros in place of what they left."""
    autoencoder.encode(images)
    return np.zeros((len(images), *settings.item_shape), settings.dtype)


@pytest.fixture(autouse=True)
def made_up_values(monkeypatch):
    """In this process, and with ours in place of the textbook version, which reads values everywhere."""
    measure_stage = stages.measure_stage

    def compare_with_itself(stage, *others):
        return measure_stage(dataclasses.replace(stage, textbook=stage.ours), *others)

    monkeypatch.setattr(stages, "measure_stage", compare_with_itself)
    monkeypatch.setattr(stages, "plan_packing", plan_packing)
    monkeypatch.setattr(dc_dit, "plan_packing", plan_packing)
    monkeypatch.setattr(extract_features, "encode_images", encode_images)
    monkeypatch.setattr(workload.Workload, "textbook_forward", lambda self, *inputs: self.model(*inputs))
    monkeypatch.setattr(runner, "in_its_process", lambda job, setup: runner.measure(job, setup))


def test_every_part_runs(tmp_path):
    file = tmp_path / "out.json"
    command.main(["--device", "cuda", "--smoke", "--seconds", "0", "--output", str(file)])
    (parts,) = json.loads(file.read_text()).values()
    jobs = plan.plan_jobs(plan.choose_sizes("cuda", smoke=True))
    for job in jobs:
        assert parts[job.part][job.name].get("rows"), (job.name, parts[job.part][job.name])
    assert "not measured" not in file.with_suffix(".md").read_text()
