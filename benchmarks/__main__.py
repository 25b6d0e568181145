"""All benchmarks of one device: tables on the screen, the same numbers as JSON in a file.

python -m benchmarks --device cpu
python -m benchmarks --device cuda --compile
python -m benchmarks --device cpu --only stages --seconds 60
"""

import argparse
import gc
from pathlib import Path

import torch

import cli
from benchmarks import around, stages, steps
from benchmarks.cases import load, make_case
from benchmarks.measure import add_to_json, machine, matmul_peak, print_table, read_json
from config import UserError

PARTS = ("stages", "steps", "dropping", "batches", "resolutions", "graphs", "around", "processes", "profile")

# What fits into minutes on a CPU and into memory and 8 minutes on one large GPU. (configuration, batch, overrides)
STAGES = {
    "cpu": [("DCDiT-B-N4", 8, ()), ("DCDiT-B-N4-512", 8, ("model.hnet.dechunk_kernel_sigma=1.0",))],
    "cuda": [("DCDiT-B-N4", 64, ()), ("DCDiT-B-N4-512", 16, ())],
}
STEPS = {
    "cpu": [("DCDiT-S-N4", 2), ("DCDiT-S-N4-512", 1)],
    "cuda": [
        ("DCDiT-S-N4", 256), ("DCDiT-B-N4", 256), ("DCDiT-L-N4", 64), ("DCDiT-XL-N4", 64),
        ("DCDiT-S-N4-512", 64), ("DCDiT-B-N4-512", 32), ("DCDiT-L-N4-512", 16), ("DCDiT-XL-N4-512", 8),
    ],
}  # fmt: skip
COMPILED = {"cpu": ("DCDiT-S-N4",), "cuda": ("DCDiT-B-N4", "DCDiT-XL-N4")}
GRAPHS = {"cpu": [], "cuda": [("DCDiT-S-N4", 8), ("DCDiT-B-N4", 8), ("DCDiT-B-N4", 64), ("DCDiT-XL-N4", 8)]}
BATCHES = {"cpu": [1, 2, 4, 8], "cuda": [16, 64, 256]}
RESOLUTIONS = {"cpu": ([128, 256, 512], 1), "cuda": ([256, 512, 1024], 8)}  # pixels, batch


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="(default: %(default)s)")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts to run (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="measured time per row, without warm-up (default: 10)"
    )
    parser.add_argument("--model", help="measure steps of this configuration only, e.g. DCDiT-XL-N4")
    parser.add_argument("--batch", type=int, default=8, help="batch size of --model (default: 8)")
    parser.add_argument(
        "--compile", action="store_true", help="at the end, some steps (with --model, its) with torch.compile"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks.json"), help="JSON file (default: benchmarks.json)"
    )
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device; use cpu")
    if args.batch < 1:
        raise UserError(f"--batch {args.batch}: must be at least 1")
    if args.model and load(args.model).is_static:
        raise UserError(
            f"--model {args.model}: is a static DiT, which has no textbook version here; give a DCDiT-..."
        )
    cli.check_output("--output", args.output.parent)
    read_json(args.output)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device, bf16 = torch.device(args.device), args.device == "cuda"
    print(machine(device))
    for part in [*args.only, *(["compiled"] if args.compile else [])]:
        for title, rows in RUN[part](args, device, bf16):
            print_table(title, rows)
            add_to_json(args.output, title, rows, device)
        gc.collect()  # the next part, or its processes, may need all memory
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run_stages(args, device, bf16):
    for name, batch, overrides in STAGES[args.device]:
        case = make_case(load(name, *overrides), batch, device, bf16)
        yield f"stages, {name}, batch {batch}", stages.measure_stages(case, args.seconds)


def run_steps(args, device, bf16):
    yield "steps", measure_steps(args, device, bf16, STEPS[args.device], compiled=False)


def run_compiled(args, device, bf16):
    chosen = [one for one in STEPS[args.device] if one[0] in COMPILED[args.device]]
    yield "steps, compiled", measure_steps(args, device, bf16, chosen, compiled=True)


def measure_steps(args, device, bf16, chosen, compiled: bool) -> list[dict]:
    peak = matmul_peak(device, torch.bfloat16 if bf16 else torch.float32)
    print(f"a matrix product reaches {peak / 1e12:.3g} TFLOP/s")
    chosen = [(args.model, args.batch)] if args.model else chosen
    return [steps.measure_step(*one, device, bf16, peak, args.seconds, compiled) for one in chosen]


def run_dropping(args, device, bf16):
    name, batch = ("DCDiT-B-N4", 256 if bf16 else 4)
    yield (
        f"a training step as tokens drop, {name}, batch {batch}",
        steps.measure_dropping(name, batch, device, bf16, args.seconds),
    )


def run_batches(args, device, bf16):
    sizes = [(256, batch) for batch in BATCHES[args.device]]
    yield "batches", steps.measure_sizes("DCDiT-S-N4", sizes, device, bf16, args.seconds)


def run_resolutions(args, device, bf16):
    resolutions, batch = RESOLUTIONS[args.device]
    sizes = [(pixels, batch) for pixels in resolutions]
    yield "resolutions", steps.measure_sizes("DCDiT-S-N4", sizes, device, bf16, args.seconds)


def run_graphs(args, device, bf16):
    if rows := [steps.measure_graph(*one, device, bf16, args.seconds) for one in GRAPHS[args.device]]:
        yield "sampling steps as CUDA graphs", rows


def run_around(args, device, bf16):
    yield "loading", around.measure_loading(2048, args.seconds / 5)
    yield "updates", around.measure_updates("DCDiT-B-N4", device, args.seconds)


def run_processes(args, device, bf16):
    batch = 64 if bf16 else 2
    yield "processes", around.measure_processes("DCDiT-S-N4", batch, args.device == "cuda", bf16, steps=4)


def run_profile(args, device, bf16):
    print(steps.profile_step("DCDiT-B-N4", 256 if bf16 else 8, device, bf16))
    return []


FUNCTIONS = (
    run_stages, run_steps, run_dropping, run_batches, run_resolutions, run_graphs, run_around, run_processes, run_profile,
)  # fmt: skip
RUN = dict(zip(PARTS, FUNCTIONS)) | {
    "compiled": run_compiled
}  # last: it takes longest, and the others are saved by then

if __name__ == "__main__":
    cli.run(main)
