#!/usr/bin/env bash
# rushes.sh RUN ITERATIONS [HOURS]: one machine without a batch system. cron starts this again and again: it resumes where
# it stopped, after a reboot too, and does nothing while the one before it still works. After HOURS it keeps what it has
# and ends, for a machine that others use during the day.
#
#   */10 * * * *     PATH=/home/me/rushes/.venv/bin:/usr/bin:/bin /home/me/rushes/examples/cron/rushes.sh /data/runs/signs 50
#   0 20 * * 1-5     …/rushes.sh /data/runs/signs 50 11
set -euo pipefail
run=$1 iterations=$2 hours=${3:-}
exec 9>>"$run/cron.log"
flock --nonblock 9 || exit 0 # the kernel frees this lock when the last process that holds it has ended
limit=()
[ -z "$hours" ] || limit=(timeout "${hours}h") # it sends SIGTERM
code=0
"${limit[@]}" rushes loop "$run" --iterations "$iterations" 2>&9 || code=$?
case $code in
  75 | 124) exit 0 ;; # stopped, or others work on it: the next one continues
  *) exit "$code" ;;  # cron mails what is printed
esac
