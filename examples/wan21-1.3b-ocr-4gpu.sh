#!/usr/bin/env bash
# The same on four GPUs of one machine: four ranks of torchrun share rollout and score, and train one policy together.
# Never validated by us on the real model.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
MODEL=${MODEL:-Wan-AI/Wan2.1-T2V-1.3B-Diffusers}
RUN=${RUN:-runs/wan21-1.3b-ocr-4gpu}
ITERATIONS=${ITERATIONS:-100}
GPUS=${GPUS:-4}
. "$here/common.sh"

begin wan21-1.3b "rollout.prompts=$here/prompts/ocr.txt" "eval.prompts=$here/prompts/ocr-eval.txt"
together loop "$RUN" --iterations "$ITERATIONS"
together eval "$RUN" --iteration 0 --iteration "$ITERATIONS"
