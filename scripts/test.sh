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
# The suite sees no GPU. Where there is one, the tests of CUDA run once more, with real kernels.
if [ $# -eq 0 ] && python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    python -m pytest --gpu -m cuda
fi
