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
PATIENCE = 60  # seconds until a process that has sent its result is ended


def run_job(job: Job, setup: Setup, output: Path, machine: str) -> bool:
    """Run a job and add its result to the file `output`. Returns whether it was measured."""
    result = in_its_process(job, setup)
    add_to_json(output, machine, job.part, job.name, result)
    if "failed" in result:
        print(f"not measured: {result['failed']}", flush=True)
        return False
    print(f"\n{table(result['rows'])}\n", flush=True)
    return True


def in_its_process(job: Job, setup: Setup) -> Result:
    """The result of a job that runs in a process of its own."""
    # A server that has neither threads nor a GPU open forks the processes
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.plan"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_result, args=(job, setup, sender))
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
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
    return result


def send_result(job: Job, setup: Setup, sender: Connection) -> None:
    """What the process of a job does."""
    sender.send(measure(job, setup))


def measure(job: Job, setup: Setup) -> Result:
    """The rows of a job, or why there are none."""
    start = time.perf_counter()
    try:
        rows = job.measure(setup)
    except Exception as error:  # a library may raise anything; the other jobs still run
        return {"failed": one_line(error, 300)}
    return {"rows": rows, "seconds": time.perf_counter() - start}
