#!/usr/bin/env bash
# Wan2.1 T2V-1.3B learns to write legibly: OCR reward, LoRA, one GPU of 80 GB.
# Recipe assembled from public ones (shards/presets/wan21-1.3b.toml names the sources); never validated by us on Wan.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
MODEL=${MODEL:-Wan-AI/Wan2.1-T2V-1.3B-Diffusers}
RUN=${RUN:-runs/wan21-1.3b-ocr}
ITERATIONS=${ITERATIONS:-100}
. "$here/common.sh"

begin wan21-1.3b "rollout.prompts=$here/prompts/ocr.txt" "eval.prompts=$here/prompts/ocr-eval.txt"
rushes loop "$RUN" --iterations "$ITERATIONS"
rushes eval "$RUN" --iteration 0 --iteration "$ITERATIONS"
