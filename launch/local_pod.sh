#!/usr/bin/env bash
# Runs a pod on one machine: N processes of one entry point, with 4 virtual CPU devices each, joined by gloo.
#
#   launch/local_pod.sh [--dry-run] N [MODULE] --config=FILE --workdir=DIR ...
#
#   launch/local_pod.sh 2 --config=configs/demo.py --workdir=runs/pod
#   launch/local_pod.sh 2 opd_jax.evaluate --workdir=runs/pod
#
# MODULE is opd_jax.train by default. Process 0 prints here. If another process fails, the end of its output
# is shown. SIGTERM and SIGINT reach every process. The exit status is that of the first process that failed:
# 75 if the run was told to stop and can continue.
#
# Environment: PYTHON is the interpreter (default: .venv/bin/python if it exists, else python3), DEVICES the
# number of devices a process (default: 4), PORT the port that the processes meet on (default: a free one).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }

[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || fail "how many processes? $(usage)"
processes=$1
shift
module=opd_jax.train
if [[ $# -gt 0 && $1 != -* ]]; then
  module=$1
  shift
fi
cd "$here/.."
if [[ -z ${PYTHON:-} ]]; then
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
if [[ -z ${PORT:-} ]]; then
  PORT=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
fi

# command_of I ARGUMENT...: sets `command` to the command of process I. It inherits the rest of the environment.
command_of() {
  command=(env
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="${DEVICES:-4}" JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
    JAX_COORDINATOR_ADDRESS="localhost:$PORT" JAX_NUM_PROCESSES="$processes" JAX_PROCESS_ID="$1"
    "$PYTHON" -m "$module" "${@:2}")
}

if [[ -n $DRY_RUN ]]; then
  for ((i = 0; i < processes; i++)); do
    command_of "$i" "$@"
    quoted "${command[@]}"
  done
  exit 0
fi

logs=$(mktemp -d)
pids=()
told=
# shellcheck disable=SC2329  # called by the trap
tell() {
  told=1
  kill -TERM "${pids[@]}" 2>/dev/null || true
}
trap 'rm -rf "$logs"' EXIT
trap tell TERM INT
for ((i = 0; i < processes; i++)); do
  command_of "$i" "$@"
  if ((i == 0)); then
    "${command[@]}" &
  else
    "${command[@]}" >"$logs/$i" 2>&1 &
  fi
  pids+=($!)
done

# The first process that fails sets the exit status. The others wait for it in a collective, so they are killed after a
# while.
status=0
left=("${pids[@]}")
while ((${#left[@]})); do
  ended=
  code=0
  wait -n -p ended "${left[@]}" || code=$?
  # A signal to this script interrupts the wait although no process has ended.
  [[ -n ${ended:-} ]] || continue
  still=()
  for pid in "${left[@]}"; do
    if [[ $pid != "$ended" ]]; then still+=("$pid"); fi
  done
  left=("${still[@]+"${still[@]}"}")
  if ((code != 0 && status == 0)); then
    status=$code
    for ((i = 1; i < processes; i++)); do
      if [[ ${pids[i]} == "$ended" ]]; then
        echo "process $i ended with status $code:" >&2
        tail -n 20 "$logs/$i" | sed "s/^/[$i] /" >&2
      fi
    done
    if [[ -z $told && $code != "$PREEMPTED" && ${#left[@]} -gt 0 ]]; then
      (
        sleep "${GRACE:-20}"
        kill -KILL "${left[@]}" 2>/dev/null || true
      ) &
    fi
  fi
done
exit "$status"
