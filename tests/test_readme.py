"""What the documentation names exists: commands, options, keys, files, links and imports."""

import argparse
import ast
import contextlib
import functools
import importlib
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import conftest
import pytest

import cli
from config import UserError, config_from_dict, load_config, to_dict

ROOT = Path(__file__).parent.parent
README = "README.md"
README_LIMIT = 12 * 1024  # bytes
PAGES = [README, "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

SCRIPTS = {path.name for path in ROOT.glob("*.py")}
PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
PYTHON_FILES = [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")]
DEFAULTS = to_dict(config_from_dict({}))

# What belongs to other programs: modules that a command runs, and options.
FOREIGN_MODULES = {"pytest", "mypy"}
FOREIGN_OPTIONS = {"--machine_rank", "--num_cpu_threads_per_process", "--help"}
# Folders that the commands of the documentation make.
MADE_BY_COMMANDS = {"quickstart", "results", "samples", "features", "evidence"}


# --------------------------------------------------------------------------------------- the parts of a page


@functools.cache
def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """Contents of the fenced blocks in a language; "": those that name none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE)
    return [content for found, content in fenced if found == language]


def prose(page: str) -> str:
    """The text outside of fenced blocks."""
    return re.sub(r"^```.*?^```", "", text(page), flags=re.DOTALL | re.MULTILINE)


def quoted(page: str) -> list[str]:
    """What stands in backticks in the prose."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: str) -> list[str]:
    """Lines of the blocks in bash, without comments."""
    shell = "\n".join(blocks(page, "bash"))
    lines = [line.split("#")[0].strip() for line in shell.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


# -------------------------------------------------------------------------------------------------- commands


class Call(NamedTuple):
    """What a command line runs."""

    file: Path
    arguments: list[str]


def parse_command(command: str) -> Call | None:
    """The file of this repository that a command runs; None if it runs other programs only."""
    words = shlex.split(command)
    if "-m" in words[:3]:
        place = words.index("-m")
        module = words[place + 1]
        if module in FOREIGN_MODULES:
            return None
        return Call(file_of_module(module), words[place + 2 :])
    for place, word in enumerate(words):
        if word.endswith((".py", ".sh", ".sbatch")):
            return Call(ROOT / word, words[place + 1 :])
    return None


def file_of_module(module: str) -> Path:
    """What `python -m module` runs."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


class Parsed(Exception):
    """Ends a program when it has read its command line."""


def read_arguments(call: Call, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The arguments as the program's own parser reads them; UserError or SystemExit for an unknown one."""
    for parser_class in (argparse.ArgumentParser, cli.Parser):

        def parse_and_stop(parser, argv=None, namespace=None, parse_args=parser_class.parse_args):
            raise Parsed(parse_args(parser, argv, namespace))

        monkeypatch.setattr(parser_class, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [str(call.file), *call.arguments])
    parts = call.file.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "tests":
        parts = parts[1:]
    try:
        importlib.import_module(".".join(parts)).main()
    except Parsed as parsed:
        return parsed.args[0]
    raise AssertionError(f"{call.file} reads no arguments")


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("page, command", COMMANDS)
def test_command(page, command, monkeypatch):
    """Its program takes the options, and the configuration takes the overrides."""
    call = parse_command(command)
    if call is None:
        return
    assert call.file.is_file(), call.file
    for word in call.arguments:
        assert not word.startswith(("configs/", "scripts/")) or (ROOT / word).is_file(), word
    if call.file.suffix != ".py":
        return
    runs = 'if __name__ == "__main__":'
    assert runs in call.file.read_text(encoding="utf-8"), f"running {call.file} does nothing"
    arguments = read_arguments(call, monkeypatch)
    overrides = getattr(arguments, "set", [])
    if getattr(arguments, "config", None):
        load_config(ROOT / arguments.config, overrides)
    else:
        for override in overrides:
            default(override.split("=")[0])


def test_the_reader_of_commands_sees_mistakes(monkeypatch):
    call = parse_command("accelerate launch train.py --configs configs/shapes.yaml")
    with pytest.raises(UserError, match="--configs"):
        read_arguments(call, monkeypatch)


def test_readme_has_a_command_for_every_step_of_the_workflow():
    steps = ("extract_features.py", "train.py", "sample.py", "sample_ddp.py", "evaluate.py")
    for script in (*steps, "scripts/quickstart.sh", "scripts/test.sh"):
        assert any(script in command for command in commands(README)), script


# ---------------------------------------------------------------------------------------- names in the prose


def default(key: str) -> Any:
    """Value of `section.key`; KeyError or TypeError if there is none."""
    return functools.reduce(lambda values, name: values[name], key.split("."), DEFAULTS)


def resolve(dotted: str) -> Any:
    """The object with a dotted name that begins with a package or a top-level module."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            module = importlib.import_module(".".join(parts[:length]))
            return functools.reduce(getattr, parts[length:], module)
    raise ModuleNotFoundError(dotted)


def official_options() -> set[str]:
    """Options of the official code that docs/differences.md lists as left out here."""
    rows = [row for row in text("docs/differences.md").splitlines() if row.endswith("leave them out |")]
    return set(re.findall(r"--[\w-]+", "".join(rows)))


@pytest.mark.parametrize("page", PAGES)
def test_options_in_the_prose(page):
    source = "".join(path.read_text(encoding="utf-8") for path in PYTHON_FILES)
    words = [word for code in quoted(page) for word in code.split()]
    options = {word.split("=")[0] for word in words if word.startswith("--")} - FOREIGN_OPTIONS
    if page == "docs/differences.md":
        options -= official_options()
    for option in options:
        # `--uncond-...` stands for several options.
        wanted = f'"{option.removesuffix("...")}' if option.endswith("...") else f'"{option}"'
        assert wanted in source, option


@pytest.mark.parametrize("page", PAGES)
def test_keys_and_dotted_names_in_the_prose(page):
    """`section.key` is a key of the configuration, and `package.module.name` can be imported."""
    modules = {script.removesuffix(".py") for script in SCRIPTS}
    suffixes = ("py", "sh", "md", "pt", "npz", "csv", "png", "yaml", "json", "jsonl", "txt", "safetensors")
    for code in quoted(page):
        found = re.match(r"[a-z_]+(\.\w+)+", code)
        if not found or found[0].endswith(tuple(f".{suffix}" for suffix in suffixes)):
            continue
        if found[0].split(".")[0] not in {*DEFAULTS, *PACKAGES, *modules}:
            continue
        try:
            default(found[0])
        except (KeyError, TypeError):
            resolve(found[0])


@pytest.mark.parametrize("page", PAGES)
def test_files_in_the_prose(page):
    """A path that begins with a folder of the repository exists, and so does every `name.py`."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - MADE_BY_COMMANDS
    names = {path.name for path in PYTHON_FILES}
    for code in quoted(page):
        if not re.fullmatch(r"[\w.*{},/-]+", code):
            continue
        if "/" in code and code.split("/")[0] in folders:
            # `DiT-{S,B}-2.yaml` stands for several files.
            assert list(ROOT.glob(re.sub(r"\{[^}]*\}", "*", code))), code
        elif code.endswith(".py"):
            assert code in names, code


@pytest.mark.parametrize("page", PAGES)
def test_functions_in_the_prose(page):
    """Where the prose says `function` in `file.py`, the function is there."""
    for function, file in re.findall(r"`([\w.]+)` in `([\w/]+\.py)`", prose(page)):
        module = importlib.import_module(".".join(Path(file).with_suffix("").parts))
        functools.reduce(getattr, function.split("."), module)


def test_map_of_the_code():
    """Every file that the README's map names exists, and every package and script is in it."""
    (tree,) = [block for block in blocks(README, "") if "models/" in block]
    named = set()
    for line in tree.splitlines():
        words = re.findall(r"\w+/|[\w/]+\.py", line)
        # A line describes one package and names its files, or lists scripts or folders.
        package = words[0] if line.startswith(words[0]) and line.count("/") == 1 else ""
        for word in words:
            path = ROOT / word if word == package else ROOT / package / word
            assert path.exists(), path
            named.add(str(path.relative_to(ROOT)))
    assert named >= PACKAGES | SCRIPTS


# ---------------------------------------------------------------------------------------- examples in Python


EXAMPLES = [(page, code) for page in PAGES for code in blocks(page, "python")]


@pytest.mark.parametrize("page, code", EXAMPLES)
def test_python_example(page, code):
    """Its names are defined, its imports are found, and what it calls takes its keywords."""
    ruff = [sys.executable, "-m", "ruff", "check", "--quiet", "--isolated", "--select", "F", "-"]
    checked = subprocess.run(ruff, input=code, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    nodes = list(ast.walk(ast.parse(code)))
    imported = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                imported[alias.name] = getattr(module, alias.name)
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
            keywords = {keyword.arg: None for keyword in node.keywords}
            inspect.signature(imported[node.func.id]).bind_partial(**keywords)


def test_walk_prints_the_shapes_that_it_shows(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = blocks("docs/walk.md", "python")
    shown = blocks("docs/walk.md", "")[-1]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "docs/walk.md", "exec"), {})
    assert printed.getvalue() == shown


# ------------------------------------------------------------------------------------------- links and sizes


def links(page: str) -> list[str]:
    """Targets of links and images that lie in this repository."""
    return re.findall(r"\]\((?!https?:)([^)]+)\)", prose(page))


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images(page):
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_can_be_reached_from_the_readme():
    linked = {os.path.normpath(target.partition("#")[0]) for target in links(README)}
    assert set(PAGES) - {README} <= linked


def test_readme_is_short():
    assert (ROOT / README).stat().st_size <= README_LIMIT


# -------------------------------------------------------------------------------------------- the fast tests


@pytest.mark.parametrize("name", conftest.FAST)
def test_files_of_fast_tests_exist(name):
    assert (ROOT / "tests" / name).is_file()
