"""Options that no program has: every program names what is probably meant."""

import importlib
import sys

import pytest

import cli
from config import UserError

PROGRAMS = [
    "train",
    "sample",
    "sample_ddp",
    "extract_features",
    "evaluate",
    "demo",
    "quickstart",
    "benchmarks.__main__",
    "data.features",
    "figures.cost",
    "figures.elastic_grid",
    "figures.pareto",
    "models.flops",
    "sampling.hub",
    "scripts.upcycling",
    "toy.autoencoder",
    "toy.classifier",
    "toy.openmoji",
    "toy.shapes",
    "weights.convert",
]


class Parsed(Exception):
    """Carries the parser of a program that has read its command line."""


def refusal(program: str, arguments: list[str], monkeypatch) -> str:
    """The line with which a program refuses its arguments."""
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(UserError) as caught:
        importlib.import_module(program).main()
    return str(caught.value)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_mistyped_option_is_recognised(program, monkeypatch):
    """Whether the program can do without it or not, and whatever else is missing."""

    def stop(parser, args=None, namespace=None):
        raise Parsed(parser)

    with monkeypatch.context() as patch:
        patch.setattr(cli.Parser, "parse_args", stop)
        with pytest.raises(Parsed) as caught:
            importlib.import_module(program).main()
    options = [option for option in caught.value.args[0]._option_string_actions if option.startswith("--")]
    assert len(options) > 1  # --help and another
    for option in options:
        typed = option[:-1]
        if typed not in options:
            expected = f"unknown option {typed}; did you mean {option}?"
            assert expected in refusal(program, [typed, "1"], monkeypatch), (program, option)


@pytest.mark.parametrize(
    "program, line, part",
    [
        # Hyphens, underscores and capitals
        ("sample", "--ckp a.pt", "unknown option --ckp; did you mean --ckpt?"),
        ("sampling.hub", "--ckp a.pt --output b", "unknown option --ckp; did you mean --ckpt?"),
        ("sample", "--ckpt a.pt --cfg_scale=2", "unknown option --cfg_scale; did you mean --cfg-scale?"),
        ("sample_ddp", "--CKPT a.pt", "unknown option --CKPT; did you mean --ckpt?"),
        ("sample_ddp", "--num-samples 4", "unknown option --num-samples; did you mean --num-fid-samples?"),
        ("sample", "-ckpt a.pt", "unknown option -ckpt; did you mean --ckpt?"),
        ("sample", "--ckpt a.pt --cfg 2", "unknown option --cfg; did you mean --cfg-scale?"),
        ("sample", "--ckpt a.pt --steps 50", "unknown option --steps; did you mean --num-sampling-steps?"),
        # Keys of the configuration as options
        ("train", "--num_workers 4", "unknown option --num_workers; did you mean --set data.num_workers=4?"),
        ("train", "--image-size 256", "did you mean --set data.image_size=256?"),
        ("train", "--global-seed", "did you mean --set training.seed=...?"),
        ("train", "--lr=1e-4", "did you mean --set training.learning_rate=1e-4?"),
        ("train", "--batch-size 64", "did you mean --set training.global_batch_size=64?"),
        ("train", "--training.seed=1", "did you mean --set training.seed=1?"),
        ("train", "--learning-rates 1", "did you mean --set training.learning_rate=1?"),
        ("train", "--config a.yaml training.seed=1", "did you mean --set training.seed=1?"),
        ("train", "--set training.seed=1 training.epochs=2", "did you mean --set training.epochs=2?"),
        ("train", "--model DiT-XL/2", "unknown option --model; the network comes from --config"),
        # Options of DiT, fast-DiT and diffusers
        ("sample_ddp", "--sample-dir a", "unknown option --sample-dir; did you mean --output-dir?"),
        ("sample_ddp", "--global-seed 1", "did you mean --seed?"),
        ("sample_ddp", "--batch-size 4", "did you mean --per-proc-batch-size?"),
        ("sample_ddp", "--num-samples 4", "did you mean --num-fid-samples?"),
        ("sample", "--guidance-scale 4", "did you mean --cfg-scale?"),
        ("sample", "--checkpoint a.pt", "did you mean --ckpt?"),
        ("extract_features", "--data-dir a", "did you mean --data-path?"),
        ("train", "--allow_tf32", "did you mean --tf32?"),
        ("train", "--ckpt a.pt", "training starts from a checkpoint with --set training.init_from=a.pt"),
        ("train", "--train_batch_size 64", "did you mean --set training.global_batch_size=64?"),
        ("train", "--wandb", "did you mean --set logging.trackers=[wandb]?"),
        ("train", "--gradient_checkpointing", "did you mean --set training.gradient_checkpointing=true?"),
        # A switch, the other way round
        ("sample_ddp", "--no-tf32", "--no-tf32; it is the default, so leave it out (--tf32 is the opposite)"),
        ("sample", "--visualize", "it is the default, so leave it out (--no-visualize is the opposite)"),
        # Options of the launcher
        ("train", "--mixed_precision bf16", "unknown option --mixed_precision; it belongs to the launcher"),
        # Several mistakes, or none that is like an option
        (
            "train",
            "--epochs 5 --image-size 256",
            "--set training.epochs=5?; unknown option --image-size; did you mean --set data.image_size=256?",
        ),
        ("train", "--xyzzy", "unknown option --xyzzy; see --help"),
        ("sample", "--ckpt a.pt stray", "unrecognized arguments: stray; see --help"),
    ],
)
def test_what_is_probably_meant(program, line, part, monkeypatch):
    assert part in refusal(program, line.split(), monkeypatch)


def test_values_are_no_options(monkeypatch):
    """A negative number, a value with spaces, and whatever stands behind `--`."""
    parser = cli.Parser(None)
    parser.add_argument("--scale", type=float)
    parser.add_argument("--text")
    parser.add_argument("path", nargs="?")
    assert parser.parse_args(["--scale", "-1.5"]).scale == -1.5
    assert parser.parse_args(["--text", "-a b"]).text == "-a b"
    assert parser.parse_args(["--", "--strange"]).path == "--strange"
