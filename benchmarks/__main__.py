"""All benchmarks of one device: tables on the screen, the same numbers as JSON in a file.

python -m benchmarks --device cpu
python -m benchmarks --device cuda --compile
python -m benchmarks --device cpu --only stages --seconds 60
"""

import argparse
from pathlib import Path

import torch

import cli
from benchmarks import around, stages, steps
from benchmarks.cases import load, make_case
from benchmarks.measure import machine, matmul_peak, print_table, write_json
from config import UserError

PARTS = ("stages", "steps", "dropping", "batches", "around", "processes", "profile")

# What fits into minutes on a CPU and into memory and 8 minutes on one large GPU. (configuration, batch, overrides)
STAGES = {
    "cpu": [("DCDiT-B-N4", 8, ()), ("DCDiT-B-N4-512", 8, ("model.hnet.dechunk_kernel_sigma=1.0",))],
    "cuda": [("DCDiT-B-N4", 64, ()), ("DCDiT-B-N4-512", 16, ())],
}
STEPS = {
    "cpu": [("DCDiT-S-N4", 8), ("DCDiT-B-N4", 8)],
    "cuda": [
        ("DCDiT-S-N4", 256), ("DCDiT-B-N4", 256), ("DCDiT-L-N4", 64), ("DCDiT-XL-N4", 64),
        ("DCDiT-B-N4-512", 32), ("DCDiT-XL-N4-512", 8),
    ],
}  # fmt: skip
BATCHES = {"cpu": [1, 2, 4, 8], "cuda": [16, 64, 256]}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=cli.default_device().type, help="(default: %(default)s)")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts to run (default: all)")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured time per row, without warm-up (default: 10)")
    parser.add_argument("--model", help="measure steps of this configuration only, e.g. DCDiT-XL-N4")
    parser.add_argument("--batch", type=int, default=8, help="batch size of --model (default: 8)")
    parser.add_argument("--compile", action="store_true", help="steps of B and XL with torch.compile as well")
    parser.add_argument("--output", type=Path, default=Path("benchmarks.json"), help="JSON file (default: benchmarks.json)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device; use cpu")
    cli.check_output("--output", args.output.parent)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device, bf16 = torch.device(args.device), args.device == "cuda"
    print(machine(device))
    tables = {}
    for part in args.only:
        for title, rows in RUN[part](args, device, bf16):
            tables[title] = rows
            print_table(title, rows)
            write_json(args.output, tables, device)


def run_stages(args, device, bf16):
    for name, batch, overrides in STAGES[args.device]:
        case = make_case(load(name, *overrides), batch, device, bf16)
        yield f"stages, {name}, batch {batch}", stages.measure_stages(case, args.seconds)


def run_steps(args, device, bf16):
    peak = matmul_peak(device, torch.bfloat16 if bf16 else torch.float32)
    chosen = [(args.model, args.batch)] if args.model else STEPS[args.device]
    print(f"a matrix product reaches {peak / 1e12:.3g} TFLOP/s")
    yield "steps", [steps.measure_step(*one, device, bf16, peak, args.seconds, False) for one in chosen]
    if args.compile:
        targets = [one for one in chosen if one[0] in ("DCDiT-B-N4", "DCDiT-XL-N4")]
        yield "steps, compiled", [steps.measure_step(*one, device, bf16, peak, args.seconds, True) for one in targets]


def run_dropping(args, device, bf16):
    name, batch = ("DCDiT-B-N4", 256 if bf16 else 4)
    yield (
        f"a training step as tokens drop, {name}, batch {batch}",
        steps.measure_dropping(name, batch, device, bf16, args.seconds),
    )


def run_batches(args, device, bf16):
    yield "batches", steps.measure_batches("DCDiT-S-N4", BATCHES[args.device], device, bf16, args.seconds)


def run_around(args, device, bf16):
    yield "loading", around.measure_loading(2048, args.seconds / 5)
    yield "updates", around.measure_updates("DCDiT-B-N4", device, args.seconds)


def run_processes(args, device, bf16):
    batch = 64 if bf16 else 2
    yield "processes", around.measure_processes("DCDiT-S-N4", batch, args.device == "cuda", bf16, steps=4)


def run_profile(args, device, bf16):
    print(steps.profile_step("DCDiT-B-N4", 256 if bf16 else 8, device, bf16))
    return []


RUN = dict(zip(PARTS, (run_stages, run_steps, run_dropping, run_batches, run_around, run_processes, run_profile)))

if __name__ == "__main__":
    cli.run(main)
