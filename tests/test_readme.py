"""The README's commands, options and keys exist, its defaults are the program's, and its example finds its imports."""

import ast
import functools
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
import yaml

import cli
from config import config_from_dict, to_dict
from sampling import arguments

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
PROSE = re.findall(
    r"`([^`]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL)
)  # what stands in backticks
SHARED = (arguments.add_sampling_arguments, arguments.add_run_arguments, cli.add_config_arguments)
OTHERS = {"--machine_rank"}  # accelerate's
DEFAULTS = to_dict(config_from_dict({}))


def parser_of(script: Path) -> str:
    """Source of a script and of the shared options that it takes."""
    source = script.read_text(encoding="utf-8")
    for function in SHARED:
        if f"{function.__name__}(" in source:
            source += inspect.getsource(function)
    return source


def default(key: str):
    """Value of `section.key`; KeyError where there is none."""
    return functools.reduce(lambda values, name: values[name], key.split("."), DEFAULTS)


def test_there_are_commands_for_every_script():
    scripts = ("extract_features.py", "train.py", "sample.py", "sample_ddp.py", "evaluate.py")
    for script in (*scripts, "scripts/quickstart.sh", "scripts/test.sh"):
        assert any(script in command for command in COMMANDS), script


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    words = shlex.split(command)
    if "-m" in words:
        script = ROOT / (words[words.index("-m") + 1].replace(".", "/") + ".py")
        options = words[words.index("-m") + 2 :]
    else:
        name = next(word for word in words if word.endswith((".py", ".sh")))
        script, options = ROOT / name, words[words.index(name) + 1 :]
    source = parser_of(script)
    for word, following in zip(options, [*options[1:], ""]):
        if word.startswith("--"):
            assert f'"{word}"' in source, word
        if word == "--set":
            default(following.split("=")[0])
        if word.endswith(".yaml"):
            assert (ROOT / word).is_file(), word


def test_options_and_keys_in_the_text():
    files = [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/*.py")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    options = {word.split("=")[0] for code in PROSE for word in code.split() if word.startswith("--")}
    keys = {
        match[0] for code in PROSE if (match := re.match(r"(model|training|logging)(\.[a-z_0-9]+)+", code))
    }
    assert len(options) > 20 and len(keys) > 20
    for option in options - OTHERS:
        start, family, _ = option.partition("...")  # `--uncond-...` are several
        assert f'"{start}' + ("" if family else '"') in source, option
    for key in keys:
        default(key)


def test_table_of_the_configuration():
    """Every key exists and has the default that the table says; a key without a section is in that of the one before."""
    table = README.split("| key | default | meaning |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) > 15
    for row in table:
        names, values = (cell.replace("`", "").strip() for cell in row.split("|")[1:3])
        first, *more = names.replace(" and ", ", ").split(", ")
        keys = [first, *(f"{first.rpartition('.')[0]}.{name}" for name in more)]
        assert [default(key) for key in keys] == yaml.safe_load(f"[{values}]"), names


def test_python_example_finds_its_imports():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    imported = [node for node in ast.parse(example).body if isinstance(node, ast.ImportFrom)]
    assert len(imported) == 3
    for node in imported:
        for alias in node.names:
            assert hasattr(importlib.import_module(node.module), alias.name), alias.name


def test_linked_files_exist():
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
