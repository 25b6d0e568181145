"""Names of classes: chosen on command lines, and shown in pictures, pages and terminals whatever they hold."""

import io
import sys
import types

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import cli
import demo
import sample
from config import UserError, config_from_dict, load_config, to_dict
from data.features import open_features
from data.names import markdown, short_name
from figures import cost, elastic_grid, pareto
from figures.side_by_side import Choice, SideBySide
from models import build_model
from sampling import hub
from sampling.accounting import SamplingRecord, Seconds, save_summary, summarise
from sampling.classes import ambiguity, choose_labels, class_table
from sampling.load import load_trained
from sampling.pipeline import DCDiTPipeline
from weights.checkpoint import save_checkpoint

ODD = ["$5_to_$x^{", "caf\udce9 <b>", "new\nline_" + "x" * 200]  # \udce9: a byte that is not UTF-8
NUMBERS = ["1", "10", "2"]


def save(config, folder, names: list[str] | None):
    """Checkpoint of a random model with these class names."""
    weights = build_model(config).state_dict()
    state = {
        "autoencoder": open_features(config.data.feature_path, 32).autoencoder,
        "class_names": names,
        "optimizer": {},
        "step": 1,
        "config": to_dict(config),
        "model": weights,
        "ema": weights,
    }
    return save_checkpoint(folder, state, keep=0)


@pytest.fixture(scope="module")
def odd(tiny_config, tmp_path_factory):
    """Checkpoint whose classes and model have odd names."""
    config = load_config(tiny_config, ["model.name='_DiT $1_<b>'"])
    return save(config, tmp_path_factory.mktemp("odd"), ODD)


@pytest.fixture(scope="module")
def numbered(tiny_config, tmp_path_factory):
    return save(load_config(tiny_config), tmp_path_factory.mktemp("numbered"), NUMBERS)


# ---------------------------------------------------------------------------------------------------- choosing


def test_a_number_is_a_name_first():
    assert choose_labels(["10", "1", "2", "0"], NUMBERS) == [1, 0, 2, 0]
    assert choose_labels([2, 1], NUMBERS) == [2, 1]
    assert choose_labels(["7"], None) == [7]
    with pytest.raises(UserError, match="^--classes: names no class"):
        choose_labels([","], NUMBERS)
    assert "with label 0; label 1 is '10'" in ambiguity(["2", "1"], NUMBERS)
    assert ambiguity(["2", "0", "10"], NUMBERS) == ""


def test_a_name_that_no_class_has():
    with pytest.raises(UserError, match="'rign': no class has this name; did you mean 'ring'?"):
        choose_labels(["rign"], ["disc", "ring"])
    with pytest.raises(UserError, match="has no class names; give labels"):
        choose_labels(["ring"], None)
    with pytest.raises(UserError, match="no class has this name"):
        choose_labels(["1_0"], NUMBERS)


TYPED_BACK = [
    "$x$ {a}",
    "caf\udce9",
    "tench, Tinca tinca",
    "two  words",
    "new\nline",
    "a\tlong\nname " + "y" * 50,
    "c" * 60 + "1",
    "c" * 60 + "2",
    "-dash",
    "猫",
    "0",
    "tench",
]


def test_what_the_table_prints_can_be_typed_back():
    rows = class_table(len(TYPED_BACK), TYPED_BACK).splitlines()
    assert len(rows) == len(TYPED_BACK)
    for label, row in enumerate(rows):
        printed = row.split("  ", 1)[1]
        assert choose_labels([printed], TYPED_BACK) == [label]
    # Cut as in other reports, if only one class can be meant
    assert choose_labels([short_name(TYPED_BACK[5])], TYPED_BACK) == [5]
    with pytest.raises(UserError, match="several classes are called so"):
        choose_labels([short_name(TYPED_BACK[6])], TYPED_BACK)
    # As extraction prints it
    assert choose_labels([r"caf\udce9"], TYPED_BACK) == [1]
    # A list
    assert choose_labels(["tench, 猫,new\\nline,3"], TYPED_BACK) == [11, 9, 4, 3]
    assert "with label 10; label 0 is '$x$ {a}'" in ambiguity(["tench,0"], TYPED_BACK)
    with pytest.raises(UserError, match="--classes 'cat': no class has this name"):
        choose_labels(["tench,cat"], TYPED_BACK)


def test_the_table_of_classes(numbered, odd, tiny_config, tmp_path, capsys):
    sample.main(["--ckpt", str(numbered), "--list-classes"])
    assert capsys.readouterr().out == "0  1\n1  10\n2  2\n"
    elastic_grid.main(["--ckpt", str(odd), "--list-classes"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["0  $5_to_$x^{", r"1  caf\xe9 <b>"] and lines[2] == r"2  new\nline_" + "x" * 200
    sample.main(["--ckpt", str(save(load_config(tiny_config), tmp_path, None)), "--list-classes"])
    assert capsys.readouterr().out == "no class names are known; the labels are 0 to 2\n"


def test_sampling_by_name(numbered, odd, tmp_path, capsys):
    """The pictures of two labels by their names; the note where a name is another class's label."""
    steps = ["--num-sampling-steps", "2", "--no-visualize", "--output"]
    sample.main(
        ["--ckpt", str(odd), "--classes", "new\nline_" + "x" * 200, "1", *steps, str(tmp_path / "name")]
    )
    sample.main(["--ckpt", str(odd), "--classes", "2", "caf\udce9 <b>", *steps, str(tmp_path / "label")])
    pictures = [(tmp_path / folder / "sample.png").read_bytes() for folder in ("name", "label")]
    assert pictures[0] == pictures[1]
    capsys.readouterr()
    sample.main(["--ckpt", str(numbered), "--classes", "1", "--dry-run"])
    printed = capsys.readouterr().out
    assert "1 of classes [0]" in printed and "label 1 is '10'" in printed


def test_the_pipeline_takes_names(odd):
    pipe = DCDiTPipeline.from_pretrained(odd)
    images = []
    for label in (ODD[1], 1):
        generator = torch.Generator().manual_seed(0)
        (image,) = pipe([label], num_inference_steps=2, generator=generator).images
        images.append(np.asarray(image))
    assert np.array_equal(*images)


def test_images_come_before_the_report(odd, tmp_path, monkeypatch):
    """Whatever the report fails on, the pictures are there."""

    def fail(*args):
        raise IndexError

    monkeypatch.setattr(sample, "summarise_run", fail)
    with pytest.raises(IndexError):
        sample.main(["--ckpt", str(odd), "--num-sampling-steps", "1", "--output", str(tmp_path)])
    assert (tmp_path / "sample.png").is_file()


# ----------------------------------------------------------------------------------------------------- showing


def test_a_name_becomes_a_line():
    assert short_name("a\nb\t\udce9\u202e猫") == r"a\nb\t\xe9\u202e猫"
    assert short_name("x" * 99) == "x" * 37 + "..."
    assert markdown("$5_<b> \\ a|b") == r"\$5\_\<b\> \\ a\|b"


def test_elastic_grid(odd, tmp_path):
    argv = ["--ckpt", str(odd), "--num-sampling-steps", "1", "--fractions", "0", "--output"]
    elastic_grid.main([*argv, str(tmp_path / "grid.png")])
    assert np.asarray(Image.open(tmp_path / "grid.png")).std() > 1


def test_pictures_replace_pictures_only(odd, tmp_path):
    """A figure is drawn again; a photograph, a trace that is none, and the folder of many samples are kept."""
    argv = ["--ckpt", str(odd), "--num-sampling-steps", "1", "--classes", "0", "--output"]
    photo, model = tmp_path / "photo.png", tmp_path / "model.svg"
    Image.new("RGB", (8, 8)).save(photo)
    model.write_bytes(b"{weights}")
    before = photo.read_bytes()
    for file in (photo, model):
        with pytest.raises(UserError, match=f"--output '{file}': exists and is no figure"):
            elastic_grid.main([*argv, str(file)])
    with pytest.raises(UserError, match="--profile-trace-path .*: exists and is no trace"):
        sample.main([*argv, str(tmp_path), "--profile-trace-path", str(model)])
    for ending in ("png", "png", "pdf", "pdf", "svg", "svg"):
        elastic_grid.main([*argv, str(tmp_path / f"grid.{ending}"), "--fractions", "0"])
    for _ in range(2):
        sample.main([*argv, str(tmp_path), "--profile-trace-path", str(tmp_path / "trace.json")])
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "other").mkdir()
    for command, line in ((sample, argv), (cost, [str(tmp_path / "summary.json"), "--output"])):
        with pytest.raises(UserError, match="holds the samples of sample_ddp.py; give another folder"):
            command.main([*line, str(tmp_path)])
    assert photo.read_bytes() == before and model.read_bytes() == b"{weights}"


def test_chart_of_classes(tmp_path, monkeypatch):
    """A row for each class, also for long names that are equal where they are cut off."""
    names = [*ODD, "x" * 99 + "a", "x" * 99 + "b"]
    config = config_from_dict({"data": {"image_size": 64, "num_classes": 5}})
    counts = np.random.default_rng(0).integers(2, 65, (5, 3, 2))
    record = SamplingRecord([900, 500, 100], counts, range(5), Seconds(1, 1), 0)
    save_summary(summarise(config, 1e12, names, record), tmp_path / "summary.json")
    figures = []
    write = cost.save_figure
    monkeypatch.setattr(
        cost, "save_figure", lambda figure, path: (figures.append(figure), write(figure, path))
    )
    cost.main([str(tmp_path / "summary.json")])
    (axes,) = figures[-1].axes
    texts = [label.get_text() for label in axes.get_yticklabels()]
    assert len(axes.patches) == len(texts) == 5 and "$5_to_$x^{ (1)" in texts
    assert all("\n" not in text and len(text) < 50 for text in texts)


def test_no_warning_about_a_name_that_the_font_lacks(tmp_path, recwarn):
    """CJK and Devanagari become escapes; what the font has stays."""
    names = ["猫", "été ☃", "😀", "क", "犬" * 30]
    rows = [{"name": name, "images": 1, "share": {"mean": 0.5, "std": 0.1}} for name in names]
    cost.draw_classes({"kept_by_class": rows}, tmp_path / "classes.png")
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    batch = types.SimpleNamespace(images=images)
    titles = [elastic_grid.row_name(label, names) for label in range(5)]
    assert titles == [r"\u732b", "été ☃", "😀", r"\u0915", r"\u72ac\u72ac\u72a" + "..."]
    elastic_grid.draw_grid([batch], ["all"], titles, tmp_path / "grid.png")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_an_error_while_drawing_does_not_blame_the_file(tmp_path, monkeypatch):
    config = config_from_dict({"data": {"image_size": 64}})
    record = SamplingRecord([900], np.full((2, 1, 2), 5), [0, 1], Seconds(1, 1), 0)
    summary = summarise(config, 1e12, None, record)

    def fail(figure, path):
        raise ValueError("of the font")

    monkeypatch.setattr(cost, "save_figure", fail)
    save_summary(summary, tmp_path / "summary.json")
    with pytest.raises(ValueError, match="of the font"):
        cost.main([str(tmp_path / "summary.json")])
    for key in ("tokens", "kept_by_class", "tflop_by_component"):
        save_summary({**summary, key: None}, tmp_path / "summary.json")
        with pytest.raises(UserError, match="is not a summary.json of a sampling run"):
            cost.main([str(tmp_path / "summary.json")])


def test_legend_of_pareto(tmp_path, monkeypatch):
    """A name that begins with "_" is in the legend."""
    row = {"cfg_scale": "1.0", "lite_cfg": "", "step": "1", "static": "False", "model": "m", "images": "4"}
    row |= {"name": "_$5_\n$^{", "tflop_per_image": "1", "frechet_distance": "2", "budget": "0.0"}
    figures = []
    write = pareto.save_figure
    monkeypatch.setattr(
        pareto, "save_figure", lambda figure, path: (figures.append(figure), write(figure, path))
    )
    pareto.draw([row, {**row, "tflop_per_image": "2", "budget": "0.5"}], tmp_path / "pareto.png")
    (text,) = figures[0].axes[0].get_legend().get_texts()
    assert text.get_text() == r"_$5_\n$^{, 1 steps"


def test_model_card(odd, tmp_path):
    trained = load_trained(odd)
    trained.autoencoder.name = "autoencoders/caf\udce9`"
    hub.Pretrained(trained).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert (
        r"# \_DiT \$1\_\<b\>" in card and r"3 classes: \$5\_to\_\$x^{, caf\\xe9 \<b\>, new\\nline\_x" in card
    )
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "dc-dit"
    assert r"Autoencoder: `caf\xe9'`" in card and load_trained(tmp_path).class_names == ODD


def build_page(trained, changes=None, error=None):
    """What Gradio is given for the page of a model; and in `changes` what it calls."""
    seen = []
    calls = [] if changes is None else changes

    class Part:
        def __init__(self, *args, **options):
            seen.append((args, options))
            self.load = self.change = None

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    names = ("Blocks", "Markdown", "Row", "Dropdown", "Number", "Slider", "Image", "Textbox", "HTML")
    gradio = types.SimpleNamespace(
        **dict.fromkeys(names, Part),
        on=lambda *args, **options: calls.append(args),
        skip=lambda: None,
        Error=error,
    )
    demo.build_page(gradio, SideBySide(trained, 2, "ddim"), ["my_score=0.7"])
    return seen


def test_page(odd):
    """Everything that Gradio gets can be sent to a browser, and its title holds no mark-up."""
    seen = build_page(load_trained(odd))
    repr(seen).encode()
    text = next(args[0] for args, _ in seen if args and str(args[0]).startswith("##"))
    assert text.startswith(r"## \_DiT \$1\_\<b\>: one checkpoint") and text.endswith(r", my\_score=0.7")
    choices = next(args[0] for args, options in seen if options.get("label") == "class")
    assert choices[:2] == ["$5_to_$x^{", r"caf\xe9 <b>"]
    "".join(choices).encode()


def test_the_page_shows_an_error_in_a_line(odd):
    """Of a seed or a scale out of range, in place of a traceback in the terminal."""

    class Error(Exception):
        def __init__(self, message, print_exception):
            assert not print_exception
            super().__init__(message)

    changes = []
    build_page(load_trained(odd), changes, Error)
    (_, sample, *_), (_, chunk_map, *_) = changes
    name = "$5_to_$x^{"
    with pytest.raises(Error, match="--seed -1: must be 0 or greater"):
        list(sample(name, -1, 2.0, 0.0, 0.0, 0))
    with pytest.raises(Error, match="--cfg-scale 0.5: must be a number of at least 1"):
        chunk_map(name, 0, 0.5, 0.0, 0.0, 0)


@pytest.mark.parametrize("dropped_labels, scale", [(0.0, 1), (1.0, 0), (0.5, 2)])
def test_the_page_offers_a_scale_that_the_model_can_do(tiny_config, tmp_path, dropped_labels, scale):
    config = load_config(tiny_config, [f"training.class_dropout_prob={dropped_labels}"])
    trained = load_trained(save(config, tmp_path, None))
    seen = build_page(trained)
    (lowest, _, shown), options = next(part for part in seen if part[1].get("label") == "guidance")
    assert shown == scale and lowest == min(scale, 1) and options["interactive"] == (scale == 2)
    *_, last = SideBySide(trained, 2, "ddim").views(Choice(1, 0, shown, 0.5, 0.8), 0)
    assert last.image.shape == (288, 288, 3)


def test_any_name_can_be_printed(monkeypatch, capsys):
    """Also where the terminal has no such character; and an error stays one line."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    cli.run(lambda: print("caf\udce9 Fréchet"))
    terminal.flush()
    assert terminal.buffer.getvalue() == b"caf\\udce9 Fr\\xe9chet\n"

    def fail():
        raise UserError("'new\nline': is no folder")

    with pytest.raises(SystemExit):
        cli.run(fail)
    assert capsys.readouterr().err == "error: 'new\\nline': is no folder\n"
