#!/usr/bin/env bash
# Wan2.2 T2V-A14B, both experts, with VideoAlign's visual quality as the reward, on eight GPUs of 80 GB or more.
# Eight ranks of torchrun share rollout and score, and train one policy together, one expert at a time.
#   CHECKPOINT  folder of the VideoReward download     BASE  folder of Qwen2-VL-2B-Instruct
#   TEMPLATE    a VideoAlign checkout, for its prompt template
#   GROUP=8 BEST=4, or GROUP=16 BEST=8 (the default): videos of a prompt, and how many of them are trained on
#   FULL=1      all weights at 8e-6 instead of LoRA at 1e-4. An expert of 14B has 286 GB of weights, gradients, optimizer
#               and average then, which eight ranks share: 40 GB on each with the layers on their way, before
#               activations, and 540 GB on the host of all eight (`rushes plan-memory RUN --ranks 8`).
# Never validated by us on the real model.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
MODEL=${MODEL:-Wan-AI/Wan2.2-T2V-A14B-Diffusers}
RUN=${RUN:-runs/wan22-a14b-videoalign}
ITERATIONS=${ITERATIONS:-100}
GPUS=${GPUS:-8}
. "$here/common.sh"

learn=(train.learning_rate=1e-4)
[ -z "${FULL:-}" ] || learn=(train.full=true train.learning_rate=8e-6)

# of the 10 steps 1 to 4 run the high-noise expert and 5 to 8 the low-noise one; half of all 10 are trained
# (timestep_fraction 0.5 of the recipe), on both experts. Objective, rewards, clip range and optimizer are those of the
# recipe too: the clipped ratio as published, coefficients 1, 0, 0 for VQ, MQ and TA, warm-up 10, AdamW of 0.9 and 0.999.
begin wan22-a14b \
  "rollout.prompts=$here/prompts/scenes.txt" "eval.prompts=$here/prompts/scenes-eval.txt" \
  "rollout.group_size=${GROUP:-16}" "score.best_of_n=${BEST:-8}" \
  rollout.frames=33 rollout.steps=10 rollout.last_step=8 rollout.high_steps=3 rollout.low_steps=2 \
  'score.rewards={"videoalign.VQ"=1.0,"videoalign.MQ"=0.0,"videoalign.TA"=0.0}' \
  "score.options.videoalign.checkpoint=${CHECKPOINT:?set CHECKPOINT to the folder of VideoReward}" \
  "score.options.videoalign.base_model=${BASE:?set BASE to the folder of Qwen2-VL-2B-Instruct}" \
  "score.options.videoalign.template=${TEMPLATE:?set TEMPLATE to a VideoAlign checkout}" \
  "${learn[@]}" train.estimator=noise train.error_weight=derived train.proximal=0.0 train.clip_range=1e-4 \
  train.advantage_clip=5.0 train.warmup=10 train.beta1=0.9 train.beta2=0.999 train.weight_decay=1e-4
together loop "$RUN" --iterations "$ITERATIONS"
together eval "$RUN" --iteration 0 --iteration "$ITERATIONS"
