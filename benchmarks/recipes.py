"""Writes the tables of docs/recipes.md: what every configuration of the paper would cost.

    python -m benchmarks.recipes

No GPU is needed: times follow from the model of benchmarks/roofline.py. It takes about a minute on one core.
"""

from pathlib import Path
from statistics import mean

import torch

import cli
from benchmarks.report import Row, table
from benchmarks.roofline import count_memory, count_sampling, count_training
from benchmarks.workload import CONFIGS, Case
from config import Config
from data.files import write_text
from models import architecture, build_model, flops

# The paper's training: steps of 256 images, on the GPUs of the commands
STEPS = 400_000
GPUS = 8

# The paper's evaluation
SAMPLES = 50_000
SAMPLING_STEPS = 250
SAMPLING_BATCH = 32

# FID-50K without guidance, read off the paper's figure of FID against FLOPs;
# of L and XL from Table 4 of DiT (arXiv 2212.09748)
PAPER_FID = {
    "DCDiT-S-N4": 56.8,
    "DCDiT-B-N4": 31.6,
    "DiT-S-2": 68.4,
    "DiT-B-2": 43.5,
    "DiT-L-2": 23.3,
    "DiT-XL-2": 19.5,
}

# The tables are the end of the page; what stands above them is written by hand
PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
BEGIN = "<!-- The tables below are written by python -m benchmarks.recipes -->\n"


def main(argv: list[str] | None = None) -> None:
    cli.Parser(__doc__).parse_args(argv)
    above, _, _ = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    parts = []
    for title, names in groups().items():
        rows = table([recipe(name) for name in names])
        parts.append(f"\n### {title}\n\n{rows}\n")
    write_text(PAGE, above + BEGIN + "".join(parts))
    print(f"written to {PAGE}")


def groups() -> dict[str, list[str]]:
    """Title -> names of configurations, small models first."""
    names = sorted((file.stem for file in CONFIGS.glob("*DiT-*.yaml")), key=size_and_tokens)
    large = [name for name in names if name.endswith("-512")]
    dynamic = [name for name in names if name.startswith("DCDiT") and name not in large]
    static = [name for name in names if name.startswith("DiT")]
    return {"DC-DiT, 256 pixels": dynamic, "DC-DiT, 512 pixels": large, "Static DiT, 256 pixels": static}


def size_and_tokens(name: str) -> tuple[int, int]:
    """Orders names by the size of the network, then by N or P."""
    _, size, tokens, *_ = name.split("-")
    return ["S", "B", "L", "XL"].index(size), int(tokens.removeprefix("N"))


def recipe(name: str) -> Row:
    """One row."""
    case = Case(name, 256 // GPUS)
    config = case.config()
    network = architecture(config)
    kept = network.tokens if network.is_static else network.tokens / config.training.downsample_factor
    evaluation = flops.total_flops(network, flops.TokenCounts(kept, kept**2))

    # Samples in batches of their own
    guided = count_sampling(Case(name, SAMPLING_BATCH), 0.0)
    sampling_seconds = SAMPLES / SAMPLING_BATCH * SAMPLING_STEPS * guided.seconds
    fid = PAPER_FID.get(name)
    return {
        "configuration": f"`{name}`",
        "M parameters": parameters(config) / 1e6,
        "tokens, kept / all": f"{kept:.0f} / {network.tokens}",
        "GFLOP": evaluation / 1e9,
        "memory, GB per GPU, estimated": count_memory(case) / 1e9,
        "training, GPU-hours, at least": training_hours(case),
        "sampling, GPU-hours, at least": sampling_seconds / 3600,
        "paper's FID": "" if fid is None else str(fid),
    }


def parameters(config: Config) -> int:
    """Trained parameters of the network."""
    with torch.device("meta"):
        model = build_model(config)
    return sum(parameter.numel() for parameter in model.parameters())


def training_hours(case: Case) -> float:
    """GPU-hours of the paper's steps."""
    config = case.config()
    training = config.training
    tf32 = config.allows_tf32(bf16=True)
    undropped = count_training(case, tf32)
    seconds = STEPS * undropped.seconds
    if training.multi_budget_training:
        # The first steps drop nothing
        start = training.multi_budget_start_step or 0
        fractions = training.multi_budget_drop_fractions
        assert isinstance(fractions, list)
        dropped = count_training(case, tf32, mean(fractions))
        seconds = start * undropped.seconds + (STEPS - start) * dropped.seconds
    return GPUS * seconds / 3600


if __name__ == "__main__":
    cli.run(main)
