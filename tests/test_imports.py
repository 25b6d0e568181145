"""The import direction: scripts -> {training, evaluation} -> {data, models, diffusion} -> config, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("data", "models", "diffusion", "training", "evaluation", "benchmarks")
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"config", "schema", "cli"}
SOURCES = sorted(
    [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
)
BUILDERS = ("models/__init__.py", "models/convert.py")
FILES = [str(path.relative_to(ROOT)) for path in SOURCES]

PICTURES = tuple(
    f"evaluation/{name}.py" for name in ("charts", "chunk_maps", "elastic_grid", "pareto_figure")
)  # slow import

# What each place may import besides itself; `cli` is below the scripts, and for any module that can be run as a command.
MAY_IMPORT = {
    "schema": set(),
    "config": {"schema"},
    "cli": {"config", "models"},
    "data": {"config"},
    "models": {"config"},
    "diffusion": set(),
    "training": {"config", "data", "models", "diffusion"},
    "evaluation": {"config", "data", "models", "diffusion", "training"},
    "benchmarks": {"config", "cli", "data", "models", "diffusion", "training", "evaluation"},
    "script": {"config", "cli", *PACKAGES},
}
ALSO = {
    "models/convert.py": {
        "data",
        "training",
    },  # a command that reads and writes checkpoints; no module imports it
    "evaluation/generate.py": {"cli"},  # sets TF32 as training does
}


def imports(file: str, at_module_level=False) -> set[str]:
    """Dotted names of all modules that a file imports, or only of those that importing it imports."""
    names, waiting = set(), [ast.parse((ROOT / file).read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are written in full"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        if not (at_module_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            waiting += ast.iter_child_nodes(node)
    return names


def tops(file: str, **options) -> set[str]:
    return {name.split(".")[0] for name in imports(file, **options)}


def test_the_reader_of_imports_sees_them():
    assert {"cli", "models", "training"} <= tops("train.py")
    assert "diffusers" in tops("data/autoencoder.py") and "diffusers" not in tops(
        "data/autoencoder.py", at_module_level=True
    )
    assert (
        len(FILES) > 30
        and {"train", "sample", "sample_ddp", "evaluate", "extract_features", "quickstart"} <= SCRIPTS
    )


@pytest.mark.parametrize("file", FILES)
def test_direction(file):
    place = Path(file).parts[0].removesuffix(".py")
    allowed = MAY_IMPORT["script" if place in SCRIPTS else place] | {place}
    if "__main__" in (ROOT / file).read_text():
        allowed = allowed | {"cli"}
    if place == "quickstart":
        allowed = allowed | SCRIPTS
    ours = {"config", "schema", "cli", *PACKAGES, *SCRIPTS}
    assert tops(file) & ours <= allowed | ALSO.get(file, set())
    assert "tests" not in tops(file)


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.startswith("models/") and file not in BUILDERS]
)
def test_layers_take_plain_numbers(file):
    """Only build_model and the converter's command see a configuration."""
    assert "config" not in tops(file)


def test_no_module_imports_the_command():
    assert not any("models.convert" in imports(file) for file in FILES)


def test_evaluation_knows_of_training_only_its_checkpoints():
    for file in FILES:
        if file.startswith("evaluation/"):
            used = {name for name in imports(file) if name.split(".")[0] == "training"}
            assert all(name.startswith("training.checkpoint") for name in used), file


@pytest.mark.parametrize("file", FILES)
def test_optional_packages_are_not_needed_to_import(file):
    """flash-attn and the trackers where they are used only; diffusers and matplotlib take seconds, so few need them."""
    top = tops(file, at_module_level=True)
    assert not top & {"flash_attn", "wandb", "xformers", "tensorboard", "gradio", "torch_fidelity"}
    assert "matplotlib" not in top or file in PICTURES
    assert "diffusers" not in top or file in ("training/autoencoder.py", "evaluation/pipeline.py")


@pytest.mark.parametrize("file", FILES)
def test_every_file_says_what_it_is(file):
    tree = ast.parse((ROOT / file).read_text())
    assert ast.get_docstring(tree)
