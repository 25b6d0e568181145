"""What is chosen for a device: backend, precision and TF32. GPUs are made up."""

import pytest
import torch

from config import UserError, config_from_dict
from models.ops.precision import allow_tf32, bfloat16_problem, tf32
from processes import group
from sampling.arguments import graph_problem
from sampling.budgets import ALL, Budget
from sampling.options import SamplingOptions
from training import launch

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability, count): there seem to be GPUs."""

    def pretend(capability=(9, 0), count=1):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    return pretend


@pytest.mark.parametrize(
    "device, processes, gpus, backend",
    [("cuda", 1, 1, "nccl"), ("cuda", 8, 8, "nccl"), ("cuda", 2, 1, "gloo"), ("cpu", 2, 0, "gloo")],
)
def test_nccl_needs_a_gpu_for_each_process(gpu, monkeypatch, device, processes, gpus, backend):
    gpu(count=gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert group.choose_backend(torch.device(device)) == backend


def test_bfloat16_is_chosen_where_the_gpu_has_it(gpu):
    config = config_from_dict({})
    gpu((8, 0))
    assert launch.choose_precision(config, CUDA) == "bf16" and bfloat16_problem(CUDA) is None
    gpu((7, 5))
    assert launch.choose_precision(config, CUDA) == "no" and "a GPU has less" in bfloat16_problem(CUDA)
    assert bfloat16_problem(torch.device("cpu")) is None


def test_bfloat16_is_refused_where_the_gpu_lacks_it(gpu):
    class Bfloat16:
        mixed_precision, device = "bf16", CUDA

    gpu((7, 5))
    with pytest.raises(UserError, match="training.precision bf16: needs compute capability 8.0"):
        launch.check_precision(Bfloat16, config_from_dict({}))
    gpu((8, 6))
    launch.check_precision(Bfloat16, config_from_dict({}))


@pytest.mark.parametrize(
    "values, beside_bf16, alone",
    [
        ({}, True, False),
        ({"training": {"tf32": True}}, True, True),
        ({"training": {"tf32": False}}, False, False),
        ({"training": {"tf32": False}, "model": {"hnet": {"fp32_router_dechunk": "tf32"}}}, True, True),
    ],
)
def test_tf32_comes_with_bfloat16_unless_it_is_said(values, beside_bf16, alone):
    config = config_from_dict(values)
    assert config.allows_tf32(bf16=True) == beside_bf16
    assert config.allows_tf32(bf16=False) == alone


@pytest.mark.parametrize("outside", [True, False])
def test_tf32_within_a_block_only(outside):
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    allow_tf32(outside)
    with tf32(not outside):
        assert [switch.allow_tf32 for switch in switches] == [not outside] * 2
    assert [switch.allow_tf32 for switch in switches] == [outside] * 2
    for switch, value in zip(switches, before):
        switch.allow_tf32 = value


@pytest.mark.parametrize(
    "patch, device, budget, problem",
    [
        (None, "cuda", Budget.tokens(9), None),
        (2, "cuda", ALL, None),
        (None, "cuda", ALL, "add --token-budget"),
        (None, "cpu", Budget.tokens(9), "needs a CUDA device"),
    ],
)
def test_graphs_need_fixed_shapes_and_a_gpu(patch, device, budget, problem):
    class Trained:
        config = config_from_dict({"model": {"patch_size": patch}})

    Trained.device = torch.device(device)
    found = graph_problem(Trained, SamplingOptions(budget=budget))
    assert found is None if problem is None else problem in found


def test_one_order_of_sums(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    launch.choose_deterministic_kernels()
    assert asked == [True] and not torch.utils.deterministic.fill_uninitialized_memory
