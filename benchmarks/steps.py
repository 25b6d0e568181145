"""Whole training and sampling steps: against the textbook version and a static DiT, as a share of the machine's peak, and as
tokens drop, batches grow and images grow."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor

from benchmarks.cases import Case, fixed_probabilities, load, make_case, plain_forward
from benchmarks.measure import medians, peak_bytes, saved_bytes, synchronize
from diffusion.guidance import guide
from evaluation.flops import Kept, forward_flops
from models import compile_parts

LITE = 0.9  # share that the unconditional branch of Lite-CFG drops


class Training:
    """Forward, backward, fused AdamW and EMA on one batch, as the trainer does it."""

    def __init__(self, case: Case, forward: Callable, textbook: bool = False):
        self.case, self.forward, self.textbook = case, forward, textbook
        self.ema = ModelEmaV3(case.model, decay=0.9999)
        how = {"foreach": False} if textbook else {"fused": True}
        self.optimizer = torch.optim.AdamW(case.model.parameters(), lr=1e-5, **how)

    def loss(self) -> Tensor:
        with self.case.autocast():
            out = self.forward(*self.case.inputs)
        loss = F.mse_loss(out.prediction[:, : self.case.noise.shape[1]].float(), self.case.noise)
        return loss if out.routing is None else loss + 0.03 * out.routing.prob.mean()

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.textbook:
            with torch.no_grad():
                for average, value in zip(self.ema.module.parameters(), self.case.model.parameters()):
                    average.mul_(0.9999).add_(value, alpha=1 - 0.9999)
        else:
            self.ema.update(self.case.model)

    def saved(self) -> int:
        return saved_bytes(self.loss, [*self.case.model.parameters(), *self.case.model.buffers(), *self.case.inputs])


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


def measure_step(name: str, batch: int, device: torch.device, bf16: bool, peak: float, seconds: float, compiled: bool) -> dict:
    """One configuration's row: step times in milliseconds, memory in MB, ratios textbook / ours."""
    case = make_case(load(name), batch, device, bf16)
    if compiled:
        compile_parts(case.model)
    textbook = lambda *inputs: plain_forward(case, *inputs)  # noqa: E731
    ours, theirs = Training(case, case.model), Training(case, textbook, textbook=True)
    training = medians({"ours": ours, "plain": theirs}, device, seconds / 2)
    steps = {"ours": sampling(case, case.model), "plain": sampling(case, textbook), "lite": sampling(case, case.model, True)}
    guided = medians(steps, device, seconds / 2)
    flops = sum(forward_flops(case.config, Kept(*case.kept())).values()) * batch
    static_time, static_flops = measure_static(case, batch, device, seconds / 4, compiled)
    return {
        "model": name,
        "batch": batch,
        "train plain ms": training["plain"] * 1e3,
        "train ours ms": training["ours"] * 1e3,
        "train ratio": training["plain"] / training["ours"],
        "static DiT ms, at equal FLOPs": static_time * 1e3 * flops / static_flops,
        "MFU": 3 * flops / training["ours"] / peak,
        "saved plain MB": theirs.saved() / 1e6,
        "saved ours MB": ours.saved() / 1e6,
        "peak plain MB": peak_bytes(theirs, device) / 1e6,
        "peak ours MB": peak_bytes(ours, device) / 1e6,
        "sample plain ms": guided["plain"] * 1e3,
        "sample ours ms": guided["ours"] * 1e3,
        "sample ratio": guided["plain"] / guided["ours"],
        "Lite-CFG ratio": guided["ours"] / guided["lite"],
    }


def measure_static(case: Case, batch: int, device: torch.device, seconds: float, compiled: bool) -> tuple[float, float]:
    """Seconds and forward FLOPs of a training step of the static DiT of the same size on patches of 2 x 2."""
    config = copy.deepcopy(case.config)
    config.model.patch_size = 2
    static = make_case(config, batch, device, case.bf16)
    if compiled:
        compile_parts(static.model)
    time = medians({"static": Training(static, static.model)}, device, seconds)["static"]
    return time, sum(forward_flops(config, Kept(0, 0)).values()) * batch


def measure_dropping(name: str, batch: int, device: torch.device, bf16: bool, seconds: float) -> list[dict]:
    """Time of a training step as tokens drop, against its FLOPs, both as shares of those at no dropping."""
    case = make_case(load(name), batch, device, bf16)
    step, length = Training(case, case.model), case.prob.shape[1]
    rows, drops = [], (0.0, 0.2, 0.4, 0.6)

    def at(drop: float) -> Callable[[], None]:
        prob = fixed_probabilities(batch, length, (1 - drop) / case.config.training.downsample_factor, device)

        def run() -> None:
            case.prob = prob
            step()

        return run

    runs = {str(drop): at(drop) for drop in drops}
    times = medians(runs, device, seconds)
    for drop in drops:
        runs[str(drop)]()
        flops = sum(forward_flops(case.config, Kept(*case.kept())).values())
        rows.append({"dropped": drop, "ms": times[str(drop)] * 1e3, "time": times[str(drop)] / times["0.0"], "flops": flops})
    return [row | {"flops": row["flops"] / rows[0]["flops"]} for row in rows]


def measure_batches(name: str, batches: list[int], device: torch.device, bf16: bool, seconds: float) -> list[dict]:
    """Images per second of a training step."""
    rows = []
    for batch in batches:
        case = make_case(load(name), batch, device, bf16)
        time = medians({"step": Training(case, case.model)}, device, seconds / len(batches))["step"]
        rows.append({"model": name, "batch": batch, "ms": time * 1e3, "images/s": batch / time})
    return rows


def profile_step(name: str, batch: int, device: torch.device, bf16: bool) -> str:
    """The operations that take most of one training step."""
    case = make_case(load(name), batch, device, bf16)
    step = Training(case, case.model)
    step()
    with torch.profiler.profile() as profiler:
        step()
        synchronize(device)
    return profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=15, max_name_column_width=60)
