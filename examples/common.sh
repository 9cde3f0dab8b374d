# What the example scripts share. MODEL, RUN, ITERATIONS and SETS come from the environment; every script has defaults.

# --set options of SETS, a list of section.key=value separated by blanks: SETS="rollout.steps=16 train.kl_beta=0.01"
sets=()
for setting in ${SETS:-}; do sets+=(--set "$setting"); done

# begin PRESET [section.key=value …]: make the run, unless it exists already; so every script resumes where it stopped
begin() {
  local preset=$1 own=() setting
  shift
  for setting in "model.path=$MODEL" "$@"; do own+=(--set "$setting"); done
  [ -e "$RUN/run.toml" ] || rushes init "$RUN" --preset "$preset" "${own[@]}" "${sets[@]}"
}

# together COMMAND …: one rank on each of $GPUS GPUs of this machine. The ranks share the shards of rollout and score, and
# train one policy
together() {
  if [ "$GPUS" = 1 ]; then
    rushes "$@"
  else
    torchrun --standalone --nproc-per-node "$GPUS" --no-python rushes "$@"
  fi
}
