#!/usr/bin/env bash
# One run on several machines: start this on each of them, with the same files at the same places and a run.out that all share.
#
#   NODES=2 HEAD=10.0.0.1 bash launch/torchrun.sh dedistill:flux_schnell [options of dedistill.train]
#
# NODES: machines (1). HEAD: address of one of them (localhost). PORT: a free port there (29500). PER_NODE: processes on each
# (its GPUs; 2 without any). JOB: a name shared by the machines of one run (dedistill).
# ACCELERATE_USE_FSDP=true FSDP_VERSION=2: the base in parts on all processes, as with launch/fsdp2.yaml.
# ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_CONFIG_FILE=launch/zero2.json (or zero3): as with launch/zero2.yaml.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: [NODES=n HEAD=address] bash launch/torchrun.sh RECIPE [options]" >&2; exit 2; }
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || :)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}  # seconds that a stop has for its step and save
exec torchrun --nnodes "${NODES:-1}" --nproc_per_node "${PER_NODE:-$((gpus ? gpus : 2))}" \
  --rdzv_backend c10d --rdzv_endpoint "${HEAD:-localhost}:${PORT:-29500}" --rdzv_id "${JOB:-dedistill}" \
  -m dedistill.train "$@"
