"""What is measured, and in which sizes: each part of the report is a list of jobs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from benchmarks import (
    attention,
    budgets,
    correctness,
    kernels,
    loading,
    networks,
    precisions,
    processes,
    roofline,
    stages,
    steps,
    updates,
)
from benchmarks.report import Row
from benchmarks.workload import Case, Setup

# Part -> what its tables show
PARTS = {
    "correctness": "Recorded values of the official implementation, and the textbook version on a CPU in float32, "
    "against this device in every precision. Differences are relative to the largest value.",
    "attention": "Every attention kernel against softmax in float32, on samples of different lengths.",
    "stages": "Each stage of the network against its textbook version. Ratios are plain / ours for times and "
    "ours / plain for memory.",
    "steps": "A training step and a guided sampling step against the textbook version and a static DiT. The "
    "number of tokens differs from step to step, as in training. MFU is the share of a measured product's rate.",
    "compiled": "The same with torch.compile.",
    "precisions": "A forward and a backward pass in float32 and in bfloat16, textbook and ours, all in turn; and "
    "the shares of the kinds of operations in each.",
    "roofline": "What an H100 needs at least: bytes, products and launches, counted operation by operation. "
    "The measured time stands beside it where this device is a GPU.",
    "budgets": "Time of sampling against FLOPs as the budget falls, as shares of guidance with nothing dropped; "
    "excess is time / FLOPs.",
    "dropping": "Time of a training step against FLOPs as tokens drop.",
    "graphs": "Guided sampling steps under a token budget, launched kernel by kernel and as a CUDA graph.",
    "launches": "What the host does in a step: kernels launched, waits for the device, values read; and PyTorch's "
    "memory after steps with different numbers of tokens, allocated and reserved.",
    "profile": "The operations, on a GPU the kernels, that take most of a training step.",
    "batches": "Images per second of training as the batch grows.",
    "resolutions": "Images per second of training as the image grows.",
    "networks": "Images per second of extraction and evaluation, with random weights.",
    "loading": "Latents per second out of each kind of store.",
    "updates": "Optimizer, EMA and checkpoint.",
    "processes": "Images per second of training with several processes.",
}


class Job(NamedTuple):
    """Rows of one table, measured together."""

    part: str
    name: str  # unique in its part
    measure: Callable[[Setup], list[Row]]  # a partial of a function that other processes can import


@dataclass(frozen=True)
class Sizes:
    """What fits a device: minutes on a CPU, an hour and the memory of one large GPU."""

    attention: Case
    stages: tuple[Case, ...]
    steps: tuple[Case, ...]
    compiled: tuple[Case, ...]
    precisions: tuple[Case, ...]
    budgets: tuple[Case, ...]
    graphs: tuple[Case, ...]
    base: Case  # of the parts that measure one configuration
    batches: tuple[Case, ...]
    resolutions: tuple[Case, ...]
    network: networks.NetworkSizes
    latents: int  # in the stores that are read
    processes: tuple[Case, ...]


CPU = Sizes(
    attention=Case("DCDiT-B-N4", 4),
    stages=(Case("DCDiT-B-N4", 8), Case("DCDiT-B-N4-512", 8, ("model.hnet.dechunk_kernel_sigma=1.0",))),
    steps=(Case("DCDiT-S-N4", 2), Case("DCDiT-S-N4-512", 1)),
    compiled=(Case("DCDiT-S-N4", 2),),
    precisions=(Case("DCDiT-B-N4", 4), Case("DCDiT-S-N4-512", 1)),
    budgets=(Case("DCDiT-B-N4", 1), Case("DCDiT-B-N4", 8), Case("DCDiT-S-N4", 64)),
    graphs=(),
    base=Case("DCDiT-B-N4", 4),
    batches=tuple(Case("DCDiT-S-N4", batch) for batch in (1, 2, 4, 8)),
    resolutions=tuple(Case("DCDiT-S-N4", 1, (f"data.image_size={side}",)) for side in (128, 256, 512)),
    network=networks.NetworkSizes(images=8, pixels=256, batch=4, widths=networks.PUBLISHED_WIDTHS),
    latents=2048,
    processes=(Case("DCDiT-S-N4", 2),),
)
CUDA = Sizes(
    attention=Case("DCDiT-B-N4", 256),
    stages=(Case("DCDiT-B-N4", 64), Case("DCDiT-B-N4-512", 16)),
    steps=(
        Case("DCDiT-S-N4", 256),
        Case("DCDiT-B-N4", 32),  # per GPU in the paper's launch on 8 of them
        Case("DCDiT-B-N4", 256),
        Case("DCDiT-L-N4", 64),
        Case("DCDiT-XL-N4", 64),
        Case("DCDiT-S-N4-512", 64),
        Case("DCDiT-B-N4-512", 32),
        Case("DCDiT-L-N4-512", 16),
        Case("DCDiT-XL-N4-512", 8),
    ),
    compiled=(Case("DCDiT-B-N4", 256), Case("DCDiT-XL-N4", 64)),
    precisions=(),
    budgets=(Case("DCDiT-B-N4", 1), Case("DCDiT-B-N4", 8), Case("DCDiT-B-N4", 64)),
    graphs=(
        Case("DCDiT-S-N4", 8),
        Case("DCDiT-B-N4", 1),
        Case("DCDiT-B-N4", 8),
        Case("DCDiT-B-N4", 64),
        Case("DCDiT-XL-N4", 8),
    ),
    base=Case("DCDiT-B-N4", 256),
    batches=tuple(Case("DCDiT-S-N4", batch) for batch in (16, 64, 256)),
    resolutions=tuple(Case("DCDiT-S-N4", 8, (f"data.image_size={side}",)) for side in (256, 512, 1024)),
    network=networks.NetworkSizes(images=2048, pixels=256, batch=32, widths=networks.PUBLISHED_WIDTHS),
    latents=2048,
    processes=(Case("DCDiT-S-N4", 64),),
)
# The quickstart's model: shows that everything runs, and nothing about speed
SMOKE_CASE = Case("shapes", 2)
SMOKE = Sizes(
    attention=SMOKE_CASE,
    stages=(SMOKE_CASE,),
    steps=(SMOKE_CASE,),
    compiled=(),
    precisions=(SMOKE_CASE,),
    budgets=(SMOKE_CASE,),
    graphs=(),
    base=SMOKE_CASE,
    batches=(SMOKE_CASE,),
    resolutions=(),
    network=networks.NetworkSizes(images=2, pixels=64, batch=2, widths=(32, 32), features=64),
    latents=16,
    processes=(),
)


def choose_sizes(device: str, smoke: bool) -> Sizes:
    """The sizes for a device."""
    if smoke:
        return replace(SMOKE, graphs=(SMOKE_CASE,)) if device == "cuda" else SMOKE
    return CUDA if device == "cuda" else CPU


def plan_jobs(sizes: Sizes) -> list[Job]:
    """All jobs, in the order of PARTS."""
    base = sizes.base
    jobs = [Job("correctness", "recorded values", correctness.measure_recorded)]
    jobs.append(each("correctness", correctness.measure_model, base._replace(batch=2)))
    jobs.append(each("attention", attention.measure_kernels, sizes.attention))
    jobs += [each("stages", stages.measure_stages, case) for case in sizes.stages]
    jobs += [each("steps", steps.measure_step, case) for case in sizes.steps]
    jobs += [each("compiled", partial(steps.measure_step, compiled=True), case) for case in sizes.compiled]
    for case in sizes.precisions:
        jobs.append(each("precisions", precisions.measure_precisions, case))
        jobs.append(Job("precisions", f"{case}, shares", partial(precisions.list_shares, case)))
    jobs.append(Job("roofline", "training and sampling", roofline.measure_roofline))
    jobs += [each("budgets", budgets.measure_budgets, case) for case in sizes.budgets]
    jobs.append(each("dropping", steps.measure_dropping, base))
    jobs += [each("graphs", steps.measure_graph, case) for case in sizes.graphs]
    jobs.append(each("launches", kernels.count_launches, base))
    jobs.append(each("profile", kernels.list_kernels, base))
    jobs += [each("batches", steps.measure_size, case) for case in sizes.batches]
    jobs += [each("resolutions", steps.measure_size, case) for case in sizes.resolutions]
    jobs.append(Job("networks", "extraction", partial(networks.measure_extraction, sizes.network)))
    jobs.append(Job("networks", "evaluation", partial(networks.measure_evaluation, sizes.network)))
    jobs.append(Job("loading", "stores", partial(loading.measure_loading, sizes.latents)))
    jobs.append(Job("updates", base.model, partial(updates.measure_updates, base.model)))
    jobs += [each("processes", processes.measure_processes, case) for case in sizes.processes]
    return jobs


def each(part: str, measure: Callable[..., list[Row]], case: Case) -> Job:
    """A job that measures one case."""
    return Job(part, str(case), partial(measure, case))
