"""Jobs in processes of their own: one that runs out of memory, or never ends, loses its own rows only."""

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.plan import Job
from benchmarks.report import Result, add_to_json, table
from benchmarks.workload import Setup
from config import one_line

LONGEST = 1800  # seconds that a job may take


def run_job(job: Job, setup: Setup, output: Path, machine: str) -> bool:
    """Run a job and add its result to the file `output`. Returns whether it was measured."""
    # A server that is started afresh, and has neither threads nor a GPU open, forks the processes
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.plan"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(job, setup, sender))
    process.start()
    sender.close()

    # Until a result arrives, or the process ends without one
    result: Result
    try:
        if receiver.poll(LONGEST):
            result = receiver.recv()
        else:
            result = {"failed": f"It took longer than {LONGEST / 60:.0f} minutes."}
            process.kill()
    except EOFError:
        process.join()
        result = {
            "failed": f"Its process ended with status {process.exitcode}; -9 is often a lack of memory."
        }
    process.join(60)
    if process.is_alive():
        process.kill()
    add_to_json(output, machine, job.part, job.name, result)
    if "failed" in result:
        print(f"not measured: {result['failed']}", flush=True)
        return False
    print(f"\n{table(result['rows'])}\n", flush=True)
    return True


def measure(job: Job, setup: Setup, sender: Connection) -> None:
    """In the process of a job: send its result."""
    start = time.perf_counter()
    try:
        rows = job.measure(setup)
        result: Result = {"rows": rows, "seconds": time.perf_counter() - start}
    except Exception as error:  # a library may raise anything; the other jobs still run
        result = {"failed": one_line(error, 300)}
    sender.send(result)
