"""Whole training and sampling steps: against the textbook version and a static DiT, as a share of the machine's peak, and as
tokens drop, batches grow and images grow."""

import copy
import itertools
import statistics
from collections.abc import Callable

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from benchmarks.cases import Case, fixed_probabilities, load, make_case, plain_forward
from benchmarks.measure import difference, medians, peak_bytes, saved_bytes, synchronize
from config import downsample_factors, switch_router_off
from diffusion import create_diffusion
from diffusion.guidance import guide
from models import architecture, compile_parts
from models.flops import TokenCounts, forward_flops, total_flops
from models.router import keep_top
from sampling.cuda_graph import GraphedDenoiser
from training.losses import ratio_loss

LITE = 0.9  # share that the unconditional branch of Lite-CFG drops


class Training:
    """A training step on one batch: all terms of the loss, backward, clipping, fused AdamW and EMA, as the trainer does them.

    Without loading, the averages for the log, and the check for finite gradients. The textbook version has AdamW as PyTorch
    makes it when nothing is asked for, and the EMA as a loop.
    """

    def __init__(self, case: Case, forward: Callable, textbook: bool = False):
        self.case, self.forward, self.textbook = case, forward, textbook
        training, process = case.config.training, case.config.diffusion
        self.diffusion = create_diffusion(
            process.noise_schedule, process.diffusion_steps, training.learn_sigma
        )
        self.ema = ModelEmaV3(case.model, decay=0.9999, exclude_buffers=True)
        how = {} if textbook else {"fused": True}
        self.optimizer = torch.optim.AdamW(
            case.model.parameters(), lr=1e-5, weight_decay=training.weight_decay, **how
        )

    def loss(self) -> Tensor:
        (x0, t, labels), noise, training = self.case.inputs, self.case.noise, self.case.config.training
        x_t = self.diffusion.add_noise(x0, t, noise)
        with self.case.autocast():
            out = self.forward(x_t, t, labels)
        loss = sum(self.diffusion.losses(out.prediction.float(), x0, x_t, t, noise).values()).mean()
        if training.ratio_loss_weight > 0:
            loss = loss + training.ratio_loss_weight * ratio_loss(
                out.routing, downsample_factors(training.downsample_factor)
            )
        return loss

    def __call__(self) -> None:
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.case.model.parameters(), self.case.config.training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.textbook:
            with torch.no_grad():
                for average, value in zip(self.ema.module.parameters(), self.case.model.parameters()):
                    average.mul_(0.9999).add_(value, alpha=1 - 0.9999)
        else:
            self.ema.update(self.case.model)

    def saved(self) -> int:
        known = [
            *self.case.model.parameters(),
            *self.case.model.buffers(),
            *self.case.inputs,
            self.case.noise,
        ]
        return saved_bytes(self.loss, known)


def sampling(case: Case, forward: Callable, lite: bool = False) -> Callable[[], Tensor]:
    """One guided evaluation of the network: both branches in one batch, with the unconditional one's budget under Lite-CFG."""
    x, t, labels = case.inputs
    null = torch.full_like(labels, case.config.data.num_classes)
    if lite:
        keep = case.prob > 0.5
        cheap = keep & (torch.rand_like(case.prob) > LITE)
        cheap[:, 0] = cheap[:, -1] = True
        unconditional = torch.where(cheap == keep, case.prob, 1 - case.prob)
    both = torch.cat([case.prob, unconditional if lite else case.prob])

    def denoise(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        with case.autocast():
            return forward(x, t, labels).prediction.float()

    guided = guide(denoise, {"labels": labels}, {"labels": null}, 1.5, 3)

    @torch.no_grad()
    def step() -> Tensor:
        alone, case.prob = case.prob, both
        result = guided(x, t)
        case.prob = alone
        return result

    return step


def under(case: Case, prob: Tensor, step: Callable[[], object]) -> Callable[[], None]:
    """A step on the tokens that `prob` keeps."""

    def run() -> None:
        case.prob = prob
        step()

    return run


def in_turn(steps: list[Callable[[], object]]) -> Callable[[], None]:
    """A function that takes the next of these steps; each has been taken once, which is when torch.compile compiles."""
    for step in steps:
        step()
    turn = itertools.cycle(steps)
    return lambda: next(turn)()


def measure_step(
    name: str, batch: int, device: torch.device, bf16: bool, peak: float, seconds: float, compiled: bool
) -> dict:
    """One configuration's row: step times in milliseconds, memory in MB, ratios textbook / ours.

    Batches of two different numbers of tokens take turns, so that what was compiled is good for any number, as in training.
    """
    case = make_case(load(name), batch, device, bf16)
    shares = [factor / downsample_factors(case.config.training.downsample_factor) for factor in (0.95, 1.05)]
    masks = [fixed_probabilities(batch, case.prob.shape[1], share, device) for share in shares]
    if compiled:
        torch._dynamo.reset()  # of the row before, whose compilations count towards a limit
        compile_parts(case.model)
    textbook = lambda *inputs: plain_forward(case, *inputs)  # noqa: E731
    ours, theirs = Training(case, case.model), Training(case, textbook, textbook=True)
    training, guided, flops = {"ours": [], "plain": []}, {"ours": [], "plain": [], "lite": []}, []
    for prob in masks:
        case.prob = prob
        training["ours"].append(under(case, prob, ours))
        training["plain"].append(under(case, prob, theirs))
        guided["ours"].append(under(case, prob, sampling(case, case.model)))
        guided["plain"].append(under(case, prob, sampling(case, textbook)))
        guided["lite"].append(under(case, prob, sampling(case, case.model, lite=True)))
        flops.append(
            sum(forward_flops(architecture(case.config), TokenCounts(*case.kept())).values()) * batch
        )
    training = medians({way: in_turn(steps) for way, steps in training.items()}, device, seconds / 2)
    guided = medians({way: in_turn(steps) for way, steps in guided.items()}, device, seconds / 2)
    flops = statistics.mean(flops)
    memory = {
        "saved plain MB": theirs.saved() / 1e6,
        "saved ours MB": ours.saved() / 1e6,
        "peak plain MB": peak_bytes(theirs, device) / 1e6,
        "peak ours MB": peak_bytes(ours, device) / 1e6,
    }
    static_time, static_flops = measure_static(case, batch, device, seconds / 4, compiled)
    return {
        "model": name,
        "batch": batch,
        "train plain ms": training["plain"] * 1e3,
        "train ours ms": training["ours"] * 1e3,
        "train ratio": training["plain"] / training["ours"],
        "train DiT on 2 x 2 patches ms": static_time * 1e3,
        "the same, scaled to equal FLOPs": static_time * 1e3 * flops / static_flops,
        "MFU": 3 * flops / training["ours"] / peak,
        **memory,
        "sample plain ms": guided["plain"] * 1e3,
        "sample ours ms": guided["ours"] * 1e3,
        "sample ratio": guided["plain"] / guided["ours"],
        "Lite-CFG ratio": guided["ours"] / guided["lite"],
    }


def measure_graph(name: str, batch: int, device: torch.device, bf16: bool, seconds: float) -> dict:
    """Guided sampling steps under a token budget, their kernels launched one by one and as a CUDA graph."""
    case = make_case(load(name), batch, device, bf16)
    tokens = case.prob.shape[1] // int(downsample_factors(case.config.training.downsample_factor))
    kept = keep_top(torch.rand_like(case.prob), tokens)
    case.prob = torch.where(kept, 0.75, 0.25)
    budget = [tokens] * (2 * batch)
    ways = {"plain": case.model, "graph": GraphedDenoiser(case.model)}
    steps = {
        way: sampling(case, lambda *inputs, model=model: model(*inputs, tokens=budget))
        for way, model in ways.items()
    }
    times = medians(steps, device, seconds)
    row = {
        "model": name,
        "batch": batch,
        "tokens": tokens,
        **{f"{way} ms": time * 1e3 for way, time in times.items()},
    }
    return row | {
        "ratio": times["plain"] / times["graph"],
        "difference": difference([steps["graph"]()], [steps["plain"]()]),
    }


def measure_static(
    case: Case, batch: int, device: torch.device, seconds: float, compiled: bool
) -> tuple[float, float]:
    """Seconds and forward FLOPs of a training step of the static DiT of the same size on patches of 2 x 2."""
    config = copy.deepcopy(case.config)
    config.model.patch_size = 2
    switch_router_off(config.training)
    static = make_case(config, batch, device, case.bf16)
    if compiled:
        torch._dynamo.reset()
        compile_parts(static.model)
    time = medians({"static": Training(static, static.model)}, device, seconds)["static"]
    return time, total_flops(architecture(config), TokenCounts(0, 0)) * batch


def measure_dropping(name: str, batch: int, device: torch.device, bf16: bool, seconds: float) -> list[dict]:
    """Time of a training step as tokens drop, against its FLOPs, both as shares of those at no dropping."""
    case = make_case(load(name), batch, device, bf16)
    step, length = Training(case, case.model), case.prob.shape[1]
    rows, drops = [], (0.0, 0.2, 0.4, 0.6)

    factor = downsample_factors(case.config.training.downsample_factor)
    masks = {drop: fixed_probabilities(batch, length, (1 - drop) / factor, device) for drop in drops}
    runs = {str(drop): under(case, prob, step) for drop, prob in masks.items()}
    times = medians(runs, device, seconds)
    for drop in drops:
        case.prob = masks[drop]
        flops = sum(forward_flops(architecture(case.config), TokenCounts(*case.kept())).values())
        rows.append(
            {
                "dropped": drop,
                "ms": times[str(drop)] * 1e3,
                "time": times[str(drop)] / times["0.0"],
                "flops": flops,
            }
        )
    return [row | {"flops": row["flops"] / rows[0]["flops"]} for row in rows]


def measure_sizes(
    name: str, sizes: list[tuple[int, int]], device: torch.device, bf16: bool, seconds: float
) -> list[dict]:
    """Images per second of a training step on pictures of so many pixels in batches of so many."""
    rows = []
    for pixels, batch in sizes:
        case = make_case(load(name, f"data.image_size={pixels}"), batch, device, bf16)
        time = medians({"step": Training(case, case.model)}, device, seconds / len(sizes))["step"]
        rows.append(
            {"model": name, "pixels": pixels, "batch": batch, "ms": time * 1e3, "images/s": batch / time}
        )
    return rows


def profile_step(name: str, batch: int, device: torch.device, bf16: bool) -> str:
    """The operations that take most of one training step."""
    case = make_case(load(name), batch, device, bf16)
    step = Training(case, case.model)
    step()
    with torch.profiler.profile() as profiler:
        step()
        synchronize(device)
    return profiler.key_averages().table(
        sort_by=f"self_{device.type}_time_total", row_limit=15, max_name_column_width=60
    )
