#!/bin/bash
# submit.sh RUN FIRST LAST: queue these iterations, each behind the one before; SAMPLE, TRAIN: more options of sbatch;
# JOB=experts.sbatch: the two experts at once
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
run=$1 first=$2 last=$3
read -ra sample <<<"${SAMPLE:-}"
read -ra train <<<"${TRAIN:-}"
after=()
for ((k = first; k <= last; k++)); do
  sampled=$(sbatch --parsable --kill-on-invalid-dep=yes "${sample[@]}" "${after[@]}" "$here/sample.sbatch" "$run" "$k")
  trained=$(sbatch --parsable --kill-on-invalid-dep=yes "${train[@]}" --dependency="afterany:${sampled%%;*}" \
    "$here/${JOB:-train.sbatch}" "$run" "$k")
  after=(--dependency="afterok:${trained%%;*}")
done
