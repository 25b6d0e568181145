"""Autoguidance (Karras et al., arXiv 2406.02507): guidance by a weaker model instead of the
model without its class.

    python -m examples.autoguidance --ckpt results/B-N4/checkpoints/0400000.pt \\
        --guide results/S-N4/checkpoints/0400000.pt --cfg-scale 2 --output results/guided.npz

writes a file of samples for evaluate.py, and prints what they cost. Their noise and classes are those of
sample_ddp.py. The guide may be a static DiT or a DC-DiT, also the model itself with fewer tokens (`--guide-drop`).
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import cli
from config import UserError
from data.autoencoder import is_same_autoencoder
from data.files import write_file
from diffusion import OBJECTIVES
from models import architecture, draws_at_random
from models.flops import TokenCounts, total_flops
from models.types import DenoiserOutput
from processes import group
from sampling.budgets import Budget
from sampling.generate import draw_labels, generate
from sampling.load import TrainedModel, load_trained
from sampling.options import SamplingOptions, possible_scale


class GuidedModel(torch.nn.Module):
    """Computes the unconditional half of a batch by a guide, with the labels of the other half or without labels.

    Guidance joins both branches to one batch, the conditional half first.
    """

    def __init__(self, trained: TrainedModel, guide: TrainedModel, tell_class: bool):
        super().__init__()
        self.model = trained.model
        self.guide = guide.model
        self.tell_class = tell_class
        self.architectures = [architecture(trained.config), architecture(guide.config)]
        self.flops = 0.0  # of both, summed over images and steps

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, **others: Any) -> DenoiserOutput:
        half = len(x) // 2
        conditional, unconditional = slice(half), slice(half, None)
        guide_labels = labels[conditional if self.tell_class else unconditional]
        own = self.model(x[conditional], t[conditional], labels[conditional], **rows_of(others, conditional))
        guiding = self.guide(
            x[unconditional], t[unconditional], guide_labels, **rows_of(others, unconditional)
        )

        for network, output in zip(self.architectures, (own, guiding)):
            kept = output.routing.keep.sum(1).double()
            counts = TokenCounts(kept.mean().item(), kept.square().mean().item())
            self.flops += half * total_flops(network, counts)
        # Only the routing of the model is reported
        prediction = torch.cat([own.prediction, guiding.prediction])
        return DenoiserOutput(prediction, own.routing, own.packing)


def rows_of(values: Any, rows: slice) -> Any:
    """Some rows of a tensor or list, or of all that a dictionary holds."""
    if isinstance(values, dict):
        return {name: rows_of(value, rows) for name, value in values.items()}
    return values[rows]


def load_pair(args: argparse.Namespace) -> tuple[TrainedModel, GuidedModel]:
    """A trained model that is guided by another; UserError if the guide does not fit it."""
    device = group.default_device()
    trained = load_trained(args.ckpt, device)
    guide = load_trained(args.guide, device, option="--guide")
    if what_models_share(trained) != what_models_share(guide) or not is_same_autoencoder(
        trained.autoencoder.describe(), guide.autoencoder.describe()
    ):
        raise UserError(
            f"--guide '{args.guide}': has other classes, another diffusion process, latent size or autoencoder "
            "than --ckpt; give a model that was trained on the same features with the same keys of diffusion"
        )
    for option, config in (("--ckpt", trained.config), ("--guide", guide.config)):
        if possible_scale(2.0, config) != 2.0:
            raise UserError(f"{option}: was trained only with classes, or only without; give another model")
        if draws_at_random(config):
            raise UserError(f"{option}: has a router that draws at random; give a model with another router")
        if args.guide_drop and config.is_static:
            raise UserError(f"--guide-drop: {option} is a static DiT, which drops nothing; leave it out")
    model = GuidedModel(trained, guide, args.tell_class)
    return trained._replace(model=model), model


def what_models_share(trained: TrainedModel) -> tuple:
    """What a model and its guide must have in common, the autoencoder aside."""
    config = trained.config
    return config.process, config.latent_shape, config.data.num_classes, trained.class_names


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    trained, model = load_pair(args)
    options = SamplingOptions(
        cfg_scale=args.cfg_scale,
        num_sampling_steps=args.num_sampling_steps,
        sampler=OBJECTIVES[trained.config.diffusion.objective].fast,
        seed=args.seed,
        bf16=args.bf16,
        uncond=Budget.fraction(args.guide_drop) if args.guide_drop else None,
    )
    options.check(trained.config)
    indices = list(range(args.num_samples))
    labels = draw_labels(args.seed, indices, trained.config.data.num_classes)
    images = []
    with tqdm(total=len(indices), unit="sample") as bar:
        for batch in generate(trained, indices, labels, options, args.batch_size):
            images.append(batch.images.permute(0, 2, 3, 1).numpy())
            bar.update(len(batch.indices))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_file(
        args.output,
        lambda stream: np.savez(stream, arr_0=np.concatenate(images), arr_1=np.array(labels)),
    )
    tflops = model.flops / len(indices) / 1e12
    print(f"{args.output}: {len(indices)} samples, {tflops:.4f} TFLOP per image")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="the model")
    add("--guide", required=True, help="a weaker model, or the same one")
    add("--tell-class", action="store_true", help="tell the guide the class too")
    add("--guide-drop", type=float, default=0.0, help="share of its kept tokens that a DC-DiT drops as guide")
    add("--cfg-scale", type=float, default=2.0, help="guidance scale (default: %(default)s)")
    add("--num-samples", type=int, default=2048, help="(default: %(default)s)")
    add("--num-sampling-steps", type=int, default=20, help="(default: %(default)s)")
    add("--batch-size", type=int, default=64, help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of noise and classes (default: %(default)s)")
    add("--bf16", action="store_true", help="run the networks in bfloat16")
    add("--output", type=Path, default=Path("guided.npz"), help="file of samples (default: %(default)s)")
    cli.add_import_argument(parser)
    args = parser.parse_args(argv)
    cli.check_at_least(args, 1, "num_samples", "batch_size")
    cli.check_output_file("--output", args.output)
    if args.output.exists():
        raise UserError(f"--output '{args.output}': exists; give another file")
    if args.cfg_scale <= 1:
        raise UserError(f"--cfg-scale {args.cfg_scale:g}: 1 is no guidance; give a greater number")
    if not 0 <= args.guide_drop < 1:
        raise UserError(f"--guide-drop {args.guide_drop:g}: must be at least 0 and below 1")
    return args


if __name__ == "__main__":
    cli.run(main)
