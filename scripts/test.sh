#!/usr/bin/env bash
# All checks on any machine: makes .venv, installs what is missing, runs ruff, mypy and pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
python -m pip install --disable-pip-version-check -q -r tests/requirements.txt
ruff check .
ruff format --check .
mypy
python -m pytest "$@"
