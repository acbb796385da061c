#!/usr/bin/env bash
# One TPU VM worker's part; launch/tpu.sh copies the project there and calls this over ssh.
#
#   launch/worker.sh setup | start | status | errors | log | stop | pack
#
# The job is a systemd unit: it outlives the ssh connection, gets SIGTERM when the VM is shut down, and is
# started again where it ends with status 75 (told to stop, and saved).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"
read_settings "$here/settings.sh"
need NAME CONFIG SHARED WORKDIR

unit=opd-$NAME
log=$HOME/$unit.log
venv=$HOME/opd-venv

setup() {
  if [[ -n $MOUNT_COMMAND ]] && ! mountpoint -q "$SHARED"; then
    sudo mkdir -p "$SHARED"
    sudo chown "$(id -u)" "$SHARED"
    bash -c "$MOUNT_COMMAND"
  fi
  mkdir -p "$WORKDIR"
  python3 -m pip install --user --quiet --upgrade uv
  [[ -x $venv/bin/python ]] || python3 -m uv venv --quiet --python "$PYTHON_VERSION" "$venv"
  python3 -m uv pip install --quiet --python "$venv/bin/python" -e "$here/..[tpu,demo]"
  "$venv/bin/python" -c 'import opd_jax, libtpu'
  echo "$(hostname): ready"
}

# state: absent, running, done, or failed:STATUS.
state() {
  local active sub code
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
  if [[ $(state) == running ]]; then
    echo "$(hostname): running already"
    return
  fi
  sudo systemctl stop "$unit" 2>/dev/null || true # one that is done stays until it is stopped
  sudo systemctl reset-failed "$unit" 2>/dev/null || true
  # RemainAfterExit keeps a unit that is done apart from one that never was.
  sudo systemd-run --unit="$unit" --uid="$(id -u)" --working-directory="$here/.." \
    --property=RestartForceExitStatus="$PREEMPTED" --property=RestartSec=5 \
    --property=RemainAfterExit=yes --property=TimeoutStopSec="$GRACE" --property=LimitMEMLOCK=infinity \
    --property=StandardOutput="append:$log" --property=StandardError="append:$log" \
    --setenv=HOME="$HOME" --setenv=PYTHONUNBUFFERED=1 --setenv=JAX_COMPILATION_CACHE_DIR="$COMPILE_CACHE" \
    "$venv/bin/python" -m opd_jax.train --config="$CONFIG" --workdir="$WORKDIR" "${CONFIG_ARGS[@]}"
  echo "$(hostname): started"
}

# errors: the end of the log where the job failed here.
errors() {
  local now
  now=$(state)
  if [[ $now == failed:* ]]; then
    tail -n 30 "$log" | sed "s/^/[$(hostname)] /"
    echo "[$(hostname)] ended with status ${now#failed:}"
  fi
}

# pack: an archive of the run's records and this worker's log, without the checkpoints; prints its path.
pack() {
  local archive=/tmp/$unit-records.tar.gz
  cp "$log" "$WORKDIR/worker0.log"
  tar -C "$(dirname "$WORKDIR")" --exclude=checkpoints -czf "$archive" "$(basename "$WORKDIR")"
  echo "$archive"
}

case ${1:-} in
  setup | start | errors | pack) "$1" ;;
  status) echo "status $(hostname) $(state)" ;;
  log) exec tail -n "${2:-100}" -F "$log" ;;
  stop) sudo systemctl stop "$unit" && echo "$(hostname): stopped" ;;
  *) fail "$(basename "$0") setup | start | status | errors | log | stop | pack" ;;
esac
