"""Generations of GPUs: which precision and attention are chosen, or one clear error."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from config import UserError, config_from_dict
from models import attention, build_model
from null_gpu.counts import counting
from training import launch

FORK = multiprocessing.get_context("fork")  # this process has not asked for the device's properties


def on(capability: str, function, *arguments):
    """Call a function in a process that sees a GPU of this generation."""
    variable = ("NULL_GPU_CAPABILITY", capability)
    with ProcessPoolExecutor(1, FORK, os.environ.__setitem__, variable) as pool:
        return pool.submit(function, *arguments).result()


def train_a_model(precision: str) -> tuple[str, str, list[str]]:
    """Name of the device, precision and kernels of a forward and backward pass.

    The samples are long enough for cuDNN, which some versions of PyTorch take on some GPUs from 129 tokens on.
    """
    hnet = {"arch_layout": ["c1", ["D1"], "c1"], "d_model": [64, 64], "num_heads": [1, 1]}
    config = config_from_dict(
        {
            "model": {"hnet": hnet},
            "data": {"image_size": 256, "num_classes": 3},
            "training": {"precision": precision},
        }
    )
    accelerator = launch.make_accelerator(config)
    model = build_model(config).cuda()
    x = torch.zeros(2, 4, 32, 32, device="cuda")
    numbers = torch.zeros(2, dtype=torch.int64, device="cuda")
    for _ in range(2):  # in the first step, kernels are compared with plain forms
        with counting() as counts:
            with accelerator.autocast():
                prediction = model(x, numbers, numbers).prediction
            prediction.float().sum().backward()
    return torch.cuda.get_device_name(), accelerator.mixed_precision, list(counts.kernels)


@pytest.mark.parametrize("capability", ["8.0", "8.6", "9.0", "10.0"])
def test_bfloat16_and_flash(capability):
    name, precision, kernels = on(capability, train_a_model, "auto")
    assert precision == "bf16", name
    assert any("flash_fwd" in kernel for kernel in kernels), kernels
    assert "cudnn_graph" not in kernels


@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_float32(capability):
    _, precision, kernels = on(capability, train_a_model, "fp32")
    assert precision == "no"
    assert not any("bfloat16" in kernel.lower() for kernel in kernels)


def test_without_bfloat16():
    """A T4 trains in float32, and says why it does not train in bfloat16."""
    name, precision, kernels = on("7.5", train_a_model, "auto")
    assert name == "Tesla T4"
    assert precision == "no"
    assert not any("flash_fwd" in kernel for kernel in kernels)
    with pytest.raises(UserError, match="training.precision bf16: needs compute capability 8.0"):
        on("7.5", train_a_model, "bf16")


def test_kernels_for_packed_tokens_need_ampere():
    problem = on("7.5", attention.kernel_problem, "varlen", torch.device("cuda"), True, 64)
    assert problem is not None
