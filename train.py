"""Train a DC-DiT on extracted features.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 train.py --config configs/DCDiT-B-N4.yaml
    accelerate launch train.py --config configs/shapes.yaml --output results/shapes

The same command again, with the same --output, goes on from the newest checkpoint there.
"""

import argparse
import contextlib
import os
import re
import secrets
import signal
import sys
from collections import Counter
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    LoggerType,
    broadcast_object_list,
)

import cli
from config import Config, UserError, config_from_dict, differences, flatten, load_config, to_dict, to_yaml
from data.autoencoder import Autoencoder
from data.features import open_features
from data.files import write_file
from evaluation.in_training import Evaluation
from models import architecture, build_model, describe, flops
from models.attention import kernel_problem
from models.ops.precision import allow_tf32
from processes import group
from processes.lock import FolderLock
from processes.sharding import check_sharding, is_sharded
from processes.watch import LONG
from sampling.generate import SamplingOptions, TrainedModel, generate_images
from sampling.pictures import save_grid
from training import launch
from training.trainer import GRIDS, Trainer, total_steps
from weights import upcycle
from weights.checkpoint import list_checkpoints, load_checkpoint

# Keys that may change when a run goes on: they do not touch what was learned so far.
MAY_CHANGE = ("training.epochs", "training.max_steps", "training.compile", "training.profile", "training.resume_from_ckpt",
              "training.init_from", "training.max_skipped_steps", "training.rank_timeout", "data.num_workers",
              "data.feature_path", "data.vae", "logging.", "evaluation.", "ckpt")  # fmt: skip

# Keys that give the network its tensors.
SHAPE = ("model.hnet.", "model.mlp_ratio", "model.patch_size", "training.learn_sigma", "training.class_dropout_prob",
         "data.image_size", "data.num_classes", "data.latent_")  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_config_arguments(parser)
    parser.add_argument(
        "--output", help="folder of the run; if it holds checkpoints, the run goes on (default: a new one)"
    )
    parser.add_argument(
        "--resume", metavar="EXP_DIR", help="go on with the run in this folder, with its own configuration"
    )
    parser.add_argument("--compile", action="store_true", help="the same as --set training.compile=true")
    parser.add_argument(
        "--same_wandb", type=cli.boolean, default=True, help="go on in the same wandb run (default: true)"
    )
    args = parser.parse_args(argv)
    if args.resume and args.output:
        raise UserError(
            f"--resume '{args.resume}' and --output '{args.output}' both name the run's folder; give one"
        )
    if args.resume and not (Path(args.resume) / "config.yaml").is_file():
        raise UserError(
            f"--resume '{args.resume}' is not the folder of a run (it has no config.yaml); start one with --config"
        )
    if not args.config and not args.resume:
        raise UserError("--config is missing; give a file of configs/, or --resume with the folder of a run")
    return args


def main(argv: list[str] | None = None) -> None:
    """Train to the end; where a signal stops the run earlier, exit with its status (143: SIGTERM, 130: SIGINT)."""
    args = parse(argv)
    overrides = [*args.set, *(["training.compile=true"] if args.compile else [])]
    config = load_config(args.config or Path(args.resume) / "config.yaml", overrides)
    if args.dry_run:
        group.print_once(f"{describe(config)}\n{launch.describe_batches(config)}")
        return
    group.follow_launcher()
    unknown = set(config.logging.trackers) - set(LoggerType.list())
    if unknown:
        raise UserError(
            f"logging.trackers: {', '.join(unknown)} is not one of {', '.join(LoggerType.list())}"
        )
    cli.check_output("--output", args.resume or args.output or config.logging.results_dir)
    store = open_checked_features(config)
    folder = Path(args.resume or args.output) if args.resume or args.output else None
    check_parameter_names(config)
    seen = starting_points(folder)
    state, notes = find_state(
        config, folder, store
    )  # before the processes meet: every one of them finds the same mistakes
    accelerator = make_accelerator(config)
    autoencoder = load_autoencoder(config, store, accelerator)
    grids = sample_grids(config, autoencoder, accelerator)
    folder, seen = (folder, seen) if folder else (new_folder(config, accelerator), [])
    accelerator.project_configuration.set_directories(str(folder))
    evaluation = make_evaluation(config, autoencoder, folder, accelerator)
    with FolderLock(folder, "--resume" if args.resume else "--output") as lock:
        group.on_first(lock.acquire)
        if starting_points(folder) != seen:  # the run that was waited for went on meanwhile
            state, notes = find_state(config, folder, store)
        group.on_first(
            lambda: write_file(folder / "config.yaml", lambda stream: stream.write(to_yaml(config).encode()))
        )
        start_trackers(accelerator, config, folder, args.same_wandb)
        cost = flops_function(config), total_peak(accelerator)
        trainer = Trainer(config, accelerator, store, folder, state, *cost, grids, evaluation)
        report_start(trainer, config, store, notes)
        if state is not None and "report" in state:
            report_origin(trainer, config, state["report"])
        finished = trainer.train()
        end = "finished" if finished else f"stopped by {signal.Signals(trainer.stop.number).name}"
        accelerator.end_training()
        trainer.log.line(f"{end} at step {trainer.step} of {trainer.last_step}: {folder}")
    if not finished:
        sys.exit(128 + trainer.stop.number)  # as shells number a process that the signal itself ended


def make_accelerator(config: Config) -> Accelerator:
    """Device, precision and trackers, checked."""
    buffers_are_constant = DistributedDataParallelKwargs(
        broadcast_buffers=False, gradient_as_bucket_view=True
    )
    trackers, device = config.logging.trackers, group.default_device()
    allow_tf32(config.model.hnet.fp32_router_dechunk == "tf32")
    accelerator = Accelerator(
        cpu=device.type == "cpu",  # else Accelerate takes torchrun's processes on a CPU for separate runs
        mixed_precision=mixed_precision(config, device),
        log_with=trackers or None,
        project_dir=config.logging.results_dir,  # until the run's own folder is known
        kwargs_handlers=[buffers_are_constant, InitProcessGroupKwargs(timeout=LONG)],
    )
    announced = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != announced:
        raise UserError(
            f"WORLD_SIZE {announced}: Accelerate found {accelerator.num_processes}; use accelerate launch or torchrun"
        )
    if missing := set(trackers) - {"all"} - {str(tracker) for tracker in accelerator.log_with}:
        raise UserError(
            f"logging.trackers: {', '.join(missing)} is not installed; install it or leave it out"
        )
    check_sharding(accelerator)
    for key, every in (
        ("logging.sample_every", config.logging.sample_every),
        ("evaluation.every", config.evaluation.every),
    ):
        if (
            is_sharded(accelerator) and every
        ):  # processes would draw unequal numbers of batches and wait for each other
            raise UserError(
                f"{key}: {every} needs the whole model on every GPU; use 0 with FSDP, and sample the checkpoints"
            )
    if accelerator.mixed_precision == "fp16":
        raise UserError(
            "--mixed_precision fp16: is not supported, because its loss scale is no part of a checkpoint; use bf16"
        )
    half = accelerator.mixed_precision == "bf16"
    if problem := kernel_problem(config.model.attention, accelerator.device, half, config.head_size):
        raise UserError(f"model.attention: {problem}")
    return accelerator


def mixed_precision(config: Config, device: torch.device) -> str:
    """Accelerate's name of the precision: the configuration's, else the launcher's, else bfloat16 on CUDA."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if config.training.precision != "auto":
        return "bf16" if config.training.precision == "bf16" else "no"
    return "bf16" if launched == "no" and device.type == "cuda" else launched


def open_checked_features(config: Config):
    """The feature store, checked against the configuration."""
    launch.local_batch_size(config)
    data = config.data
    store = open_features(data.feature_path, data.image_size)
    expected = (data.latent_channels, config.latent_size, config.latent_size)
    if tuple(store.latent_shape) != expected:
        raise UserError(
            f"data.feature_path: '{data.feature_path}' holds latents of shape {tuple(store.latent_shape)}, but image_size, "
            f"latent_stride and latent_channels make {expected}; change those keys or extract again"
        )
    if store.labels.max() >= data.num_classes:
        raise UserError(
            f"data.num_classes: {data.num_classes} is too small for label {store.labels.max()} in the features"
        )
    if len(store) < config.training.global_batch_size:
        raise UserError(
            f"training.global_batch_size: {config.training.global_batch_size} is more than the {len(store)} images of "
            f"'{data.feature_path}'; make it smaller"
        )
    if total_steps(config, len(store)) == 0:
        raise UserError(
            "training.epochs: no optimizer step fits into the run; raise it or lower gradient_accumulation_steps"
        )
    return store


def starting_points(folder: Path | None) -> list[Path]:
    """The files that `find_state` chooses from."""
    return [] if folder is None else [*folder.glob("config.yaml"), *list_checkpoints(folder / "checkpoints")]


def find_state(config: Config, folder: Path | None, store) -> tuple[dict | None, list[str]]:
    """The checkpoint to go on from, and what there is to say about it.

    It is the folder's newest that can be read and is of this run, else `training.resume_from_ckpt`, else None.
    """
    if folder is not None and (folder / "config.yaml").is_file():
        saved = load_config(folder / "config.yaml")
        if changed := changes(config, to_dict(saved)):
            raise UserError(
                f"'{folder}' holds a run with other values of {', '.join(changed)}; use another --output"
            )
    notes = []
    for path in reversed(list_checkpoints(folder / "checkpoints") if folder is not None else []):
        try:
            state = load_fitting(config, path, "--output")
            if lacking := [key for key in ("features", "averages", "skipped") if state.get(key) is None]:
                raise UserError(
                    f"--output '{path}' is not a checkpoint of a run (it lacks {', '.join(lacking)})"
                )
            if foreign := changes(config, state["config"]):
                raise UserError(f"--output '{path}' is of a run with other values of {', '.join(foreign)}")
        except UserError as error:
            notes.append(f"warning: {error}")
            continue
        if state["features"] != store.fingerprint():
            raise UserError(
                f"data.feature_path: '{config.data.feature_path}' holds other features than '{folder}' was trained on"
            )
        return state, notes
    if notes:
        raise UserError(f"{notes[0].removeprefix('warning: ')}; '{folder}' has no other to go on from")
    if config.training.resume_from_ckpt:
        state = load_fitting(config, config.training.resume_from_ckpt, "training.resume_from_ckpt")
        return {
            **state,
            "averages": {},
            "skipped": {"total": 0, "in_a_row": 0},
        }, notes  # a new run reports its own steps
    if config.training.init_from:
        return upcycle.initial_state(config), notes
    return None, notes


def changes(config: Config, saved: dict) -> list[str]:
    """Keys that may not change when a run goes on, and did."""
    return [key for key in differences(to_dict(config), saved) if not key.startswith(MAY_CHANGE)]


def check_parameter_names(config: Config) -> None:
    """Every beginning of a name in `training.frozen` and `training.lr_scales` must be one."""
    with torch.device("meta"):
        names = [name for name, _ in build_model(config).named_parameters()]
    for key in ("frozen", "lr_scales"):
        for prefix in getattr(config.training, key):
            if not any(name.startswith(prefix) for name in names):
                first = sorted({name.split(".")[0] for name in names})
                raise UserError(
                    f"training.{key}: no parameter's name begins with '{prefix}'; they begin with {', '.join(first)}"
                )


def load_fitting(config: Config, path: Path | str, option: str) -> dict:
    """A checkpoint whose weights have the names and shapes of the network that the configuration describes."""
    state = load_checkpoint(path, option)
    if "optimizer" not in state:
        raise UserError(
            f"{option} '{path}' holds weights only, with which no run can go on; give it as training.init_from"
        )
    state["config"] = to_dict(
        config_from_dict(state["config"])
    )  # keys that are newer than the checkpoint have their defaults
    scales = state["config"]["training"]["lr_scales"]
    if scales != config.training.lr_scales:
        raise UserError(
            f"training.lr_scales: {config.training.lr_scales} differs from the {scales} of {option} '{path}'"
        )
    with torch.device("meta"):
        model = build_model(config)
    if {name: x.shape for name, x in model.state_dict().items()} != {
        name: x.shape for name, x in state["model"].items()
    }:
        keys = [key for key in differences(to_dict(config), state["config"]) if key.startswith(SHAPE)]
        raise UserError(
            f"{option} '{path}' holds another network than the configuration describes; see {', '.join(keys)}"
        )
    return state


def new_folder(config: Config, accelerator: Accelerator) -> Path:
    """Make `results_dir/NNN-name`, one above the highest number there; the main process decides."""
    results, made = Path(config.logging.results_dir), None
    while made is None and accelerator.is_main_process:
        taken = [int(found[1]) for path in results.glob("*") if (found := re.match(r"(\d{3,})-", path.name))]
        folder = results / f"{max(taken, default=-1) + 1:03d}-{config.model.name.replace('/', '-')}"
        with contextlib.suppress(FileExistsError):  # another run took the number meanwhile
            folder.mkdir(parents=True)
            made = str(folder)
    return Path(broadcast_object_list([made])[0])


def start_trackers(accelerator: Accelerator, config: Config, folder: Path, same_wandb: bool) -> None:
    """Start Accelerate's trackers; the wandb run's id is kept in the folder so that a resumed run goes on in it."""
    if not config.logging.trackers:
        return
    options = {"name": f"{folder.name}-{config.model.name}", "dir": str(folder), "resume": "allow"}
    id_file = folder / "wandb_id.txt"
    known = id_file.read_text().strip() if same_wandb and id_file.is_file() else ""  # empty after a power cut
    options["id"] = known or secrets.token_hex(
        4
    )  # ours from the start: some versions of Accelerate start an offline run twice
    init_kwargs = {"wandb": options} if "wandb" in config.logging.trackers else {}
    if init_kwargs and accelerator.is_main_process:
        write_file(id_file, lambda stream: stream.write(options["id"].encode()))
    try:
        accelerator.init_trackers(
            config.logging.wandb_project, config=flatten(to_dict(config)), init_kwargs=init_kwargs
        )
    except Exception as error:  # each tracker has its own kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"logging.trackers: cannot start ({reason}); set WANDB_MODE=offline or leave wandb out"
        ) from None


def flops_function(config: Config):
    """FLOPs of a forward pass as a function of the kept tokens."""
    return lambda count, squared: flops.total_flops(architecture(config), flops.TokenCounts(count, squared))


def total_peak(accelerator: Accelerator) -> float | None:
    """Peak FLOP/s of all devices; known for half precision on common GPUs."""
    if accelerator.device.type != "cuda" or accelerator.mixed_precision != "bf16":
        return None
    peak = flops.peak_flops(torch.cuda.get_device_name(accelerator.device))
    return peak and peak * accelerator.num_processes


def load_autoencoder(config: Config, store, accelerator: Accelerator) -> Autoencoder | None:
    """The decoder of samples, for runs that draw any: the one that the features name or, where that has moved, data.vae."""
    if not (config.logging.sample_every or config.evaluation.every):
        return None
    known = store.autoencoder
    for name in [known["name"], config.data.vae] if known else [config.data.vae]:
        try:
            autoencoder = Autoencoder.load(name, accelerator.device)
        except UserError as error:
            reason = str(error).removeprefix("--vae ")
            continue
        ours = autoencoder.describe()
        if not known or all(ours[key] == known[key] for key in ("sha256", "shift", "scale")):
            return autoencoder
        reason = (
            f"{name} is another autoencoder than the features were made with; give a copy of {known['name']}"
        )
    raise UserError(f"data.vae: {reason}")


def make_evaluation(
    config: Config, autoencoder: Autoencoder, folder: Path, accelerator: Accelerator
) -> Evaluation | None:
    if not config.evaluation.every:
        return None
    bf16, folder = accelerator.mixed_precision == "bf16", folder / "evaluation"
    return Evaluation(config, autoencoder, bf16, folder, accelerator.process_index, accelerator.num_processes)


def sample_grids(config: Config, autoencoder: Autoencoder | None, accelerator: Accelerator):
    """A function that draws a grid of samples from the EMA with the main process; what it needs is checked at once."""
    options = SamplingOptions(
        cfg_scale=config.logging.sample_cfg_scale,
        num_sampling_steps=min(50, config.diffusion.diffusion_steps),
        sampler="ddim",
        bf16=accelerator.mixed_precision == "bf16",
    )
    if config.logging.sample_every:
        options.check(config)

    def draw(model: torch.nn.Module, step: int) -> None:
        if accelerator.is_main_process:
            trained = TrainedModel(model, config, autoencoder, None, step, fingerprint="")
            labels = [k % config.data.num_classes for k in range(16)]
            file = Path(accelerator.project_dir, GRIDS, f"{step:07d}.png")
            save_grid(generate_images(trained, labels, options), file, columns=8)
        accelerator.wait_for_everyone()

    return draw


def report_origin(trainer: Trainer, config: Config, report: dict[str, str]) -> None:
    """Say where the first weights came from: counts in log.txt, every tensor in init_report.txt."""
    ways = Counter(way.split(":")[0] for way in report.values())
    trainer.log.line(
        f"from {config.training.init_from}: "
        + ", ".join(f"{n} tensors {way}" for way, n in ways.most_common())
    )
    if trainer.accelerator.is_main_process:
        text = "".join(f"{name:<45} {way}\n" for name, way in report.items())
        write_file(trainer.folder / "init_report.txt", lambda stream: stream.write(text.encode()))


def report_start(trainer: Trainer, config: Config, store, notes: list[str]) -> None:
    for note in notes:
        trainer.log.line(f"{note}; going on from the one before")
    parameters = sum(p.numel() for p in trainer.ema.module.parameters())
    start = f"going on from step {trainer.step}" if trainer.step else "from the start"
    trainer.log.line(
        f"{config.model.name}: {parameters:,} parameters, {len(store):,} images, {trainer.last_step:,} steps {start}, "
        f"{trainer.accelerator.num_processes} x {trainer.accelerator.device}, {trainer.accelerator.mixed_precision}"
    )


if __name__ == "__main__":
    cli.run(main)
