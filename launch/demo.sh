#!/usr/bin/env bash
# The whole story on real digits: teacher, 4-step student, de-distilled student, post-hoc averages, CFG sweeps, report.
#
#   bash launch/demo.sh          8x8 digits of scikit-learn, under 5 minutes on 2 cores after installation
#   bash launch/demo.sh mnist    28x28 digits of MNIST, under 30 minutes
#
# Run again to continue after a stop; what is finished is reused.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

story=${1:-digits}
case $story in
  # operations this small gain nothing from a second thread, and lose much when another program runs
  digits) threads=1 pairs=(--count 1536 --steps 16) prompts=256 averages=(--cfg 1 2 4 --prompts 64) ;;
  mnist) threads=$OMP_NUM_THREADS pairs=(--count 1024 --steps 24) prompts=192
    averages=(--cfg 1 2 4 --prompts 32 --candidates base alpha_linear_0.2 alpha_linear_0.9 last) ;;
  *) echo "usage: bash launch/demo.sh [digits|mnist]" >&2; exit 2 ;;
esac
export OMP_NUM_THREADS=$threads

# Each job is a process group of its own and is waited for, so that a stop reaches it once, whatever its launcher does,
# and nothing outlives the demo. Training saves and says where it stopped.
set -m
job=""
sweep=""
run() {
  local status=0
  "$@" &
  job=$!
  wait "$job" || status=$?
  job=""
  return "$status"
}
end() {
  [ -z "$1" ] || pkill -TERM -P "$1" || kill -TERM "$1" 2>/dev/null || :
  [ -z "$1" ] || wait "$1" || :
}
stop() {
  trap "" INT TERM
  end "$job"
  end "$sweep"
  echo "stopped; continue with: bash launch/demo.sh $story" >&2
  exit 75
}
trap stop INT TERM
trap 'end "$sweep"' EXIT

train() {
  run accelerate launch --quiet --config_file launch/cpu.yaml --num_cpu_threads_per_process "$threads" \
    -m dedistill.train "recipes/$story/$1.toml"
}

echo "1/6 teacher"
train teacher
echo "2/6 pairs of noise and picture"
run python tools/make_pairs.py "recipes/$story/teacher.toml" --out "runs/$story/pairs" --cfg 3 --points 4 "${pairs[@]}"
echo "3/6 student"
train student
echo "4/6 de-distil"
train dedistill
echo "5/6 post-hoc averages and their CFG sweep (in the background; runs/$story/averages.log)"
run python tools/posthoc_ema.py "runs/$story/dedistill"
python tools/cfg_sweep.py "recipes/$story/dedistill.toml" "${averages[@]}" >"runs/$story/averages.log" 2>&1 &
sweep=$!
echo "6/6 report"
claims=0
run python -m lab.story "recipes/$story" --out "runs/$story/report" --prompts "$prompts" || claims=$?
wait "$sweep" || { cat "runs/$story/averages.log" >&2; exit 1; }
sweep=""
echo "averages: runs/$story/dedistill/sweep/index.html"
exit "$claims"
