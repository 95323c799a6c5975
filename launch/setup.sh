# Sourced by demo.sh and test.sh: a virtual environment in .venv with the versions of constraints.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "dedistill needs Python 3.11 or newer; set PYTHON=/path/to/python3.11 (found: $("$python" --version))" >&2
  exit 1
}

stamp=.venv/.installed
wanted=$(cat pyproject.toml constraints.txt | cksum)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
  echo "Setting up .venv (a few minutes the first time) ..." >&2
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  install() { .venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt "$@"; }
  if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
    # Without a GPU, the CPU build: the default one on Linux brings gigabytes of CUDA along.
    cpu=$(sed -n 's/^torch==\([^+]*\)$/torch==\1+cpu/p' constraints.txt)
    install "$cpu" 2>/dev/null || install "$cpu" --extra-index-url https://download.pytorch.org/whl/cpu
  fi
  install -e '.[dev,mnist]'
  echo "$wanted" >"$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c 'import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))')}
