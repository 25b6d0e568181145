# Sourced by the scripts of this folder: activates .venv.
# If .venv is missing or differs from requirements.txt, it is made first.
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: Python >= 3.10 is needed" >&2; exit 2; }
if ! cmp -s requirements.txt .venv/installed.txt; then
    "$PYTHON" -m venv .venv
    .venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
fi
source .venv/bin/activate
