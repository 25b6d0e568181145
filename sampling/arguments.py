"""The sampling options, the same on every script that samples."""

import argparse
import dataclasses
from typing import cast

import torch

import cli
from config import Config, UserError, config_from_dict, load_config
from diffusion import OBJECTIVES
from models import compile_parts
from models.dc_dit import DCDiT
from models.dit import DiT
from models.ops.precision import has_bfloat16
from processes import group
from sampling.budgets import ALL, Budget
from sampling.classes import ambiguity, choose_labels, class_table
from sampling.conditions import read_conditions
from sampling.cuda_graph import GraphedDenoiser
from sampling.generate import check_labels
from sampling.load import TrainedModel, load_trained
from sampling.options import REASONS, SamplingOptions, possible_scale
from weights.checkpoint import forget_unknown_keys, load_checkpoint


def add_run_arguments(parser: cli.Parser) -> None:
    """Which model: --ckpt and --vae; and how to compute it: --compile and --tf32."""
    parser.add_argument("--ckpt", help="checkpoint that train.py wrote (default: `ckpt` of --config)")
    parser.add_argument(
        "--vae", help="ema, mse or a local diffusers folder (default: the one that the checkpoint names)"
    )
    add_weights_argument(parser)
    parser.add_argument(
        "--compile", action="store_true", help="compile transformer blocks, encoder and decoder first"
    )
    cli.add_tf32_argument(parser)


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    """Which of the weights in a checkpoint."""
    parser.add_argument(
        "--weights",
        default="ema",
        help="ema, the moving average; model, the trained weights; or a name of training.averages "
        "(default: %(default)s)",
    )


def add_sampling_arguments(parser: cli.Parser, cfg_scale: float, seed: int) -> None:
    """The options of every script that samples; the two defaults are those of the official scripts."""
    add_run_arguments(parser)
    parser.add_argument(
        "--cfg-scale",
        type=float,
        help=f"guidance scale; 1: none; 0: samples without a class (default: {cfg_scale})",
    )
    parser.set_defaults(default_cfg_scale=cfg_scale)
    parser.add_argument(
        "--num-sampling-steps", type=int, default=250, help="steps of the sampler (default: %(default)s)"
    )
    parser.add_argument(
        "--sampler", help="ddpm, ddim, dpm++; of a flow euler, heun, sde (default: ddpm; euler)"
    )
    parser.add_argument("--seed", type=int, default=seed, help="(default: %(default)s)")
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        help="guide at LO <= t <= HI only (default: always)",
    )
    add_condition_argument(parser)
    add_budget_arguments(parser)
    add_lite_cfg_arguments(parser)
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of the network (default: auto, which is bf16 on CUDA and fp32 elsewhere)",
    )
    parser.add_argument(
        "--vae-precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the autoencoder that decodes (default: %(default)s)",
    )


def add_budget_arguments(parser: cli.Parser) -> None:
    """At most one budget, for both branches of guidance or, with --lite-cfg, for the conditional one."""
    parser.add_argument(
        "--tail-dropping-fraction", type=float, metavar="F", help="budget: share of the kept tokens to drop"
    )
    parser.add_argument(
        "--token-budget", type=int, metavar="K", help="budget: keep the K most probable tokens per image"
    )
    parser.add_argument(
        "--tflops-per-image",
        type=float,
        metavar="X",
        help="budget: drop the smallest share that makes an image cost at most X",
    )
    parser.add_argument(
        "--budget-schedule",
        metavar="T:F,...",
        help="budget: fraction to drop at each t, linear between the points, e.g. 1000:0.6,300:0.2,0:0",
    )


def add_lite_cfg_arguments(parser: cli.Parser) -> None:
    """At most one budget for the unconditional branch, which without one keeps what the router keeps."""
    parser.add_argument(
        "--lite-cfg", action="store_true", help="give the unconditional branch of guidance its own budget"
    )
    parser.add_argument(
        "--uncond-tail-dropping-fraction",
        type=float,
        metavar="F",
        help="with --lite-cfg: share to drop there",
    )
    parser.add_argument(
        "--uncond-token-budget", type=int, metavar="K", help="with --lite-cfg: tokens to keep there"
    )
    parser.add_argument(
        "--uncond-tflops-per-image",
        type=float,
        metavar="X",
        help="with --lite-cfg: limit for its share of the cost",
    )
    parser.add_argument(
        "--uncond-budget-schedule", metavar="T:F,...", help="with --lite-cfg: share to drop there at each t"
    )


def add_condition_argument(parser: argparse.ArgumentParser) -> None:
    """Add --condition: values that samples have beside their class."""
    parser.add_argument(
        "--condition",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="value of a condition that the model was trained with beside the class: a number, or a .npy file of "
        "one value or with a row per sample; repeatable (default: none)",
    )


def add_cuda_graph_argument(parser: argparse.ArgumentParser) -> None:
    """For scripts that evaluate the network often with the same budget."""
    parser.add_argument(
        "--cuda-graph",
        action="store_true",
        default=None,
        help="launch each evaluation as one CUDA graph; the default on CUDA with --token-budget or a static DiT",
    )
    parser.add_argument(
        "--no-cuda-graph", dest="cuda_graph", action="store_false", help="launch each kernel by itself"
    )


def sampling_options(args: argparse.Namespace, device: torch.device) -> SamplingOptions:
    """The options that the command line gives; UserError for budgets that contradict each other.

    `fit_to_model` adds what only a model can read.
    """
    budget = one_budget(
        args.tail_dropping_fraction, args.token_budget, args.tflops_per_image, args.budget_schedule
    )
    uncond = one_budget(
        args.uncond_tail_dropping_fraction,
        args.uncond_token_budget,
        args.uncond_tflops_per_image,
        args.uncond_budget_schedule,
        unconditional=True,
    )
    # A fraction of 0, which the official scripts have for a default, asks for nothing
    asks_for_nothing = uncond == ALL or uncond == Budget.fraction(0.0)
    if not args.lite_cfg and not asks_for_nothing:
        raise UserError(f"{uncond.option(unconditional=True)} {uncond.value}: needs --lite-cfg")
    bf16 = args.precision == "bf16"
    if args.precision == "auto":
        bf16 = has_bfloat16(device)
    interval = args.guidance_interval
    return SamplingOptions(
        cfg_scale=args.default_cfg_scale if args.cfg_scale is None else args.cfg_scale,
        guidance_interval=tuple(interval) if interval else None,
        num_sampling_steps=args.num_sampling_steps,
        sampler=args.sampler,
        seed=args.seed,
        bf16=bf16,
        bf16_vae=args.vae_precision == "bf16",
        budget=budget,
        uncond=uncond if args.lite_cfg else None,
    )


def one_budget(
    fraction: float | None,
    tokens: int | None,
    tflops: float | None,
    schedule: str | None,
    unconditional: bool = False,
) -> Budget:
    """The budget among four options, ALL if none is given; UserError for two."""
    given = []
    if fraction is not None:
        given.append(Budget.fraction(fraction))
    if tokens is not None:
        given.append(Budget.tokens(tokens))
    if tflops is not None:
        given.append(Budget.tflops(tflops))
    if schedule is not None:
        given.append(Budget.schedule(schedule))
    if len(given) > 1:
        options = " and ".join(budget.option(unconditional) for budget in given)
        raise UserError(f"{options}: are two budgets for the same tokens; give one")
    return given[0] if given else ALL


def add_class_arguments(parser: argparse.ArgumentParser, one_per_class: str) -> None:
    """Which classes: by name or by label. `one_per_class` says what is drawn, and for which by default."""
    parser.add_argument(
        "--classes",
        action="extend",
        nargs="+",
        metavar="CLASS",
        help=f"names or labels, also joined by commas; {one_per_class}",
    )
    parser.add_argument(
        "--list-classes", action="store_true", help="print label and name of every class and stop"
    )


def print_classes(args: argparse.Namespace) -> None:
    """What --list-classes prints. The checkpoint alone is read."""
    config = load_config(args.config, args.set) if args.config else None
    ckpt = chosen_checkpoint(args, config)
    state = load_checkpoint(ckpt)
    forget_unknown_keys(state, f"--ckpt '{ckpt}'")
    num_classes = config_from_dict(state["config"]).data.num_classes
    print(class_table(num_classes, state["class_names"]))


def chosen_labels(
    args: argparse.Namespace, trained: TrainedModel, options: SamplingOptions, default: list[int]
) -> list[int]:
    """The labels of --classes, or the default. Raises UserError for a class that the model does not know."""
    labels = default
    if args.classes and not options.cfg_scale:
        print(
            "--classes: give only the number of images at --cfg-scale 0, which draws samples without a class"
        )
    if args.classes:
        labels = choose_labels(args.classes, trained.class_names)
        note = ambiguity(args.classes, trained.class_names)
        if note:
            print(note)
    check_labels(labels, trained.config)
    return labels


def describe_labels(labels: list[int], options: SamplingOptions) -> str:
    """How many samples there are, and of which classes."""
    return f"{len(labels)} of classes {labels}" if options.cfg_scale else f"{len(labels)} without a class"


def chosen_checkpoint(args: argparse.Namespace, config: Config | None) -> str:
    """The checkpoint that --ckpt names, or else the configuration."""
    ckpt = args.ckpt
    if ckpt is None and config is not None:
        ckpt = config.ckpt
    if not ckpt:
        raise UserError(
            "--ckpt is missing; give a checkpoint of train.py, e.g. results/000-DC-DiT/checkpoints/0400000.pt"
        )
    return ckpt


def load_trained_from(args: argparse.Namespace, device: torch.device) -> TrainedModel:
    """The model that --ckpt, --config, --set and --vae describe, compiled where --compile asks for it."""
    config = load_config(args.config, args.set) if args.config else None
    ckpt = chosen_checkpoint(args, config)
    trained = load_trained(ckpt, device, args.vae, config, args.set, args.weights)
    if args.compile:
        compile_parts(cast(DCDiT | DiT, trained.model))
    return trained


def read_arguments(args: argparse.Namespace, device: torch.device) -> tuple[SamplingOptions, TrainedModel]:
    """The checked options and the model of a script with all the options of this file."""
    options = sampling_options(args, device)
    trained = load_trained_from(args, device)
    options = fit_to_model(options, args, trained.config)
    if options.uncond == ALL and options.budget == ALL:
        group.print_once(
            "--lite-cfg: without a budget it is plain guidance, whose branches keep the same tokens"
        )
    options.check(trained.config)
    use_graphs = args.cuda_graph
    if use_graphs is None and graph_problem(trained, options) is None and not args.compile:
        group.print_once(
            "evaluations run as CUDA graphs, because their shapes are fixed; --no-cuda-graph: not"
        )
        use_graphs = True
    if use_graphs:
        trained = with_cuda_graphs(trained, options)
    return options, trained


def fit_to_model(options: SamplingOptions, args: argparse.Namespace, config: Config) -> SamplingOptions:
    """Choose the sampler and a scale that the model can do if none was given, and leave out what has no effect.

    The conditions are read as the model's kinds say. Each change of scale or budget prints a line.
    """
    conditions = read_conditions(args.condition, config)
    options = dataclasses.replace(options, conditions=conditions or None)
    if options.sampler is None:
        options = dataclasses.replace(options, sampler=OBJECTIVES[config.diffusion.objective].default)
    scale = options.cfg_scale
    possible = possible_scale(scale, config)
    if args.cfg_scale is None and possible != scale:
        scale = possible
        group.print_once(f"--cfg-scale {scale:g}: is used, because the model was trained {REASONS[scale]}")
        options = dataclasses.replace(options, cfg_scale=scale)
    if options.uncond is not None and not options.has_guidance:
        group.print_once(
            f"--lite-cfg: has no effect at --cfg-scale {scale:g}, where there is one branch only"
        )
        options = dataclasses.replace(options, uncond=None)
    return options


def with_cuda_graphs(trained: TrainedModel, options: SamplingOptions) -> TrainedModel:
    """The model with its evaluations as CUDA graphs; UserError where there can be none."""
    problem = graph_problem(trained, options)
    if problem:
        raise UserError(f"--cuda-graph: {problem}")
    return trained._replace(model=GraphedDenoiser(trained.model))


def graph_problem(trained: TrainedModel, options: SamplingOptions) -> str | None:
    """Why there can be no CUDA graphs; None if there can."""
    if options.budget.token_count is None and not trained.config.is_static:
        return "needs a number of tokens that is known in advance; add --token-budget"
    device = trained.device.type
    if device != "cuda":
        return f"needs a CUDA device, and the model is on {device}; leave it out"
    return None
