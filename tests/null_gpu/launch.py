"""Run a script of the repository on the null GPU: python tests/null_gpu/launch.py [--capability 8.0] train.py ...

"-m MODULE" in the script's place runs a module, such as pytest.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from null_gpu import build  # noqa: E402


def main(argv: list[str]) -> None:
    capability = "9.0"
    if argv[:1] == ["--capability"]:
        capability, argv = argv[1], argv[2:]
    try:
        variables = build.environment(capability)
    except build.CannotBuild as reason:
        sys.exit(f"error: {reason}")
    os.execve(sys.executable, [sys.executable, *argv], {**os.environ, **variables})


if __name__ == "__main__":
    main(sys.argv[1:])
