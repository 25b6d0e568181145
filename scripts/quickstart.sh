#!/usr/bin/env bash
# From a fresh clone to samples: makes .venv, installs requirements.txt, runs quickstart.py. Run it again to go on.
# Needs bash, Python >= 3.10 (PYTHON=... picks one) and pip. Arguments go to quickstart.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
python quickstart.py "$@"
