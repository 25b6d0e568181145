"""A web page on which one checkpoint serves any budget: class, seed, guidance and a budget slider.

    python demo.py --ckpt quickstart/run/checkpoints/0001400.pt

shows the sample, its boundary probabilities and its cost, beside the same sample with nothing dropped. Needs
`pip install gradio`.
"""

import argparse
import functools
from types import ModuleType
from typing import Any

import cli
from config import UserError
from data.names import markdown, short_name
from diffusion import OBJECTIVES
from figures.side_by_side import PIXELS, side_by_side
from models import describe
from processes import group
from sampling.arguments import add_run_arguments, load_trained_from
from sampling.classes import shown_name
from sampling.load import TrainedModel
from sampling.options import SamplingOptions, possible_scale

# Right end of the slider
LARGEST_FRACTION = 0.95


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_config_arguments(parser)
    add_run_arguments(parser)
    parser.add_argument("--num-sampling-steps", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument(
        "--sampler", help="ddpm, ddim, dpm++; of a flow euler, heun, sde (default: ddim; euler)"
    )
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    gradio = import_gradio()
    trained = load_trained_from(args, group.default_device())
    if trained.config.is_static:
        reason = "is a static DiT, which has no budget to show"
        raise UserError(f"--ckpt '{args.ckpt}': {reason}; draw its samples with sample.py")
    conditions = ", ".join(trained.config.data.conditions)
    if conditions:
        raise UserError(
            f"--ckpt '{args.ckpt}': is told {conditions}, for which the page has no field; draw its samples with "
            "sample.py"
        )
    sampler = args.sampler or OBJECTIVES[trained.config.diffusion.objective].fast
    scale = possible_scale(1.0, trained.config)
    SamplingOptions(scale, num_sampling_steps=args.num_sampling_steps, sampler=sampler).check(trained.config)
    if args.dry_run:
        print(describe(trained.config))
        return
    page = build_page(gradio, trained, args.num_sampling_steps, sampler)
    page.launch(server_name="127.0.0.1", server_port=args.port)


def build_page(gradio: ModuleType, trained: TrainedModel, steps: int, sampler: str) -> Any:
    """The Gradio page: a row of inputs, a row of pictures, a row of costs."""
    config = trained.config
    draw_pair = side_by_side(trained, steps, sampler)

    def update(label: int, seed: float | None, guidance: float | None, dropped: float | None) -> Any:
        # A field is empty while its number is being typed
        if seed is None or guidance is None or dropped is None:
            return gradio.skip()
        try:
            return draw_pair(label, int(seed), guidance, dropped)
        except (UserError, FloatingPointError) as error:
            raise gradio.Error(str(error), print_exception=False) from None

    classes = []
    for label in range(config.data.num_classes):
        classes.append((shown_name(label, trained.class_names), label))
    # A model without a null label can do scale 1 only, and one without classes scale 0
    scale = possible_scale(2.0, config)
    guided = scale > 1
    budget = "share of the kept tokens to drop"
    picture = functools.partial(gradio.Image, interactive=False, format="png", width=PIXELS)

    with gradio.Blocks(title=short_name(config.model.name)) as page:
        gradio.Markdown(
            f"## {markdown(config.model.name)}: one checkpoint, any budget\n"
            f"{steps} steps of {sampler}, step {trained.step} of training"
        )
        with gradio.Row():
            inputs = [
                gradio.Dropdown(classes, value=0, label="class", interactive=scale > 0, elem_id="label"),
                gradio.Number(0, label="seed", precision=0, minimum=0, elem_id="seed"),
                gradio.Slider(
                    min(scale, 1),
                    8,
                    scale,
                    step=0.5,
                    label="guidance",
                    interactive=guided,
                    elem_id="guidance",
                ),
                gradio.Slider(0, LARGEST_FRACTION, 0.5, step=0.05, label=budget, elem_id="dropped"),
            ]
        # One output for each field of figures.side_by_side.Pair
        with gradio.Row():
            outputs = [
                picture(label="at the budget", elem_id="image"),
                picture(label="boundary probability, last step", elem_id="boundaries"),
                picture(label="nothing dropped", elem_id="full_image"),
            ]
        with gradio.Row():
            outputs.append(gradio.Textbox(label="cost", elem_id="cost"))
            outputs.append(gradio.Textbox(label="cost, nothing dropped", elem_id="full_cost"))
        changes = [each.change for each in inputs]
        gradio.on([page.load, *changes], update, inputs, outputs, trigger_mode="always_last")
    return page


def import_gradio() -> ModuleType:
    """Gradio, which only this script needs."""
    try:
        import gradio
    except ImportError:
        raise UserError("gradio is not installed; run `pip install gradio`") from None
    return gradio


if __name__ == "__main__":
    cli.run(main)
