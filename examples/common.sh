# What the example scripts share. MODEL, RUN, ITERATIONS and SETS come from the environment; every script has defaults.

# --set options of SETS, a list of section.key=value separated by blanks: SETS="rollout.steps=16 train.kl_beta=0.01"
sets=()
for setting in ${SETS:-}; do sets+=(--set "$setting"); done

# begin PRESET [section.key=value …]: make the run, unless it exists already; then every script goes on where it stopped
begin() {
  local preset=$1 own=() setting
  shift
  for setting in "model.path=$MODEL" "$@"; do own+=(--set "$setting"); done
  [ -e "$RUN/run.toml" ] || rushes init "$RUN" --preset "$preset" "${own[@]}" "${sets[@]}"
}

# everywhere COMMAND …: one worker on each of $GPUS GPUs; exit code 75 says "nothing left for me, others still at work"
everywhere() {
  local worker pids=() code
  for ((worker = 0; worker < GPUS; worker++)); do
    CUDA_VISIBLE_DEVICES=$worker rushes "$@" --worker "$worker/$GPUS" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    [ "$code" = 0 ] || [ "$code" = 75 ] || return "$code"
  done
}

# shared_loop: rollout and score on all GPUs, training on the first one (training does not share a GPU's work yet)
shared_loop() {
  local k
  for ((k = 0; k < ITERATIONS; k++)); do
    everywhere rollout "$RUN" --iteration "$k"
    everywhere score "$RUN" --iteration "$k"
    rushes score "$RUN" --iteration "$k" # writes the advantages, if the last worker has not
    CUDA_VISIBLE_DEVICES=0 rushes train "$RUN" --iteration "$k"
  done
}
