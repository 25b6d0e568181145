"""All benchmarks of one device: tables on the screen, the same numbers in a JSON file, and a report in Markdown.

python -m benchmarks --device cpu
python -m benchmarks --device cuda --output results/h100.json
python -m benchmarks --device cpu --only stages --seconds 60
python -m benchmarks --device cpu --only roofline

The report lies beside the JSON file. The same command resumes where an earlier one was cut. What the file has from
this machine is not measured again, unless --only names the part.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

import cli
from benchmarks.plan import PARTS, Job, Sizes, choose_sizes, plan_jobs
from benchmarks.report import command_line, environment, read_json, write_report
from benchmarks.runner import run_job
from benchmarks.workload import Case, Setup, load
from config import UserError
from processes.hardware import machine


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=default, help="(default: %(default)s)")
    add("--only", choices=tuple(PARTS), nargs="+", help="measure these parts, again if they are measured")
    add("--seconds", type=float, default=10.0, help="measured time per row, without warm-up (default: 10)")
    add("--tf32", action="store_true", help="products in float32 may run as TF32")
    add("--model", help="measure steps of this configuration only, e.g. DCDiT-XL-N4")
    add("--batch", type=int, default=8, help="batch size of --model (default: 8)")
    add("--smoke", action="store_true", help="tiny sizes, which only show that every part runs")
    add(
        "--output",
        type=Path,
        default=Path("results/benchmarks.json"),
        help="JSON file (default: %(default)s)",
    )
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
    cli.check_output_file("--output", args.output)
    read_json(args.output)


def chosen_jobs(args: argparse.Namespace, done: set[tuple[str, str]]) -> list[Job]:
    """The jobs that the command line asks for, without those that are done."""
    sizes = choose_sizes(args.device, args.smoke)
    parts = args.only
    if args.model:
        sizes = with_steps_of(sizes, Case(args.model, args.batch))
        parts = parts or ["steps", "compiled"]
    jobs = plan_jobs(sizes)
    if args.tf32:
        jobs = [job._replace(name=f"{job.name}, TF32") for job in jobs]
    if parts:
        return [job for job in jobs if job.part in parts]
    return [job for job in jobs if (job.part, job.name) not in done]


def with_steps_of(sizes: Sizes, case: Case) -> Sizes:
    """Sizes with the steps of one configuration."""
    # On a GPU the precisions are not measured
    precisions = (case,) if sizes.precisions else ()
    return replace(sizes, steps=(case,), compiled=(case,), precisions=precisions)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = torch.device(args.device)
    setup = Setup(device, bf16=args.device == "cuda", seconds=args.seconds, tf32=args.tf32)
    name = machine(device)
    print(name)

    # What is left to measure
    measured = read_json(args.output).get(name, {})
    done = set()
    for part, results in measured.items():
        done |= {(part, job) for job, result in results.items() if "rows" in result}
    jobs = chosen_jobs(args, done)
    report = args.output.with_suffix(".md")
    facts = {**environment(device), "command": command_line(), "date": time.strftime("%Y-%m-%d")}

    # Measure, and write the report after every job
    failed = 0
    for number, job in enumerate(jobs, 1):
        print(f"[{number}/{len(jobs)}] {job.part}: {job.name}", flush=True)
        failed += not run_job(job, setup, args.output, name)
        write_report(report, name, facts, read_json(args.output)[name], PARTS)
    print(f"{len(jobs) - failed} of {len(jobs)} measured; {report} and {args.output}")


if __name__ == "__main__":
    cli.run(main)
