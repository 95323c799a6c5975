#!/usr/bin/env bash
# What holds and what it costs on one GPU: checks against the CPU first, then speeds, then whole runs.
#
#   bash launch/gpu.sh wheels      beforehand, where there is internet: what a machine with torch may lack, into wheelhouse/
#   bash launch/gpu.sh [OUT [STAGE ...]]   on the GPU machine, with or without internet; results in OUT (default gpu-results)
#   bash launch/gpu.sh cpu [OUT [STAGE ...]]   the same in small, to see that it runs
#
# Without STAGE: what no GPU has run yet, the most wanted first, in 8 minutes. "all" is the whole, in about 20:
#   new (correct?) quick (cuDNN's attention, inputs on the CPU) compiled fp8 quanto  |  checks products ladder peers runs
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
shift || true
unmeasured="new quick compiled fp8 quanto"
wanted=${*:-$unmeasured}
[ "$wanted" = all ] && wanted="$unmeasured checks products ladder peers runs"
mkdir -p "$out"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
wheels=wheelhouse/$version site=$PWD/wheelhouse/site-$version
if [ -d "$wheels" ] && [ ! -d "$site" ]; then
  # into a folder of its own: what the machine has stays as it is
  "$python" -m pip install --quiet --no-index --no-deps --target "$site" "$wheels"/*.whl
fi
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 WANDB_MODE=offline

stage() {  # stage NAME SECONDS MODULE ARGUMENTS...: unless its result is there; a failure does not keep the next from running
  local name=$1 seconds=$2
  shift 2
  [[ " $wanted " == *" $name "* ]] || return 0
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
  stage new 600 benchmarks.gpu_checks "${small[@]}" --small --stages switches plans
  stage quick 600 benchmarks.gpu_ladder "${small[@]}" --tiny --stages eager cuDNN offloaded
  stage compiled 600 benchmarks.gpu_ladder "${small[@]}" --tiny --stages compiled "compiled, cuDNN" "compiled, kernels apart"
  stage fp8 600 benchmarks.gpu_ladder "${small[@]}" --tiny --stages "fp8 products" "compiled, fp8 products"
  stage quanto 600 benchmarks.gpu_peers "${small[@]}" --tiny --against quanto
  stage checks 600 benchmarks.gpu_checks "${small[@]}" --small
  stage products 600 benchmarks.gpu_products "${small[@]}" --small
  stage ladder 600 benchmarks.gpu_ladder "${small[@]}" --tiny
  stage peers 600 benchmarks.gpu_peers "${small[@]}" --tiny
else
  stage new 70 benchmarks.gpu_checks --stages switches plans
  stage quick 90 benchmarks.gpu_ladder --seconds 65 --stages eager cuDNN "eager, batches" offloaded
  stage compiled 200 benchmarks.gpu_ladder --seconds 170 --stages compiled "profile compiled" "compiled, cuDNN" \
    "compiled, kernels apart" "compiled, int8 products"
  stage fp8 90 benchmarks.gpu_ladder --seconds 65 --stages "fp8 products" "eager, batches" "compiled, fp8 products"
  stage quanto 70 benchmarks.gpu_peers --seconds 45 --against quanto
  stage checks 90 benchmarks.gpu_checks --stages agreement kernels switches layouts decoder
  stage products 60 benchmarks.gpu_products --seconds 45
  stage ladder 220 benchmarks.gpu_ladder --seconds 190 --stages eager profile "recorded 512" \
    "recorded 512, nothing computed again" changes "int8 products" "eager, batches" "recorded 1024" "recorded, bf16 base" swap
  stage peers 110 benchmarks.gpu_peers --seconds 80
  stage runs 150 benchmarks.gpu_runs --work "$out/runs"
fi
exit "$code"
