#!/usr/bin/env bash
# The part that runs on each TPU VM worker. launch/tpu.sh copies the project there and calls this script over ssh.
#
#   [SETTINGS=FILE] launch/worker.sh [--dry-run] setup | start | status | errors | log | stop | pack
#
# --dry-run prints every command and runs none.
# The job is a systemd unit. It does not depend on the ssh connection, gets SIGTERM when the VM is shut down, and is
# restarted if it ends with status 75 (told to stop, and saved).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"
read_settings "${SETTINGS:-$here/settings.sh}"
need NAME CONFIG SHARED WORKDIR

unit=opd-$NAME
log=$HOME/$unit.log
venv=$HOME/opd-venv

setup() {
  if [[ -n $MOUNT_COMMAND ]] && { [[ -n $DRY_RUN ]] || ! mountpoint -q "$SHARED"; }; then
    call sudo mkdir -p "$SHARED"
    call sudo chown "$(id -u)" "$SHARED"
    call bash -c "$MOUNT_COMMAND"
  fi
  call mkdir -p "$WORKDIR"
  call python3 -m pip install --user --quiet --upgrade uv
  if [[ -n $DRY_RUN || ! -x $venv/bin/python ]]; then
    call python3 -m uv venv --quiet --python "$PYTHON_VERSION" "$venv"
  fi
  call python3 -m uv pip install --quiet --python "$venv/bin/python" -e "$here/..[tpu,demo]"
  call "$venv/bin/python" -c 'import opd_jax, libtpu'
  say ready
}

# say WORD...: prints one line with the name of this worker; nothing in a dry run.
say() { if [[ -z $DRY_RUN ]]; then echo "$(hostname): $*"; fi; }

# state: prints absent, running, done, or failed:STATUS.
state() {
  local active sub code
  if [[ -n $DRY_RUN ]]; then
    call systemctl show "$unit" --property=ActiveState,SubState,ExecMainStatus
    return
  fi
  active=$(systemctl show "$unit" --property=ActiveState --value)
  sub=$(systemctl show "$unit" --property=SubState --value)
  code=$(systemctl show "$unit" --property=ExecMainStatus --value)
  case $active/$sub in
    active/exited) echo "done" ;;
    active/* | activating/* | deactivating/*) echo running ;;
    failed/*) echo "failed:$code" ;;
    *) echo absent ;;
  esac
}

start() {
  if [[ -n $DRY_RUN ]]; then
    state
  elif [[ $(state) == running ]]; then
    say running already
    return
  fi
  call sudo systemctl stop "$unit" 2>/dev/null || true # a finished unit stays until it is stopped
  call sudo systemctl reset-failed "$unit" 2>/dev/null || true
  # RemainAfterExit: a finished unit stays active/exited, so it can be told from one that never ran.
  call sudo systemd-run --unit="$unit" --uid="$(id -u)" --working-directory="$here/.." \
    --property=RestartForceExitStatus="$PREEMPTED" --property=RestartSec=5 \
    --property=RemainAfterExit=yes --property=TimeoutStopSec="$GRACE" --property=LimitMEMLOCK=infinity \
    --property=StandardOutput="append:$log" --property=StandardError="append:$log" \
    --setenv=HOME="$HOME" --setenv=PYTHONUNBUFFERED=1 --setenv=JAX_COMPILATION_CACHE_DIR="$COMPILE_CACHE" \
    "$venv/bin/python" -m opd_jax.train --config="$CONFIG" --workdir="$WORKDIR" "${CONFIG_ARGS[@]}"
  say started
}

# errors: prints the end of the log if the job failed on this worker.
errors() {
  local now
  now=$(state)
  if [[ -n $DRY_RUN ]]; then
    echo "$now"
    call tail -n 30 "$log"
    return
  fi
  if [[ $now == failed:* ]]; then
    tail -n 30 "$log" | sed "s/^/[$(hostname)] /"
    echo "[$(hostname)] ended with status ${now#failed:}"
  fi
}

# pack: makes an archive of the run's records and this worker's log, without the checkpoints, and prints its path.
pack() {
  local archive=/tmp/$unit-records.tar.gz
  call cp "$log" "$WORKDIR/worker0.log"
  call tar -C "$(dirname "$WORKDIR")" --exclude=checkpoints -czf "$archive" "$(basename "$WORKDIR")"
  if [[ -z $DRY_RUN ]]; then echo "$archive"; fi
}

case ${1:-} in
  setup | start | errors | pack) "$1" ;;
  status) if [[ -n $DRY_RUN ]]; then state; else echo "status $(hostname) $(state)"; fi ;;
  log) call tail -n "${2:-100}" -F "$log" ;;
  stop) call sudo systemctl stop "$unit" && say stopped ;;
  *) fail "$(basename "$0") [--dry-run] setup | start | status | errors | log | stop | pack" ;;
esac
