#!/usr/bin/env bash
# Set up .venv and run the checks: lint, types, then the tests. Arguments go to pytest, e.g. bash launch/test.sh -m slow
# bash launch/test.sh quick leaves out whole runs, several processes and browsers: for while one works on something.
# The pages are tested in Debian's chromium, which is installed where it is missing and this runs as root.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export HF_HUB_OFFLINE=1 WANDB_MODE=offline
unset PYTHONDONTWRITEBYTECODE  # every process of the tests would compile the package again
if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "Installing chromium for the tests of the pages ..." >&2
  # Without it those tests fail and say how to get it; -m "not browser" leaves them out.
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } >/dev/null || true
fi
ruff check .
ruff format --check .
types=$(mktemp)
mypy >"$types" 2>&1 &  # beside the tests, half a minute on one core
mypy=$!
trap 'kill "$mypy" 2>/dev/null || true; rm -f "$types"' EXIT
export OMP_NUM_THREADS=1  # one test process per core instead
if [ "${1:-}" = quick ]; then
  shift
  set -- -m "not slow and not long" "$@"
fi
code=0
# Long files first (conftest.py), so that no core waits for another at the end.
python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder --durations=8 "$@" || code=$?
wait "$mypy" || code=$?
cat "$types"
exit "$code"
