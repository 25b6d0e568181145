"""Every stage of the network against its textbook version: time, memory, and the largest difference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.meters import largest_difference, medians, peak_bytes, saved_bytes
from benchmarks.report import Row
from benchmarks.workload import Case, Setup, Workload, build_workload
from grid import Grid
from models import reference
from models.blocks import DiTBlock
from models.conv import ConvStack, to_grid, to_tokens
from models.packing import pack, plan_packing
from models.types import Routing

Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Stage:
    """A part of the network, computed in two ways from the same tensors."""

    name: str
    textbook: Forward
    ours: Forward
    inputs: list[Tensor]
    module: nn.Module | None = None  # its parameters get gradients, as do the inputs
    is_float32: bool = False  # in float32 also where the network runs in bfloat16


def measure_stages(case: Case, setup: Setup) -> list[Row]:
    """A row per stage: times in milliseconds, memory in MB."""
    workload = build_workload(case.config(), case.batch, setup)
    return [{**case.columns, **row} for row in compare_stages(workload, setup)]


def compare_stages(workload: Workload, setup: Setup) -> list[Row]:
    """The same, of a model that is built.

    Ratios are plain / ours for times and ours / plain for memory.
    """
    conditioning = random_tensor(workload, workload.config.d_model)
    features = random_tensor(workload, workload.config.tokens, workload.config.d_model)
    stages = [
        *scaffold_stages(workload, conditioning, features),
        *packed_stages(workload, conditioning, features),
    ]
    return [measure_stage(stage, workload, setup) for stage in stages]


def random_tensor(workload: Workload, *shape: int) -> Tensor:
    """(B, *shape), with gradient."""
    batch = len(workload.x)
    return torch.randn(batch, *shape, device=workload.x.device).requires_grad_()


# -------------------------------------------------------------------------------------------------- stages


def scaffold_stages(workload: Workload, conditioning: Tensor, features: Tensor) -> list[Stage]:
    """Encoder, decoder and router, which see all tokens.

    Args:
        conditioning: (B, D). features: (B, L, D).
    """
    model = workload.dc_dit
    narrow = random_tensor(workload, workload.config.tokens, workload.config.encoder_width)
    drop = torch.full((len(workload.x),), 0.3, device=workload.x.device)
    router = Stage(
        "router",
        textbook=lambda: reference.router(model.router, features, drop, model.grid).prob,
        # Not called as a module, whose hook would replace the probabilities
        ours=lambda: model.router.forward(to_grid(features, model.grid), drop).prob,
        inputs=[features],
        module=model.router,
        is_float32=True,
    )
    return [
        conv_stage("encoder", model.encoder, narrow, conditioning, model.grid),
        conv_stage("decoder", model.decoder, features, conditioning, model.grid),
        router,
    ]


def conv_stage(name: str, stack: ConvStack, tokens: Tensor, conditioning: Tensor, grid: Grid) -> Stage:
    """A stack of convolution blocks on tokens (B, L, in) with conditioning (B, D)."""
    return Stage(
        name,
        textbook=lambda: reference.conv_stack(stack, tokens, conditioning, grid),
        ours=lambda: to_tokens(stack(to_grid(tokens, grid), conditioning)),
        inputs=[tokens, conditioning],
        module=stack,
    )


def packed_stages(workload: Workload, conditioning: Tensor, features: Tensor) -> list[Stage]:
    """Packing, attention, a whole block and the dechunk, which see the kept tokens.

    Args:
        conditioning: (B, D). features: (B, L, D).
    """
    model = workload.dc_dit
    block = cast(DiTBlock, model.blocks[0])
    prob = workload.prob.clone().requires_grad_()
    boundary = prob > 0.5
    routing = Routing(prob, boundary, boundary)
    packing = plan_packing(routing.keep)
    chunks = reference.plan(routing)

    kept = len(packing.token_index)
    tokens = torch.randn(kept, workload.config.d_model, device=features.device).requires_grad_()
    residual = torch.randn_like(features).requires_grad_()
    sigma = model.dechunk.smoothing.sigma
    return [
        Stage(
            "pack",
            textbook=lambda: reference.pack(features, reference.plan(routing)),
            ours=lambda: pack(features, plan_packing(routing.keep)),
            inputs=[features],
        ),
        Stage(
            "attention",
            textbook=lambda: reference.attention(block.attn, tokens, chunks),
            ours=lambda: block.attn(tokens, packing),
            inputs=[tokens],
            module=block.attn,
        ),
        Stage(
            "block",
            textbook=lambda: reference.block(block, tokens, conditioning, chunks),
            ours=lambda: block(tokens, conditioning, packing),
            inputs=[tokens, conditioning],
            module=block,
        ),
        Stage(
            "dechunk",
            textbook=lambda: reference.dechunk(tokens, routing, chunks, sigma, model.grid) + residual,
            ours=lambda: model.dechunk(tokens, residual, routing, packing),
            inputs=[tokens, prob, residual],
            is_float32=True,
        ),
    ]


# ---------------------------------------------------------------------------------------------- comparison


def measure_stage(stage: Stage, workload: Workload, setup: Setup) -> Row:
    """Time and memory of both ways to compute a stage, and how far results and gradients differ."""
    forwards = {"plain": stage.textbook, "ours": stage.ours}
    if not stage.is_float32:
        forwards = {way: with_autocast(workload, forward) for way, forward in forwards.items()}
    parameters = list(stage.module.parameters()) if stage.module else []
    buffers = list(stage.module.buffers()) if stage.module else []
    known = [*stage.inputs, *parameters, *buffers]
    wanted = [tensor for tensor in [*stage.inputs, *parameters] if tensor.requires_grad]

    # Forward passes alone
    with torch.no_grad():
        gradient = torch.randn_like(forwards["ours"]())
        forward_times = medians(forwards, setup.device, setup.seconds / 3)

    # Forward and backward passes
    passes = {way: with_backward(forward, wanted, gradient) for way, forward in forwards.items()}
    pass_times = medians(passes, setup.device, setup.seconds * 2 / 3)

    row: Row = {"stage": stage.name}
    row |= columns("forward", "ms", {way: time * 1e3 for way, time in forward_times.items()})
    row |= columns("both", "ms", {way: time * 1e3 for way, time in pass_times.items()})
    saved = {way: saved_bytes(forward, known) / 1e6 for way, forward in forwards.items()}
    row |= columns("saved", "mb", saved)
    peak = {way: peak_bytes(both, setup.device) / 1e6 for way, both in passes.items()}
    row |= columns("peak", "mb", peak)
    row["difference"] = largest_difference(passes["plain"](), passes["ours"]())
    return row


def with_autocast(workload: Workload, forward: Forward) -> Forward:
    """A forward pass in the precision of the network."""

    def run() -> Tensor:
        with workload.autocast():
            return forward()

    return run


def with_backward(forward: Forward, wanted: list[Tensor], gradient: Tensor) -> Callable[[], list[Tensor]]:
    """A function that returns the output and the gradients of the `wanted` tensors."""

    def run() -> list[Tensor]:
        output = forward()
        return [output, *torch.autograd.grad(output, wanted, gradient)]

    return run


def columns(name: str, unit: str, values: dict[str, float]) -> Row:
    """Three columns of a row: both values and their ratio."""
    plain = values["plain"]
    ours = values["ours"]
    ratio = plain / ours if unit == "ms" else ours / max(plain, 1e-9)
    return {f"plain {name}_{unit}": plain, f"ours {name}_{unit}": ours, f"ratio {name}": ratio}
