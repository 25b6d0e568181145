"""Every stage of the network against its textbook version: time, memory, and the largest difference."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.measure import Variants, compare
from models import reference
from models.conv import to_grid, to_tokens
from models.packing import pack, plan_packing
from models.types import Routing

FLOAT32 = ("router", "dechunk")  # also where the network runs in bfloat16


def measure_stages(case: Case, seconds: float) -> list[dict]:
    """A row per stage; times in milliseconds, memory in MB, ratios plain / ours of times and ours / plain of memory."""
    rows = []
    for name, variants, inputs, module in stages(case):
        if name not in FLOAT32:
            variants = {key: in_precision(case, function) for key, function in variants.items()}
        result = compare(variants, inputs, module, case.prob.device, seconds)
        ours, theirs = result["ours"], result["plain"]
        row = {"stage": name}
        for key in ours:
            better = theirs[key] / ours[key] if key.endswith("_ms") else ours[key] / max(theirs[key], 1e-9)
            row |= {f"plain {key}": theirs[key], f"ours {key}": ours[key], f"ratio {key[:-3]}": better}
        rows.append(row | {"difference": result["error"]})
    return rows


def in_precision(case: Case, function):
    def run():
        with case.autocast():
            return function()

    return run


def stages(case: Case) -> Iterator[tuple[str, Variants, list[Tensor], nn.Module | None]]:
    """Name, the two ways to compute a stage, inputs, and the module whose weights get gradients."""
    model, (x, _, _) = case.model, case.inputs
    batch, length, width = len(x), case.prob.shape[1], case.config.d_model

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=x.device).requires_grad_()

    c, features, narrow = (
        random(batch, width),
        random(batch, length, width),
        random(batch, length, case.config.encoder_width),
    )
    for name, stack, tokens in (("encoder", model.encoder, narrow), ("decoder", model.decoder, features)):
        yield (
            name,
            {
                "plain": lambda stack=stack, tokens=tokens: reference.conv_stack(stack, tokens, c),
                "ours": lambda stack=stack, tokens=tokens: to_tokens(stack(to_grid(tokens), c)),
            },
            [tokens, c],
            stack,
        )
    drop = torch.full((batch,), 0.3, device=x.device)
    yield (
        "router",
        {
            "plain": lambda: reference.router(model.router, features, drop).prob,
            "ours": lambda: (
                model.router.forward(to_grid(features), drop).prob
            ),  # without the hook that fixes the mask
        },
        [features],
        model.router,
    )
    yield from packed_stages(case, c, features)


def packed_stages(case: Case, c: Tensor, features: Tensor):
    model, prob = case.model, case.prob.clone().requires_grad_()
    routing = Routing(prob, prob > 0.5, prob > 0.5)
    packing, chunks = plan_packing(routing.keep), reference.plan(routing)
    tokens = torch.randn(len(packing.token_index), case.config.d_model, device=c.device).requires_grad_()
    residual, block = torch.randn_like(features).requires_grad_(), model.blocks[0]
    sigma = case.sigma
    yield (
        "pack",
        {
            "plain": lambda: reference.pack(features, reference.plan(routing)),
            "ours": lambda: pack(features, plan_packing(routing.keep)),
        },
        [features],
        None,
    )
    yield (
        "attention",
        {
            "plain": lambda: reference.attention(block.attn, tokens, chunks),
            "ours": lambda: block.attn(tokens, packing),
        },
        [tokens],
        block.attn,
    )
    yield (
        "block",
        {
            "plain": lambda: reference.block(block, tokens, c, chunks),
            "ours": lambda: block(tokens, c, packing),
        },
        [tokens, c],
        block,
    )
    yield (
        "dechunk",
        {
            "plain": lambda: reference.dechunk(tokens, routing, chunks, sigma) + residual,
            "ours": lambda: model.dechunk(tokens, residual, routing, packing),
        },
        [tokens, prob, residual],
        None,
    )
