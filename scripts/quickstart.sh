#!/usr/bin/env bash
# From a fresh clone to samples: makes .venv, installs requirements.txt and runs quickstart.py.
# Run it again to resume. Needs bash, Python >= 3.10 (PYTHON=... picks one) and pip. Arguments are passed to quickstart.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
python quickstart.py "$@"
