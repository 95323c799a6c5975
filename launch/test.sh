#!/usr/bin/env bash
# Set up .venv and run the checks: lint, then the tests. Arguments go to pytest, e.g. bash launch/test.sh -m slow
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export HF_HUB_OFFLINE=1 WANDB_MODE=offline
ruff check .
ruff format --check .
python -m pytest -q --durations=8 "$@"
