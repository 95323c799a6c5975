#!/usr/bin/env bash
# Set up .venv and run the checks: lint, then the tests. Arguments go to pytest, e.g. bash launch/test.sh -m slow
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export HF_HUB_OFFLINE=1 WANDB_MODE=offline
ruff check .
ruff format --check .
export OMP_NUM_THREADS=1  # one test process per core instead
python -m pytest -q -n auto --dist loadfile --durations=8 "$@"
