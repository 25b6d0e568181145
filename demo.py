"""A web page on which one checkpoint serves any budget: class, seed, guidance, and sliders for the budgets.

    python demo.py
    python demo.py --ckpt quickstart/run/checkpoints/0000800.pt

The page shows a sample beside the same sample with nothing dropped, what each of them costs, and which tokens are
kept at any timestep. Without a checkpoint it shows `assets/shapes`. Needs `pip install gradio`.
"""

import argparse
import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import cli
from config import Config, UserError
from data.names import markdown, short_name
from diffusion import OBJECTIVES
from figures.side_by_side import PIXELS, Choice, ChunkMap, Drawn, SideBySide, View
from models import describe
from processes import group
from sampling.arguments import add_condition_argument, add_run_arguments, load_trained_from
from sampling.classes import shown_name
from sampling.conditions import read_conditions
from sampling.hub import shipped_models
from sampling.options import SamplingOptions, possible_scale

# Right end of the sliders of shares
LARGEST_FRACTION = 0.95


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_config_arguments(parser)
    add_run_arguments(parser)
    parser.add_argument("--num-sampling-steps", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument(
        "--sampler", help="ddpm, ddim, dpm++; of a flow euler, heun, sde (default: ddim; euler)"
    )
    add_condition_argument(parser)
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.ckpt is None and args.config is None:
        args.ckpt = str(default_model())
    return args


def default_model() -> str:
    """A model that comes with the repository, `shapes` if it is there; UserError if there is none."""
    models = sorted(shipped_models(), key=lambda folder: folder.name != "shapes")
    if not models:
        raise UserError(
            "--ckpt is missing, and assets/ holds no model; run `bash scripts/quickstart.sh`, then give "
            "quickstart/run/checkpoints/0000800.pt"
        )
    first, *others = models
    print(f"--ckpt {first}" + "".join(f"; or {other}" for other in others))
    return str(first)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    gradio = import_gradio()
    trained = load_trained_from(args, group.default_device())
    if trained.config.is_static:
        reason = "is a static DiT, which has no budget to show"
        raise UserError(f"--ckpt '{args.ckpt}': {reason}; draw its samples with sample.py")
    conditions = read_conditions(args.condition, trained.config) or None
    sampler = args.sampler or OBJECTIVES[trained.config.diffusion.objective].fast
    scale = possible_scale(1.0, trained.config)
    steps = args.num_sampling_steps
    options = SamplingOptions(scale, num_sampling_steps=steps, sampler=sampler, conditions=conditions)
    options.check(trained.config)
    if args.dry_run:
        print(describe(trained.config))
        return
    drawing = SideBySide(trained, steps, sampler, conditions)
    page = build_page(gradio, drawing, args.condition)
    try:
        page.launch(server_name="127.0.0.1", server_port=args.port)
    except OSError as error:
        # Gradio's own; the system's have a number
        if error.errno is not None:
            raise
        raise UserError(f"--port {args.port}: is in use; give another, or leave it out") from None


# ------------------------------------------------------------------------------------------------------- page


def build_page(gradio: ModuleType, drawing: SideBySide, told: list[str]) -> Any:
    """The Gradio page: inputs, the progress, two samples with their costs, and the chunk map at a timestep.

    Args:
        told: the conditions of all samples, as the command line has them.
    """
    trained = drawing.trained
    config = trained.config
    labels = class_choices(config.data.num_classes, trained.class_names)
    calls = PageCalls(gradio, drawing, labels)

    picture = functools.partial(gradio.Image, interactive=False, format="png", width=PIXELS)
    title = f"## {markdown(config.model.name)}: one checkpoint, any budget"
    facts = [f"{drawing.steps} steps of {drawing.sampler}", f"step {trained.step} of training"]
    facts += [markdown(word) for word in told]
    last_t = config.diffusion.diffusion_steps - 1

    with gradio.Blocks(title=short_name(config.model.name)) as page:
        gradio.Markdown(f"{title}\n{', '.join(facts)}")
        with gradio.Row():
            inputs = build_inputs(gradio, config, list(labels))
        progress = gradio.HTML(label="progress", elem_id="progress")
        # One output for each picture and text of `PageCalls.outputs`
        with gradio.Row():
            samples = [
                picture(label="at the budget", elem_id="image"),
                picture(label="nothing dropped", elem_id="full_image"),
            ]
        with gradio.Row():
            costs = [
                gradio.Textbox(label="cost", elem_id="cost"),
                gradio.Textbox(label="cost, nothing dropped", elem_id="full_cost"),
            ]
        timestep = gradio.Slider(
            0, last_t, 0, step=1, label="t: from noise (right) to image (left)", elem_id="timestep"
        )
        with gradio.Row():
            chunk_map = [
                picture(label="boundary probability at t", elem_id="probability"),
                picture(label="kept tokens at t", elem_id="kept"),
                gradio.Textbox(label="at t", elem_id="at_t"),
            ]

        # One sample is drawn at a time; what a user changes meanwhile comes next
        together = {"trigger_mode": "always_last", "concurrency_id": "model", "show_progress": "hidden"}
        changes = [page.load, *(each.change for each in inputs)]
        outputs = [*samples, *costs, *chunk_map, progress]
        gradio.on(changes, calls.sample, [*inputs, timestep], outputs, api_name="sample", **together)
        moved = [timestep.change]
        gradio.on(moved, calls.chunk_map, [*inputs, timestep], chunk_map, api_name="chunk_map", **together)
    return page


def build_inputs(gradio: ModuleType, config: Config, classes: list[str]) -> list[Any]:
    """Class, seed, guidance, and the share of tokens to drop in each branch of guidance."""
    # A model without a null label can do scale 1 only, and one without classes scale 0
    scale = possible_scale(2.0, config)
    has_guidance = scale > 1
    share = functools.partial(gradio.Slider, 0, LARGEST_FRACTION, step=0.05)
    return [
        gradio.Dropdown(classes, label="class", interactive=scale > 0, elem_id="label"),
        gradio.Number(0, label="seed", precision=0, minimum=0, elem_id="seed"),
        gradio.Slider(
            min(scale, 1),
            8,
            scale,
            step=0.5,
            label="guidance",
            interactive=has_guidance,
            elem_id="guidance",
        ),
        share(value=0.2, label="tokens to drop", elem_id="dropped"),
        share(
            value=0.8 if has_guidance else 0,
            label="without class (Lite-CFG)",
            interactive=has_guidance,
            elem_id="uncond_dropped",
        ),
    ]


class PageCalls:
    """What the page calls; its names and descriptions are those of the page's API."""

    def __init__(self, gradio: ModuleType, drawing: SideBySide, labels: dict[str, int]):
        self.gradio = gradio
        self.drawing = drawing
        self.labels = labels

    def sample(
        self,
        class_name: str,
        seed: int | None,
        guidance: float | None,
        dropped: float | None,
        uncond_dropped: float | None,
        t: float | None,
    ) -> Iterator[list]:
        """A sample at a budget and with nothing dropped, what both cost, and the chunk map at timestep t."""
        choice = self.choice(class_name, seed, guidance, dropped, uncond_dropped)
        if choice is None or t is None:
            return
        with self.errors_on_the_page():
            for view in self.drawing.views(choice, int(t)):
                yield self.outputs(view)

    def chunk_map(
        self,
        class_name: str,
        seed: int | None,
        guidance: float | None,
        dropped: float | None,
        uncond_dropped: float | None,
        t: float | None,
    ) -> list:
        """Boundary probability and kept tokens of a sample at timestep t, both over the sample."""
        choice = self.choice(class_name, seed, guidance, dropped, uncond_dropped)
        if choice is None or t is None:
            return self.unless_none(None, None, None)
        with self.errors_on_the_page():
            return list(self.drawing.chunk_map(choice, int(t)))

    def choice(
        self,
        class_name: str,
        seed: int | None,
        guidance: float | None,
        dropped: float | None,
        uncond_dropped: float | None,
    ) -> Choice | None:
        """What the inputs ask for; None while a number is being typed, because its field is empty then."""
        if seed is None or guidance is None or dropped is None or uncond_dropped is None:
            return None
        # Without guidance there is one branch
        uncond_dropped = uncond_dropped if guidance > 1 else 0.0
        return Choice(self.labels[class_name], int(seed), guidance, dropped, uncond_dropped)

    def outputs(self, view: View) -> list:
        """A value for each output of the page."""
        chunk_map: ChunkMap | tuple[None, None, None] = view.chunk_map or (None, None, None)
        progress = None if view.progress is None else progress_bar(*view.progress)
        return self.unless_none(view.image, view.full_image, view.cost, view.full_cost, *chunk_map, progress)

    def unless_none(self, *values: Any) -> list:
        """The values; None leaves an output as it is."""
        return [self.gradio.skip() if value is None else value for value in values]

    @contextlib.contextmanager
    def errors_on_the_page(self) -> Iterator[None]:
        """Show a mistake as a line on the page."""
        try:
            yield
        except (UserError, FloatingPointError) as error:
            raise self.gradio.Error(str(error), print_exception=False) from None


def class_choices(num_classes: int, names: list[str] | None) -> dict[str, int]:
    """Label of each class by its name, which the page shows and its API takes."""
    shown = [shown_name(label, names) for label in range(num_classes)]
    if len(set(shown)) < num_classes:
        # Names may be the same where they are cut
        shown = [f"{label}: {name}" for label, name in enumerate(shown)]
    return {name: label for label, name in enumerate(shown)}


def progress_bar(place: str, drawn: Drawn) -> str:
    """HTML: how far the drawing of a sample has come."""
    done = len(drawn.steps)
    text = f"step {done} of {drawn.all_steps}, t = {drawn.steps[-1].t}"
    if drawn.is_finished:
        text = "finished"
    return f'<progress max="{drawn.all_steps}" value="{done}"></progress> {place}: {text}'


def import_gradio() -> ModuleType:
    """Gradio, which only this script needs."""
    try:
        import gradio
    except ImportError:
        raise UserError("gradio is not installed; run `pip install gradio`") from None
    return gradio


if __name__ == "__main__":
    cli.run(main)
