#!/usr/bin/env bash
# submit.sh RUN FIRST LAST: sample, score and train these iterations on a Kubernetes cluster, one job after another.
# IMAGE is the image that the Dockerfile makes; KUBECTL may name the client with its options. Started again, it
# continues: a job that exists is waited for, and a finished stage ends at once.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
run=$1 first=$2 last=$3
read -ra kubectl <<<"${KUBECTL:-kubectl}"

# together NAME ITERATION: start a job unless it exists, and wait for its end
together() {
  local job=rushes-$1-$2 state=
  sed -e "s|@RUN@|$run|g" -e "s|@ITERATION@|$2|g" -e "s|@IMAGE@|${IMAGE:-rushes}|g" "$here/$1.yaml" |
    "${kubectl[@]}" apply -f -
  until [[ $state == *Complete* ]]; do
    state=$("${kubectl[@]}" get job "$job" -o 'jsonpath={.status.conditions[?(@.status=="True")].type}')
    if [[ $state == *Failed* ]]; then
      echo "$job failed. Read \`${kubectl[*]} logs job/$job\`, then delete the job and start this script again." >&2
      exit 1
    fi
    [[ $state == *Complete* ]] || sleep "${PAUSE:-10}"
  done
}

for ((k = first; k <= last; k++)); do
  together sample "$k"
  together train "$k"
done
