"""What the documentation names exists: commands, options, keys, defaults, files, links and imports."""

import ast
import contextlib
import functools
import importlib
import inspect
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from config import config_from_dict, to_dict

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted([README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCS]
README_LIMIT = 12 * 1024  # bytes

SOURCES = {
    path: path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")]
}
PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
# Names that belong to other programs: modules that are run, options, and file names that look like keys.
FOREIGN_MODULES = {"pytest", "mypy"}
FOREIGN_OPTIONS = {"--machine_rank", "--num_cpu_threads_per_process", "--help"}
FILE_NAMES = re.compile(r".*\.(py|md|sh|pt|npz|csv|png|yaml|json|jsonl|txt|safetensors)")
DEFAULTS = to_dict(config_from_dict({}))


# ------------------------------------------------------------------------------------------------ the parts of a page


@functools.cache
def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """Contents of the fenced blocks in a language; "": those without one."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text(name), re.DOTALL | re.MULTILINE)
    return [content for found, content in fenced if found == language]


def prose(name: str) -> str:
    """The text outside of fenced blocks."""
    return re.sub(r"^```.*?^```", "", text(name), flags=re.DOTALL | re.MULTILINE)


def quoted(name: str) -> list[str]:
    """What stands in backticks in the text."""
    return re.findall(r"`([^`\n]+)`", prose(name))


def commands(name: str) -> list[str]:
    lines = "\n".join(blocks(name, "bash")).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


COMMANDS = [(name, command) for name in NAMES for command in commands(name)]


# ------------------------------------------------------------------------------------------------ commands and options


@functools.cache
def functions_with_options() -> dict[str, str]:
    """Source by name of the functions that add options to a parser which they are given."""
    found = {}
    for path, source in SOURCES.items():
        if "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("add_"):
                found[node.name] = ast.get_source_segment(source, node)
    return found


@functools.cache
def options_of(script: Path) -> str:
    """Source of a script with that of the functions which add options to its parser."""
    source, waiting = SOURCES[script], functions_with_options()
    while called := [function for function in waiting if f"{function}(" in source]:
        source += "".join(waiting[function] for function in called)
        waiting = {function: code for function, code in waiting.items() if function not in called}
    return source


def default(key: str):
    """Value of `section.key`; KeyError where there is none."""
    return functools.reduce(lambda values, name: values[name], key.split("."), DEFAULTS)


def check_module(name: str) -> Path:
    """The file of `python -m name`, which must do something when it is run."""
    file = ROOT / Path(*name.split("."))
    file = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
    assert file.is_file(), f"python -m {name}: {file} does not exist"
    runs = file.name == "__main__.py" or 'if __name__ == "__main__":' in SOURCES[file]
    assert runs, f"python -m {name} does nothing"
    return file


@pytest.mark.parametrize("name, command", COMMANDS)
def test_command(name, command):
    words = shlex.split(command)
    programs = [word for word in words if word.endswith((".py", ".sh", ".sbatch"))]
    if "-m" in words[:3]:
        module = words[words.index("-m") + 1]
        if module in FOREIGN_MODULES:
            return
        script, options = check_module(module), words[words.index("-m") + 2 :]
    elif programs:
        script, options = ROOT / programs[0], words[words.index(programs[0]) + 1 :]
        assert script.is_file(), script
    else:
        return
    for word, following in zip(options, [*options[1:], ""]):
        if word.startswith("--") and script.suffix == ".py":
            assert f'"{word}"' in options_of(script), f"{word} is not an option of {script.name}"
        if word == "--set":
            default(following.split("=")[0])
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), word


def test_readme_has_a_command_for_every_step_of_the_workflow():
    scripts = ("extract_features.py", "train.py", "sample.py", "sample_ddp.py", "evaluate.py")
    for script in (*scripts, "scripts/quickstart.sh", "scripts/test.sh"):
        assert any(script in command for command in commands("README.md")), script


@pytest.mark.parametrize("name", NAMES)
def test_options_in_the_text(name):
    source = "".join(SOURCES.values())
    options = {word.split("=")[0] for code in quoted(name) for word in code.split() if word.startswith("--")}
    for option in options - FOREIGN_OPTIONS:
        if name == "docs/differences.md" and f"`{option}`" in official_options():
            continue
        start, family, _ = option.partition("...")  # `--uncond-...` are several
        assert f'"{start}' + ("" if family else '"') in source, option


def official_options() -> str:
    """The cells of docs/differences.md that list options which only the official code has."""
    rows = [
        row.split("|") for row in text("docs/differences.md").splitlines() if row.endswith("leave them out |")
    ]
    return "".join(row[1] + row[2] for row in rows)


# ------------------------------------------------------------------------------------------------ names of the code


def resolve(dotted: str):
    """The object of a dotted name that begins with a package or a top-level module."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found = importlib.import_module(".".join(parts[:length]))
            return functools.reduce(getattr, parts[length:], found)
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_dotted_names_in_the_text(name):
    """`section.key` is a key of the configuration, and `package.module.name` can be imported."""
    for code in quoted(name):
        match = re.match(r"([a-z_]+)((?:\.\w+)+)", code)
        if not match or match[1] not in {*DEFAULTS, *PACKAGES, *SCRIPTS} or FILE_NAMES.fullmatch(match[0]):
            continue
        with contextlib.suppress(KeyError, TypeError):
            default(match[0])
            continue
        resolve(match[0])


@pytest.mark.parametrize("name", NAMES)
def test_files_in_the_text(name):
    """A path that begins with a folder of the repository exists, and so does every `*.py`."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"quickstart", "results", "samples"}
    for code in quoted(name):
        if not re.fullmatch(r"[\w.*{},/-]+", code):
            continue
        if code.split("/")[0] in folders and "/" in code:
            assert list(ROOT.glob(re.sub(r"\{[^}]*\}", "*", code))), code
        elif code.endswith(".py"):
            assert any(path.name == code for path in SOURCES), code


@pytest.mark.parametrize("name", NAMES)
def test_functions_in_the_text(name):
    """Where the text says `function` in `file.py`, the function is there."""
    for function, file in re.findall(r"`([\w.]+)`(?: and `\w+`)? (?:in|,) `([\w/]+\.py)`", prose(name)):
        module = ".".join(Path(file).with_suffix("").parts)
        functools.reduce(getattr, function.split("."), importlib.import_module(module))


@pytest.mark.parametrize("name", NAMES)
def test_table_of_defaults(name):
    """Every key of a table has the default that the table says; a key without a section is in that of the one before."""
    for table in text(name).split("| key | default | meaning |")[1:]:
        for row in table.split("\n\n")[0].splitlines()[2:]:
            names, values = (cell.replace("`", "").strip() for cell in row.split("|")[1:3])
            first, *more = names.replace(" and ", ", ").split(", ")
            keys = [first, *(f"{first.rpartition('.')[0]}.{key}" for key in more)]
            assert [default(key) for key in keys] == yaml.safe_load(f"[{values}]"), names


def test_map_of_the_code_is_complete():
    """Every file that README's map names exists, and every package and script is in it."""
    (tree,) = [block for block in blocks("README.md", "") if "models/" in block]
    named = set()
    for line in tree.splitlines():
        here = ROOT
        for word in re.findall(r"[\w/]+/(?=\s|$)|\w+\.py", line):
            path = here / word
            assert path.exists(), path
            named.add(word.rstrip("/"))
            if word.endswith("/") and here == ROOT and not line.startswith("configs/"):
                here = path
    assert PACKAGES | {f"{script}.py" for script in SCRIPTS} <= named


# ------------------------------------------------------------------------------------------------ examples in Python


EXAMPLES = [(name, number, code) for name in NAMES for number, code in enumerate(blocks(name, "python"))]


@pytest.mark.parametrize("name, number, code", EXAMPLES)
def test_python_example(name, number, code):
    """Its names are defined, its imports are found, and the functions it calls take its keywords."""
    ruff = [sys.executable, "-m", "ruff", "check", "--quiet", "--isolated", "--select", "F", "-"]
    checked = subprocess.run(ruff, input=code, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    imported = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            imported |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
            keywords = dict.fromkeys(keyword.arg for keyword in node.keywords)
            inspect.signature(imported[node.func.id]).bind_partial(**keywords)


def test_walk_prints_the_shapes_that_it_shows():
    """The page's example is run, and prints the block that follows it."""
    (code,) = blocks("docs/walk.md", "python")
    *_, shown = blocks("docs/walk.md", "")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "docs/walk.md", "exec"), {})
    assert printed.getvalue() == shown


# ------------------------------------------------------------------------------------------------ links and sizes


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in words}


@pytest.mark.parametrize("name", NAMES)
def test_links_and_images(name):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", prose(name)):
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.is_file(), target
        assert not anchor or anchor in anchors(path), target


def test_every_page_can_be_reached_from_the_readme():
    linked = {(ROOT / target).resolve() for target in re.findall(r"\]\(([^):#]+)\)", text("README.md"))}
    assert set(DOCS) - {README} <= linked


def test_readme_is_short():
    assert README.stat().st_size <= README_LIMIT
