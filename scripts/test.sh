#!/usr/bin/env bash
# The test suite on any machine: makes .venv, installs what is missing, runs ruff and pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
python -m pip install --disable-pip-version-check -q -r tests/requirements.txt
ruff check .
python -m pytest "$@"
