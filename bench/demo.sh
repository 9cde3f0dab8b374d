#!/usr/bin/env bash
# The main job on the embedded model, as a user would type it: init, loop, eval.
set -euo pipefail
run=${1:-runs/demo}
iterations=${2:-24}
rushes init "$run" --preset words
rushes loop "$run" --iterations "$iterations"
echo
echo "OCR reward on held-out prompts and seeds, deterministic sampler, before and after:"
rushes eval "$run"
echo
echo "Where to look:"
echo "  rushes inspect $run --group-by iteration         how the rewards moved"
echo "  rushes inspect $run --sort reward                every video, the worst first"
echo "  $run/iter-0000/rollout/shard-000000.tar     the first takes (tar xf; the .mp4 files play)"
echo "  tensorboard --logdir $run                        ratio, clip fraction, gradients per expert"
