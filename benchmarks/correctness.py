"""The network on this device against values recorded on a CPU, in every precision.

The router's decisions are compared with the recorded ones, and then replaced by them: one token more or less
would change everything that follows.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from benchmarks.meters import largest_difference
from benchmarks.report import Row
from benchmarks.workload import Case, Setup
from config import config_from_dict
from models import build_model, reference
from models.dc_dit import DCDiT
from models.ops.precision import allow_tf32
from models.types import Routing
from weights.foreign import from_official

RECORDED = Path(__file__).parent.parent / "tests" / "golden"

# Precision -> largest differences that rounding explains: of outputs, of the norms of gradients
TOLERANCES = {"float32": (1e-4, 1e-3), "TF32": (1e-2, 5e-2), "bfloat16": (5e-2, 2e-1)}


@dataclass
class Recorded:
    """A network with its inputs, and what it computes in float32 on a CPU."""

    name: str
    model: nn.Module  # its router is called `router`
    inputs: tuple[Any, ...]
    prediction: Tensor
    routing: Routing
    gradient_norm: float  # of the sum of squared predictions, over all parameters


def measure_recorded(setup: Setup) -> list[Row]:
    """Rows for every recorded case of the official implementation."""
    rows = []
    for file in sorted(RECORDED.glob("*.safetensors")):
        recorded = read_recorded(file)
        if recorded is not None:
            rows += compare(recorded, setup)
    return rows


def measure_model(case: Case, setup: Setup) -> list[Row]:
    """Rows for a configuration, against its textbook version on the host."""
    config = case.config()
    torch.manual_seed(0)
    model = build_model(config)
    assert isinstance(model, DCDiT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        # Near a probability of one half, so that some tokens are kept
        model.router.get_parameter("residual_scorer.3.bias").zero_()

    # What the textbook version computes
    x = torch.randn(case.batch, *config.latent_shape)
    t = torch.randint(config.diffusion.diffusion_steps, (case.batch,))
    labels = torch.randint(config.data.num_classes, (case.batch,))
    out = reference.forward(model, x, t, labels)
    routing = Routing(*[value.detach() for value in out.routing])
    norm = gradient_norm(model, out.prediction)
    recorded = Recorded(str(case), model, (x, t, labels, None), out.prediction.detach(), routing, norm)
    return compare(recorded, setup)


def read_recorded(file: Path) -> Recorded | None:
    """A case of the tests; None for files of other things than networks."""
    with safe_open(file, "pt") as stream:
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
        texts = stream.metadata()
    if "hnet" not in texts:
        return None
    config = config_from_dict(
        {
            "model": {"hnet": json.loads(texts["hnet"]), "mlp_ratio": json.loads(texts["mlp_ratio"])},
            "training": {"learn_sigma": json.loads(texts["learn_sigma"])},
            "data": {
                "image_size": json.loads(texts["input_size"]),
                "latent_stride": 1,
                "num_classes": json.loads(texts["num_classes"]),
            },
        }
    )
    model = build_model(config)
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    model.load_state_dict(from_official(state))
    drop = json.loads(texts["tail_dropping_fraction"])
    if isinstance(drop, list):
        drop = torch.tensor(drop)
    inputs = (tensors["in.x"], tensors["in.t"], tensors["in.y"], drop)
    routing = Routing(
        tensors["out.stage0.boundary_prob"],
        tensors["out.stage0.boundary_mask_natural"].bool(),
        tensors["out.stage0.boundary_mask"].bool(),
    )
    norm = gradient_norm(model, model(*inputs).prediction)
    return Recorded(file.stem, model, inputs, tensors["out.model"], routing, norm)


def gradient_norm(model: nn.Module, prediction: Tensor) -> float:
    """Norm of the gradient of the sum of squares, over all parameters."""
    model.zero_grad()
    prediction.float().square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item()


def compare(recorded: Recorded, setup: Setup) -> list[Row]:
    """A row per precision."""
    model = recorded.model.to(setup.device)
    inputs = [value.to(setup.device) if isinstance(value, Tensor) else value for value in recorded.inputs]
    wanted = Routing(*[value.to(setup.device) for value in recorded.routing])
    rows: list[Row] = []
    for precision, (output_tolerance, gradient_tolerance) in TOLERANCES.items():
        if precision == "TF32" and setup.device.type != "cuda":
            continue
        with arithmetic(precision, setup), recorded_routing(model, wanted) as decided:
            prediction = model(*inputs).prediction
            norm = gradient_norm(model, prediction)
        own = decided[0]
        differences = {
            "probability": (own.prob.float() - wanted.prob).abs().max().item(),
            "prediction": largest_difference([prediction], [recorded.prediction.to(setup.device)]),
            "gradient": abs(norm / recorded.gradient_norm - 1),
        }
        outputs = max(differences["probability"], differences["prediction"])
        is_right = outputs < output_tolerance and differences["gradient"] < gradient_tolerance
        rows.append(
            {
                "case": recorded.name,
                "precision": precision,
                "tokens decided differently": int((own.keep != wanted.keep).sum()),
                **differences,
                "allowed": output_tolerance,
                "right": "yes" if is_right else "NO",
            }
        )
    return rows


@contextlib.contextmanager
def arithmetic(precision: str, setup: Setup) -> Iterator[None]:
    """Compute in this precision."""
    allow_tf32(precision == "TF32")
    with torch.autocast(setup.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        yield
    allow_tf32(setup.tf32)


@contextlib.contextmanager
def recorded_routing(model: nn.Module, wanted: Routing) -> Iterator[list[Routing]]:
    """Replace what the router decides by `wanted`; yields a list that gets its own decisions."""
    decided: list[Routing] = []

    def replace(module: nn.Module, inputs: tuple, routing: Routing) -> Routing:
        decided.append(routing)
        return Routing(wanted.prob + (routing.prob - routing.prob.detach()), wanted.boundary, wanted.keep)

    handle = model.get_submodule("router").register_forward_hook(replace)
    try:
        yield decided
    finally:
        handle.remove()
