"""The layers of the code, read from its import statements: every arrow points downwards."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom to the top. A place may import those of the rows below it, and itself.
LAYERS = (
    ("schema",),
    ("spellings", "layouts", "plain_data", "grid"),
    ("config_keys",),
    ("config",),
    ("cli",),
    ("models", "diffusion", "data", "processes"),
    ("weights",),
    ("sampling",),
    ("evaluation", "training"),
    ("plugins", "toy", "figures"),
    ("extract_features", "train", "sample", "sample_ddp", "evaluate", "demo"),
    ("quickstart", "scripts", "benchmarks", "examples"),
)
LAYER = {place: level for level, row in enumerate(LAYERS) for place in row}
PACKAGES = [place for place in LAYER if (ROOT / place / "__init__.py").is_file()]
SOURCES = sorted([*ROOT.glob("*.py"), *(path for place in LAYER for path in (ROOT / place).rglob("*.py"))])
FILES = [str(path.relative_to(ROOT)) for path in SOURCES]

# Only these build a network from a configuration; the other files of models/ take an Architecture or plain numbers.
BUILDERS = ("models/__init__.py", "models/flops.py")
# Packages that take seconds to import, and the files that may import them at once.
SLOW = {"matplotlib": "figures/", "diffusers": ("toy/autoencoder.py", "sampling/pipeline.py")}
OPTIONAL = {"flash_attn", "wandb", "xformers", "tensorboard", "gradio", "torch_fidelity", "transformers"}


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


def places(file: str, **options) -> set[str]:
    """First parts of the imported names."""
    return {name.split(".")[0] for name in imports(file, **options)}


def place_of(file: str) -> str:
    return Path(file).parts[0].removesuffix(".py")


def test_the_reader_of_imports_sees_them():
    assert {"cli", "models", "training"} <= places("train.py")
    assert "diffusers" in places("data/autoencoder.py")
    assert "diffusers" not in places("data/autoencoder.py", at_module_level=True)


def test_every_file_has_a_layer():
    tracked = {path.name.removesuffix(".py") for path in ROOT.glob("*.py")}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert tracked | packages <= LAYER.keys()


@pytest.mark.parametrize("file", FILES)
def test_imports_point_downwards(file):
    place = place_of(file)
    for imported in places(file) & LAYER.keys() - {place}:
        assert LAYER[imported] < LAYER[place], f"{file} imports {imported}"
    assert "tests" not in places(file)


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.startswith("models/") and file not in BUILDERS]
)
def test_networks_take_plain_values(file):
    assert not {"config", "cli"} & places(file)


def test_diffusion_knows_nothing_of_the_rest():
    for file in FILES:
        if file.startswith("diffusion/"):
            assert not places(file) & LAYER.keys() - {"diffusion"}, file


@pytest.mark.parametrize("file", FILES)
def test_slow_and_optional_packages_are_imported_where_they_are_used(file):
    top = places(file, at_module_level=True)
    assert not top & OPTIONAL
    for package, where in SLOW.items():
        assert package not in top or file.startswith(where)


@pytest.mark.parametrize("file", FILES)
def test_every_file_says_what_it_is(file):
    assert ast.get_docstring(ast.parse((ROOT / file).read_text()))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_in_one_line_what_lives_there(package):
    text = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text()))
    assert len(text.splitlines()) == 1


def test_no_folder_holds_more_than_a_fifth():
    lines = {file: len((ROOT / file).read_text().splitlines()) for file in FILES}
    for package in PACKAGES:
        own = sum(count for file, count in lines.items() if place_of(file) == package)
        assert own <= sum(lines.values()) / 5, package
