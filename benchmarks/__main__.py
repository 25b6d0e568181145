"""All benchmarks of one device: tables on the screen, the same numbers as JSON in a file.

python -m benchmarks --device cpu
python -m benchmarks --device cuda --compile
python -m benchmarks --device cpu --only stages --seconds 60
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import cli
from benchmarks import loading, processes, stages, steps, updates
from benchmarks.meters import matmul_peak
from benchmarks.report import Row, add_to_json, machine, print_table, read_json
from benchmarks.workload import Setup, build_workload, load
from config import UserError

# What fits into minutes on a CPU, and into the memory and 8 minutes of one large GPU.
# Configuration, batch, overrides
STAGES: dict[str, list[tuple[str, int, list[str]]]] = {
    "cpu": [("DCDiT-B-N4", 8, []), ("DCDiT-B-N4-512", 8, ["model.hnet.dechunk_kernel_sigma=1.0"])],
    "cuda": [("DCDiT-B-N4", 64, []), ("DCDiT-B-N4-512", 16, [])],
}
# Configuration, batch
STEPS = {
    "cpu": [("DCDiT-S-N4", 2), ("DCDiT-S-N4-512", 1)],
    "cuda": [
        ("DCDiT-S-N4", 256), ("DCDiT-B-N4", 256), ("DCDiT-L-N4", 64), ("DCDiT-XL-N4", 64),
        ("DCDiT-S-N4-512", 64), ("DCDiT-B-N4-512", 32), ("DCDiT-L-N4-512", 16), ("DCDiT-XL-N4-512", 8),
    ],
}  # fmt: skip
COMPILED = {"cpu": [("DCDiT-S-N4", 2)], "cuda": [("DCDiT-B-N4", 256), ("DCDiT-XL-N4", 64)]}
GRAPHS: dict[str, list[tuple[str, int]]] = {
    "cpu": [],
    "cuda": [("DCDiT-S-N4", 8), ("DCDiT-B-N4", 8), ("DCDiT-B-N4", 64), ("DCDiT-XL-N4", 8)],
}
# Pixels, batch
BATCHES = {"cpu": [(256, 1), (256, 2), (256, 4), (256, 8)], "cuda": [(256, 16), (256, 64), (256, 256)]}
RESOLUTIONS = {"cpu": [(128, 1), (256, 1), (512, 1)], "cuda": [(256, 8), (512, 8), (1024, 8)]}
# Batch
DROPPING = {"cpu": 4, "cuda": 256}
PROCESSES = {"cpu": 2, "cuda": 64}
PROFILE = {"cpu": 8, "cuda": 256}

Tables = Iterator[tuple[str, list[Row]]]  # titles and rows


def run_stages(args: argparse.Namespace, setup: Setup) -> Tables:
    for name, batch, overrides in STAGES[args.device]:
        workload = build_workload(load(name, *overrides), batch, setup)
        yield f"stages, {name}, batch {batch}", stages.measure_stages(workload, setup)


def run_steps(args: argparse.Namespace, setup: Setup) -> Tables:
    yield "steps", measure_steps(args, setup, STEPS[args.device], compiled=False)


def run_compiled(args: argparse.Namespace, setup: Setup) -> Tables:
    yield "steps, compiled", measure_steps(args, setup, COMPILED[args.device], compiled=True)


def measure_steps(
    args: argparse.Namespace, setup: Setup, chosen: list[tuple[str, int]], compiled: bool
) -> list[Row]:
    """Rows of the chosen configurations, or of --model."""
    peak = matmul_peak(setup.device, torch.bfloat16 if setup.bf16 else torch.float32)
    print(f"a matrix product reaches {peak / 1e12:.3g} TFLOP/s")
    if args.model:
        chosen = [(args.model, args.batch)]
    return [steps.measure_step(name, batch, setup, peak, compiled) for name, batch in chosen]


def run_dropping(args: argparse.Namespace, setup: Setup) -> Tables:
    name = "DCDiT-B-N4"
    batch = DROPPING[args.device]
    rows = steps.measure_dropping(name, batch, setup)
    yield f"a training step as tokens drop, {name}, batch {batch}", rows


def run_batches(args: argparse.Namespace, setup: Setup) -> Tables:
    yield "batches", steps.measure_sizes("DCDiT-S-N4", BATCHES[args.device], setup)


def run_resolutions(args: argparse.Namespace, setup: Setup) -> Tables:
    yield "resolutions", steps.measure_sizes("DCDiT-S-N4", RESOLUTIONS[args.device], setup)


def run_graphs(args: argparse.Namespace, setup: Setup) -> Tables:
    rows = [steps.measure_graph(name, batch, setup) for name, batch in GRAPHS[args.device]]
    if rows:
        yield "sampling steps as CUDA graphs", rows


def run_around(args: argparse.Namespace, setup: Setup) -> Tables:
    yield "loading", loading.measure_loading(2048, setup.seconds / 5)
    yield "updates", updates.measure_updates("DCDiT-B-N4", setup)


def run_processes(args: argparse.Namespace, setup: Setup) -> Tables:
    yield "processes", processes.measure_processes("DCDiT-S-N4", PROCESSES[args.device], setup)


def run_profile(args: argparse.Namespace, setup: Setup) -> Tables:
    print(steps.profile_step("DCDiT-B-N4", PROFILE[args.device], setup))
    yield from ()  # nothing for the file


PARTS: dict[str, Callable[[argparse.Namespace, Setup], Tables]] = {
    "stages": run_stages,
    "steps": run_steps,
    "dropping": run_dropping,
    "batches": run_batches,
    "resolutions": run_resolutions,
    "graphs": run_graphs,
    "around": run_around,
    "processes": run_processes,
    "profile": run_profile,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=default, help="(default: %(default)s)")
    add("--only", choices=tuple(PARTS), nargs="+", default=tuple(PARTS), help="parts to run (default: all)")
    add("--seconds", type=float, default=10.0, help="measured time per row, without warm-up (default: 10)")
    add("--tf32", action="store_true", help="products in float32 may run as TF32")
    add("--model", help="measure steps of this configuration only, e.g. DCDiT-XL-N4")
    add("--batch", type=int, default=8, help="batch size of --model (default: 8)")
    add(
        "--compile", action="store_true", help="at the end, measure some steps, or those of --model, compiled"
    )
    add("--output", type=Path, default=Path("benchmarks.json"), help="JSON file (default: benchmarks.json)")
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device; use cpu")
    cli.check_at_least(args, 1, "batch")
    if args.model and load(args.model).is_static:
        raise UserError(
            f"--model {args.model}: is a static DiT, which has no textbook version here; give a DCDiT-..."
        )
    cli.check_output("--output", args.output.parent)
    read_json(args.output)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = torch.device(args.device)
    setup = Setup(device, bf16=args.device == "cuda", seconds=args.seconds, tf32=args.tf32)
    print(machine(device))
    parts = [PARTS[name] for name in args.only]
    if args.compile:
        # Last, because it takes longest and the others are saved by then
        parts.append(run_compiled)
    for run in parts:
        for title, rows in run(args, setup):
            print_table(title, rows)
            add_to_json(args.output, title, rows, device)
        # The next part, or its processes, may need all memory
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    cli.run(main)
