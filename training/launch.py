"""What the launcher decides: processes, device, precision and sharding, checked against the configuration."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, LoggerType

from config import Config, UserError, to_dict, validate_processes
from data.autoencoder import hash_weights
from data.features import Features
from models import flops
from models.attention import kernel_problem
from models.ops.precision import allow_tf32, bfloat16_problem, has_bfloat16
from processes import group
from processes.agreement import check_agreement
from processes.sharding import is_sharded, prepare_sharding
from weights.checkpoint import Checkpoint

BF16_WIDTH = 128  # from this width on, bfloat16 is faster than float32 on a CPU that multiplies in it

# ------------------------------------------------------------------------------ before the processes have met


def announced_processes() -> int:
    """Number of processes that the launcher says it starts."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_batch_size(config: Config) -> int:
    """Images of one process per micro-step; UserError if the global batch does not divide."""
    return validate_processes(config, announced_processes())


def describe_batches(config: Config) -> str:
    """A text about the batch sizes for the number of processes that the launcher announces."""
    effective = config.training.global_batch_size * config.training.gradient_accumulation_steps
    return (
        f"processes     {announced_processes()}\n"
        f"local batch   {local_batch_size(config)} of {config.training.global_batch_size}\n"
        f"effective     {effective} images per optimizer step"
    )


def check_trackers(config: Config) -> None:
    """Raise a UserError for a tracker that Accelerate does not know."""
    known = LoggerType.list()
    unknown = set(config.logging.trackers) - set(known)
    if unknown:
        raise UserError(f"logging.trackers: {', '.join(unknown)} is not one of {', '.join(known)}")


def choose_precision(config: Config, device: torch.device, state: Checkpoint | None = None) -> str:
    """Accelerate's name of the precision.

    It is that of the configuration, otherwise of the checkpoint that training resumes from, otherwise of the
    launcher, otherwise bfloat16 where that is faster. Without an option of its own, `accelerate launch` names
    float32, which must not change a run that began in bfloat16.
    """
    if config.training.precision == "bf16":
        return "bf16"
    if config.training.precision == "fp32":
        return "no"
    # The precision is "auto"
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION")
    resumed = state if state is not None and "optimizer" in state else None
    recorded = resumed.get("precision") if resumed is not None else None
    if recorded:
        return recorded
    if launcher is not None:
        return launcher
    if resumed is not None:
        # Checkpoints without the entry were trained in float32 on CPUs
        return "bf16" if has_bfloat16(device) else "no"
    if device.type == "cpu":
        return "bf16" if config.d_model >= BF16_WIDTH and has_bf16_products() else "no"
    return "bf16" if has_bfloat16(device) else "no"


def has_bf16_products() -> bool:
    """Whether the processor multiplies in bfloat16, with AMX or AVX512-BF16 (measured in docs/performance.md).

    Decided by what the processor is and not by a measurement, because the choice changes every sum of a run.
    """
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


# ----------------------------------------------------------------------------------------- the processes meet


def make_accelerator(config: Config, state: Checkpoint | None = None) -> Accelerator:
    """Start Accelerate, which joins the processes. UserError if it cannot train this configuration.

    Args:
        state: the checkpoint to start from, or None.
    """
    check_dynamo()
    device = group.default_device()
    if config.training.deterministic:
        choose_deterministic_kernels()
    no_changing_buffers = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    meeting = InitProcessGroupKwargs(timeout=group.COLLECTIVE_TIMEOUT)
    if announced_processes() > 1:
        meeting.backend = group.choose_backend(device)
    with numbered_by_gpu(device):
        accelerator = Accelerator(
            # Without this, Accelerate takes the processes of torchrun on a CPU for separate runs
            cpu=device.type == "cpu",
            mixed_precision=choose_precision(config, device, state),
            log_with=config.logging.trackers or None,
            project_dir=config.logging.results_dir,  # until the folder of the run is known
            kwargs_handlers=[no_changing_buffers, meeting],
        )
    # Refuse what Accelerate would accept
    check_processes(accelerator)
    check_installed_trackers(accelerator, config)
    prepare_sharding(accelerator)
    if is_sharded(accelerator):
        check_unsharded(config)
    check_precision(accelerator, config)
    allow_tf32(config.allows_tf32(accelerator.mixed_precision == "bf16"))
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION")
    is_auto = config.training.precision == "auto"
    if is_auto and launcher not in (None, accelerator.mixed_precision):
        accelerator.print(
            f"precision: {accelerator.mixed_precision}, as in the checkpoint; the launcher says {launcher}; "
            "--set training.precision decides in a new run"
        )
    elif is_auto and has_bfloat16(device) and accelerator.mixed_precision == "no":
        accelerator.print(
            "precision: float32, as the launcher says; with --mixed_precision bf16 training is faster"
        )
    if is_auto and device.type == "cpu" and accelerator.mixed_precision == "bf16":
        accelerator.print("precision: bfloat16; --set training.precision=fp32 trains a new run in float32")
    return accelerator


def check_dynamo() -> None:
    """Raise a UserError if the launcher compiles the model: its wrapper would change all names in checkpoints."""
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise UserError(
            f"--dynamo_backend {backend}: is not supported; use no (also in `accelerate config`), and compile with "
            "--set training.compile=true"
        )


@contextlib.contextmanager
def numbered_by_gpu(device: torch.device) -> Iterator[None]:
    """Give the launcher's number of this process as that of its GPU, which is another where processes share one.

    Accelerate takes the one for the other.
    """
    number = os.environ.get("LOCAL_RANK")
    if device.type == "cuda" and number is not None:
        os.environ["LOCAL_RANK"] = str(int(number) % torch.cuda.device_count())
    try:
        yield
    finally:
        if number is not None:
            os.environ["LOCAL_RANK"] = number


def choose_deterministic_kernels() -> None:
    """Have this process run only kernels that add in one order."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch insists on it
    torch.use_deterministic_algorithms(True)
    # A help for debugging, at a launch per tensor
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def check_processes(accelerator: Accelerator) -> None:
    """Raise a UserError if Accelerate has not joined the processes that the launcher started."""
    announced = announced_processes()
    if accelerator.num_processes != announced:
        raise UserError(
            f"WORLD_SIZE {announced}: Accelerate found {accelerator.num_processes}; "
            "use accelerate launch or torchrun"
        )


def check_installed_trackers(accelerator: Accelerator, config: Config) -> None:
    """Raise a UserError for a tracker that Accelerate has left out."""
    installed = {str(tracker) for tracker in accelerator.log_with}
    missing = set(config.logging.trackers) - {"all"} - installed
    if missing:
        raise UserError(
            f"logging.trackers: {', '.join(missing)} is not installed; install it or leave it out"
        )


def check_unsharded(config: Config) -> None:
    """Raise a UserError for what FSDP does not support: samples and metrics in training, loss terms, averages.

    Processes with unequal numbers of batches of samples would wait for each other for ever.
    """
    intervals = {
        "logging.sample_every": config.logging.sample_every,
        "evaluation.every": config.evaluation.every,
    }
    for key, every in intervals.items():
        if every:
            raise UserError(
                f"{key}: {every} needs the whole model on every GPU; "
                "use 0 with FSDP, and sample the checkpoints"
            )
    if config.training.terms:
        raise UserError("training.terms: are not supported with FSDP; use {}, or leave --use_fsdp out")
    if config.training.averages:
        raise UserError("training.averages: need the whole model on every GPU; use {} with FSDP")
    stds = config.training.posthoc_ema_stds
    if stds:
        raise UserError(
            f"training.posthoc_ema_stds: {stds} needs the whole model on every GPU; use [] with FSDP"
        )


def check_precision(accelerator: Accelerator, config: Config) -> None:
    """Raise a UserError for float16, and for an attention kernel that does not work in this precision."""
    if accelerator.mixed_precision == "fp16":
        raise UserError(
            "--mixed_precision fp16: is not supported, because checkpoints do not store its loss scale; "
            "use bf16"
        )
    is_bf16 = accelerator.mixed_precision == "bf16"
    problem = bfloat16_problem(accelerator.device) if is_bf16 else None
    if problem:
        raise UserError(f"training.precision bf16: {problem}; use fp32")
    problem = kernel_problem(config.model.attention, accelerator.device, is_bf16, config.head_size)
    if problem:
        raise UserError(f"model.attention: {problem}")


# ---------------------------------------------------------------------------------------- after they have met


def make_run_folder(config: Config, accelerator: Accelerator) -> Path:
    """Make the folder `results_dir/NNN-name`, one above the highest number there. Collective."""

    def make() -> Path:
        results = Path(config.logging.results_dir)
        name = config.model.name.replace("/", "-")
        while True:
            # Find the highest number
            numbers = [-1]
            for path in results.glob("*"):
                if found := re.match(r"(\d{3,})-", path.name):
                    numbers.append(int(found[1]))
            folder = results / f"{max(numbers) + 1:03d}-{name}"
            # Another run may take the number first
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder

    return group.on_first(make)


def check_same_start(
    accelerator: Accelerator,
    config: Config,
    store: Features,
    step: int,
    models: list[torch.nn.Module],
) -> None:
    """Raise a UserError unless all processes start alike. Collective.

    Of the features only the hashes in the manifest are compared (file names and labels in the official
    layout), not the bytes on the disk of each machine, which `python -m data.features --verify` reads.
    """
    content = json.dumps(to_dict(config)).encode()
    facts = {
        "configuration": hashlib.sha256(content).hexdigest(),
        "features": store.fingerprint(),
        "step": step,
        "weights": [hash_weights(model) for model in models],
    }
    check_agreement(accelerator, facts)


def total_peak_flops(accelerator: Accelerator) -> float | None:
    """Peak FLOP/s of all devices together; known for half precision on common GPUs."""
    if accelerator.device.type != "cuda" or accelerator.mixed_precision != "bf16":
        return None
    peak = flops.peak_flops(torch.cuda.get_device_name(accelerator.device))
    return None if peak is None else peak * accelerator.num_processes
