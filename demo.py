"""A web page on which one checkpoint serves any budget: class, seed, guidance and a budget slider.

    python demo.py --ckpt quickstart/run/checkpoints/0001400.pt

shows the sample, its boundary probabilities and its cost, beside the same sample with nothing dropped. Needs
`pip install gradio`.
"""

import argparse
import functools
from typing import NamedTuple

import numpy as np

import cli
from config import UserError
from diffusion.samplers import SAMPLERS
from figures.chunking import as_map, boundary_overlay
from models import describe
from processes import group
from sampling.accounting import image_tflop
from sampling.arguments import add_run_arguments, load_trained_from
from sampling.budgets import Budget
from sampling.generate import SamplingOptions, TrainedModel, generate

MOST_DROPPED = 0.95  # right end of the slider
PIXELS = 288  # small images are enlarged to at least so many


class Shown(NamedTuple):
    """One sample as the page shows it."""

    image: np.ndarray  # (H, W, 3) uint8
    boundaries: (
        np.ndarray
    )  # (H, W, 3) uint8, the image with the boundary probability of the last step over it
    tflop: float
    kept: float  # share of the tokens, mean over steps of the conditional branch


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_config_arguments(parser)
    add_run_arguments(parser)
    parser.add_argument("--num-sampling-steps", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--sampler", default="ddim", choices=SAMPLERS, help="(default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    return parser.parse_args(argv)


def draw(trained: TrainedModel, label: int, options: SamplingOptions) -> Shown:
    """Sample number 0 of a class."""
    last = []
    (batch,) = generate(
        trained, [0], [label], options, observe=lambda step, routing: last.append(routing.prob[0])
    )
    image = enlarge(batch.images[0].permute(1, 2, 0).numpy())
    tokens = trained.config.tokens
    kept = np.mean([step.conditional.item() for step in batch.kept]) / tokens
    return Shown(
        image,
        boundary_overlay(image, as_map(last[-1])),
        float(image_tflop(trained.config, batch.kept)[0]),
        float(kept),
    )


def enlarge(image: np.ndarray) -> np.ndarray:
    """Repeat pixels until the image is PIXELS wide."""
    factor = max(1, PIXELS // len(image))
    return image.repeat(factor, 0).repeat(factor, 1)


def compare(trained: TrainedModel, steps: int, sampler: str):
    """The page's function: (label, seed, guidance, dropped) -> three pictures and two costs in words."""

    @functools.lru_cache(maxsize=256)  # the right half changes with the budget only
    def sample(label: int, seed: int, guidance: float, dropped: float) -> Shown:
        options = SamplingOptions(guidance, None, steps, sampler, seed, budget=Budget.fraction(dropped))
        return draw(trained, label, options)

    def update(label: int, seed: float | None, guidance: float | None, dropped: float | None):
        if None in (seed, guidance, dropped):  # a field is empty while its number is being typed
            return import_gradio().skip()
        cheap, full = (sample(label, int(seed), guidance, fraction) for fraction in (dropped, 0.0))
        costs = [f"{each.tflop:.4g} TFLOP, {each.kept:.1%} of the tokens kept" for each in (cheap, full)]
        return (
            cheap.image,
            cheap.boundaries,
            full.image,
            f"{costs[0]}: {cheap.tflop / full.tflop:.0%} of the full cost",
            costs[1],
        )

    return update


def build_page(trained: TrainedModel, steps: int, sampler: str):
    """The Gradio page."""
    gradio = import_gradio()
    update = compare(trained, steps, sampler)
    classes = trained.class_names or [str(label) for label in range(trained.config.data.num_classes)]
    guided = trained.config.training.class_dropout_prob > 0
    with gradio.Blocks(title=trained.config.model.name) as page:
        gradio.Markdown(
            f"## {trained.config.model.name}: one checkpoint, any budget\n{steps} steps of {sampler}, step {trained.step} of training"
        )
        with gradio.Row():
            label = gradio.Dropdown(
                [(name, k) for k, name in enumerate(classes)], value=0, label="class", elem_id="label"
            )
            seed = gradio.Number(0, label="seed", precision=0, minimum=0, elem_id="seed")
            guidance = gradio.Slider(
                1, 8, 2 if guided else 1, step=0.5, label="guidance", interactive=guided, elem_id="guidance"
            )
            dropped = gradio.Slider(
                0, MOST_DROPPED, 0.5, step=0.05, label="share of the kept tokens to drop", elem_id="dropped"
            )
        with gradio.Row():
            picture = functools.partial(gradio.Image, interactive=False, format="png", width=PIXELS)
            outputs = [picture(label=name, elem_id=key) for name, key in PICTURES]
        with gradio.Row():
            outputs += [
                gradio.Textbox(label="cost", elem_id="cost"),
                gradio.Textbox(label="cost, nothing dropped", elem_id="full_cost"),
            ]
        inputs = [label, seed, guidance, dropped]
        gradio.on(
            [page.load, *(each.change for each in inputs)],
            update,
            inputs,
            outputs,
            trigger_mode="always_last",
        )
    return page


PICTURES = (
    ("at the budget", "image"),
    ("boundary probability, last step", "boundaries"),
    ("nothing dropped", "full_image"),
)


def import_gradio():
    try:
        import gradio
    except ImportError:
        raise UserError("gradio is not installed; run `pip install gradio`") from None
    return gradio


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    import_gradio()
    trained = load_trained_from(args, group.default_device())
    if trained.config.is_static:
        raise UserError(
            f"--ckpt '{args.ckpt}': is a static DiT, which has no budget to show; draw its samples with sample.py"
        )
    SamplingOptions(num_sampling_steps=args.num_sampling_steps).check(trained.config)
    if args.dry_run:
        print(describe(trained.config))
        return
    page = build_page(trained, args.num_sampling_steps, args.sampler)
    page.launch(server_name="127.0.0.1", server_port=args.port)


if __name__ == "__main__":
    cli.run(main)
