"""The README's commands name scripts, configurations and options that exist, and its Python example compiles."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
SHARED = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("cli.py", "evaluation/arguments.py"))


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
    source = script.read_text(encoding="utf-8") + SHARED
    for word in options:
        if word.startswith("--"):
            assert f'"{word}"' in source, word
        if word.endswith(".yaml"):
            assert (ROOT / word).is_file(), word


def test_python_example_compiles():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    compile(example, "README.md", "exec")


def test_linked_files_exist():
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
