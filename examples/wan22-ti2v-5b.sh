#!/usr/bin/env bash
# Wan2.2 TI2V-5B: one expert; some prompts begin with an image, others do not. LoRA, OCR reward, one GPU of 80 GB.
# Never validated by us on the real model.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
MODEL=${MODEL:-Wan-AI/Wan2.2-TI2V-5B-Diffusers}
RUN=${RUN:-runs/wan22-ti2v-5b}
ITERATIONS=${ITERATIONS:-100}
. "$here/common.sh"

begin wan22-ti2v-5b "rollout.prompts=$here/prompts/ti2v.jsonl" "eval.prompts=$here/prompts/ti2v-eval.jsonl"
rushes loop "$RUN" --iterations "$ITERATIONS"
rushes eval "$RUN" --iteration 0 --iteration "$ITERATIONS"
