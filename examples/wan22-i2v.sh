#!/usr/bin/env bash
# Wan2.2 I2V-A14B: every prompt brings its first frame (JSON lines with `image`), of exactly the size of the video.
# Both experts, LoRA, OCR reward, one GPU of 80 GB. Never validated by us on the real model.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
MODEL=${MODEL:-Wan-AI/Wan2.2-I2V-A14B-Diffusers}
RUN=${RUN:-runs/wan22-i2v}
ITERATIONS=${ITERATIONS:-100}
. "$here/common.sh"

begin wan22-i2v "rollout.prompts=$here/prompts/i2v.jsonl" "eval.prompts=$here/prompts/i2v-eval.jsonl"
rushes loop "$RUN" --iterations "$ITERATIONS"
rushes eval "$RUN" --iteration 0 --iteration "$ITERATIONS"
