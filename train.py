"""Train a DC-DiT on extracted features.

    accelerate launch train.py --config configs/shapes.yaml --output results/shapes
    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 train.py --config configs/DCDiT-B-N4.yaml

The same command again, with the same --output, resumes from the newest checkpoint there.
"""

import argparse
import contextlib
import shlex
import signal
import sys
from pathlib import Path

from accelerate import Accelerator

import cli
from config import Config, UserError, config_from_dict, load_config, to_dict, to_yaml
from data.autoencoder import Autoencoder
from data.features import Features
from data.files import write_text
from data.folders import class_table
from data.names import repeats_numbers
from evaluation.in_training import Evaluation
from models import describe
from processes import group
from processes.group import Processes
from processes.lock import FolderLock
from training import checks, launch, resume, sample_grids
from training.tracking import start_trackers
from training.trainer import Hooks, Trainer
from weights import averages
from weights.checkpoint import refuse_unconverted


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_config_arguments(parser)
    parser.add_argument(
        "--output", help="folder of the run; resumes if it holds checkpoints (default: a new folder)"
    )
    parser.add_argument(
        "--resume", metavar="EXP_DIR", help="resume the run in this folder, with its own configuration"
    )
    cli.add_tf32_argument(parser)
    parser.add_argument("--compile", action="store_true", help="the same as --set training.compile=true")
    parser.add_argument(
        "--same_wandb", type=cli.boolean, default=True, help="continue the same wandb run (default: true)"
    )
    args = parser.parse_args(argv)
    # Refuse contradictions
    if args.resume and args.output:
        raise UserError(
            f"--resume '{args.resume}' and --output '{args.output}' both name the run's folder; give one"
        )
    if args.resume and not resume.starting_files(Path(args.resume)):
        refuse_unconverted(args.resume, "--resume")
        raise UserError(
            f"--resume '{args.resume}' is not the folder of a run (it has no config.yaml); "
            "start one with --config"
        )
    if not args.config and not args.resume:
        raise UserError("--config is missing; give a file of configs/, or --resume with the folder of a run")
    return args


def command_line(args: argparse.Namespace) -> resume.CommandLine:
    """What the parsed arguments say about the run."""
    folder = args.resume or args.output
    return resume.CommandLine(
        option="--resume" if args.resume else "--output",
        folder=Path(folder) if folder else None,
        config_file=Path(args.config) if args.config else Path(args.resume) / "config.yaml",
        overrides=[*args.set, "training.compile=true"] if args.compile else args.set,
        processes=launch.announced_processes(),
    )


def read_config(args: argparse.Namespace, command: resume.CommandLine) -> Config:
    """The configuration from --config, otherwise from the folder of the resumed run, with the overrides."""
    if args.config:
        return load_config(args.config, command.overrides)
    saved = resume.read_run_config(Path(args.resume), "--resume")
    return config_from_dict(to_dict(saved), command.overrides)


def main(argv: list[str] | None = None) -> None:
    """Train to the end. If a signal stops the run, exit with its status (SIGTERM: 143, SIGINT: 130)."""
    # Read the command line and the configuration
    args = parse(argv)
    command = command_line(args)
    config = read_config(args, command)
    if args.dry_run:
        group.print_once(f"{describe(config)}\n{launch.describe_batches(config)}")
        return
    group.follow_launcher()

    # Refuse what cannot work, before anything is written
    launch.check_trackers(config)
    if command.folder is None:
        cli.check_output("logging.results_dir", config.logging.results_dir)
    else:
        cli.check_output(command.option, command.folder)
    checks.check_parameter_names(config)
    averages.read_settings(config)

    # Open the data and choose the checkpoint, before the processes meet: a mistake ends all of them alike
    store = checks.open_fitting_features(config)
    sample_grids.check_grids(config, store)
    files = resume.starting_files(command.folder)
    start = resume.find_start(config, command, store)

    # Meet the other processes
    accelerator = launch.make_accelerator(config, start.state)
    autoencoder = sample_grids.load_decoder(config, store, accelerator.device)
    folder = command.folder or launch.make_run_folder(config, accelerator)
    accelerator.project_configuration.set_directories(str(folder))
    hooks = make_hooks(config, accelerator, autoencoder, store, folder)

    # Take the folder. If another run was there first, it may have left newer files
    with FolderLock(folder, command.option) as lock:
        group.on_first(lock.acquire)
        if resume.starting_files(folder) != files:
            start = resume.find_start(config, command, store)
        # Before one writes, all must have looked
        accelerator.wait_for_everyone()
        config_file = folder / "config.yaml"
        group.on_first(lambda: write_text(config_file, to_yaml(config)))
        group.on_first(lambda: resume.finish_interrupted_save(config, start.state, folder))
        start_trackers(accelerator, config, folder, args.same_wandb)

        # Train
        trainer = Trainer(config, accelerator, store, folder, start.state, hooks)
        log_start(trainer, start)
        was_finished = trainer.step == trainer.last_step
        is_finished = trainer.train()
        accelerator.end_training()
        where = f"at step {trainer.step} of {trainer.last_step}: {folder}"
        if is_finished:
            if accelerator.is_main_process:
                draw_last_losses(folder)
            trainer.log.line(f"{'already finished' if was_finished else 'finished'} {where}")
        else:
            remedy = f"resume by python train.py --resume {shlex.quote(str(folder))}"
            trainer.log.line(f"stopped by {signal.Signals(trainer.stop.number).name} {where}; {remedy}")
    if not is_finished:
        sys.exit(128 + trainer.stop.number)  # the status that shells give to a process ended by the signal


def make_hooks(
    config: Config,
    accelerator: Accelerator,
    autoencoder: Autoencoder | None,
    store: Features,
    folder: Path,
) -> Hooks:
    """The samples and metrics that the run makes from its EMA."""
    if autoencoder is None:
        return Hooks()
    draw_samples = sample_grids.SampleGrids(config, autoencoder, accelerator, store, folder)
    if not config.evaluation.every:
        return Hooks(draw_samples)
    bf16 = accelerator.mixed_precision == "bf16"
    processes = Processes(accelerator.process_index, accelerator.num_processes, accelerator.device)
    evaluate = Evaluation(config, autoencoder, bf16, folder / "evaluation", processes, store)
    return Hooks(draw_samples, evaluate)


def draw_last_losses(folder: Path) -> None:
    """Draw loss and kept share against the timestep, if the run has logged them."""
    from figures import by_timestep  # here, because matplotlib takes a second to import

    # A run that started at its last step has logged nothing
    with contextlib.suppress(UserError):
        by_timestep.draw({folder.name: by_timestep.read_rows(folder)}, folder / "by_timestep.png")


def log_start(trainer: Trainer, start: resume.Start) -> None:
    """Log unusable checkpoints, what is trained, the label of each class, and where the first weights come from."""
    for warning in start.warnings:
        trainer.log.line(f"warning: {warning}; using the checkpoint before it")
    trainer.report_start()
    names = trainer.store.class_names
    if not repeats_numbers(names):
        trainer.log.line(f"classes: {class_table(names)}")
    if start.origins:
        trainer.log.origins(str(trainer.config.training.init_from), start.origins)


if __name__ == "__main__":
    cli.run(main)
