#!/usr/bin/env bash
# The same on four GPUs: rollout and score are shared by four workers, which take most of the time. Training itself
# still runs on one GPU: rushes does not train one policy on several GPUs yet.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
MODEL=${MODEL:-Wan-AI/Wan2.1-T2V-1.3B-Diffusers}
RUN=${RUN:-runs/wan21-1.3b-ocr-4gpu}
ITERATIONS=${ITERATIONS:-100}
GPUS=${GPUS:-4}
. "$here/common.sh"

begin wan21-1.3b "rollout.prompts=$here/prompts/ocr.txt" "eval.prompts=$here/prompts/ocr-eval.txt"
shared_loop
rushes eval "$RUN" --iteration 0 --iteration "$ITERATIONS"
