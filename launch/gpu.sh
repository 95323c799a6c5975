#!/usr/bin/env bash
# What holds and what it costs on one GPU, in about 8 minutes: checks against the CPU first, then whole runs, then speeds.
#
#   bash launch/gpu.sh wheels      beforehand, where there is internet: what a machine with torch may lack, into wheelhouse/
#   bash launch/gpu.sh [OUT]       on the GPU machine, with or without internet; results in OUT (default gpu-results)
#   bash launch/gpu.sh cpu [OUT]   the same checks and the ladder in small, to see that they run
#
# Each stage writes a file; one that is there is not run again, so a machine that is taken away costs one stage.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

if [ "${1:-}" = wheels ]; then
  wanted=(accelerate annotated-types braceexpand diffusers h11 httpx importlib-metadata lazy-importer lycoris-lora
    markupsafe optimum-quanto pydantic pydantic-core scikit-learn toml torch-optimi typing-inspection webdataset)
  for version in ${PYTHON_VERSIONS:-3.12}; do
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "wheelhouse/$version" -c constraints.txt \
      --python-version "$version" --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any "${wanted[@]}"
  done
  du -sh wheelhouse
  exit
fi

small=()
if [ "${1:-}" = cpu ]; then
  shift
  small=(--device cpu)
fi
out=${1:-gpu-results}
mkdir -p "$out"
wheels=wheelhouse/$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ -d "$wheels" ] && [ ! -d "$out/site" ]; then
  # into a folder of its own: what the machine has stays as it is
  "$python" -m pip install --quiet --no-index --no-deps --target "$out/site" "$wheels"/*.whl
fi
export PYTHONPATH="$PWD/$out/site:$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 WANDB_MODE=offline

stage() {  # stage NAME SECONDS MODULE ARGUMENTS...: unless its result is there; a failure does not keep the next from running
  local name=$1 seconds=$2
  shift 2
  [ -e "$out/$name.done" ] && { echo "$name: done before"; return; }
  if timeout "$seconds" "$python" -m "$@" --out "$out/$name.json" >"$out/$name.log" 2>&1; then
    touch "$out/$name.done"
    echo "$name: $out/$name.json"
  else
    echo "$name: failed or out of time, the end of $out/$name.log:" >&2
    tail -n 5 "$out/$name.log" >&2
    code=1
  fi
}

code=0
if [ ${#small[@]} -gt 0 ]; then
  stage checks 600 benchmarks.gpu_checks "${small[@]}" --small
  stage ladder 600 benchmarks.gpu_ladder "${small[@]}" --tiny
else
  stage checks 90 benchmarks.gpu_checks
  stage runs 150 benchmarks.gpu_runs --work "$out/runs"
  stage ladder 270 benchmarks.gpu_ladder --seconds 240
fi
exit "$code"
