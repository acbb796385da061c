#!/usr/bin/env bash
# Runs a job on TPU VMs: one slice or several, spot or on demand.
#
#   [SETTINGS=FILE] launch/tpu.sh [--dry-run] COMMAND
#
#   run       create, setup, start and watch. Requests a lost slice again, retries what fails, and continues the
#             job from its newest checkpoint. If the job runs already, only watches it
#   create    request the slices (a queued resource) and wait for them
#   setup     copy the project to every worker and install it there
#   start     start the job on every worker; it does not depend on this connection
#   watch     wait for the end of the job; exit status 0 done, 1 failed or stopped, 3 slices gone, 4 job lost
#   status    state of the slices and of the job on every worker
#   logs      follow the log of process 0
#   errors    the end of the log of every worker whose job failed
#   stop      send SIGTERM to every worker; the job saves and ends
#   collect   fetch the run's records and the log of process 0 to runs/NAME, without the checkpoints
#   delete    give the slices back
#
# --dry-run prints every command and runs none. Settings: launch/settings.example.sh.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

settings=${SETTINGS:-$here/settings.sh}
read_settings "$settings"
need NAME PROJECT ZONE ACCELERATOR RUNTIME PROVISIONING SLICES CONFIG SHARED WORKDIR POLL MAX_RESTARTS
[[ $SLICES =~ ^[1-9][0-9]*$ ]] || fail "SLICES=$SLICES must be 1 or more"
where=(--project="$PROJECT" --zone="$ZONE")
archive=/tmp/opd-$NAME.tar.gz
exec 3>&1 # a dry run prints here the commands whose output the script reads

# The TPU VMs of the queued resource: NAME for one slice; NAME-0, NAME-1, ... for several.
nodes=("$NAME")
if ((SLICES > 1)); then
  nodes=()
  for ((i = 0; i < SLICES; i++)); do nodes+=("$NAME-$i"); done
fi

# on WORKERS NODE COMMAND: runs a command on workers of one slice. Output lines keep their order of arrival. The last
# word of COMMAND is a command of worker.sh; a dry run also prints what worker.sh would do.
on() {
  call gcloud compute tpus tpu-vm ssh "$2" "${where[@]}" --worker="$1" --command="$3" || return
  if [[ -n $DRY_RUN ]]; then
    # shellcheck disable=SC2016  # the worker's own
    SETTINGS=$settings HOME='$HOME' bash "$here/worker.sh" --dry-run "${3##* }" | sed 's/^/  on the worker: /'
  fi
}

# everywhere COMMAND: runs a command on every worker of every slice, on all slices at the same time.
everywhere() {
  local node pids=() pid status=0
  for node in "${nodes[@]}"; do
    if [[ -n $DRY_RUN ]]; then
      on all "$node" "$1"
    else
      on all "$node" "$1" &
      pids+=($!)
    fi
  done
  for pid in "${pids[@]+"${pids[@]}"}"; do wait "$pid" || status=$?; done
  return "$status"
}

# slice_state: prints ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; ABSENT if there is no such queued resource.
slice_state() {
  local command=(gcloud compute tpus queued-resources list "${where[@]}"
    --filter="name~/$NAME\$" --format="value(state.state)") found
  if [[ -n $DRY_RUN ]]; then
    quoted "${command[@]}" >&3
    echo "${ASSUME:-ACTIVE}"
  else
    found=$("${command[@]}") || return 1
    echo "${found:-ABSENT}"
  fi
}

# look: sets `now` to slice_state. If the query fails, tries again after POLL seconds. Fails if the very first query
# fails, or 30 in a row.
now=
seen=
look() {
  local tries
  for ((tries = 0; tries < 30; tries++)); do
    if now=$(slice_state); then
      seen=1
      return
    fi
    [[ -n $seen ]] || break
    sleep "$POLL"
  done
  fail "gcloud cannot list the queued resources of $PROJECT in $ZONE"
}

request() {
  local command=(gcloud compute tpus queued-resources create "$NAME" "${where[@]}"
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME")
  if ((SLICES > 1)); then
    command+=(--node-count="$SLICES" --node-prefix="$NAME")
  else
    command+=(--node-id="$NAME")
  fi
  case $PROVISIONING in
    spot) command+=(--spot) ;;
    reserved) command+=(--reserved) ;;
    on-demand) ;;
    *) fail "PROVISIONING=$PROVISIONING must be spot, on-demand or reserved" ;;
  esac
  if [[ -n $VALID_FOR ]]; then command+=(--valid-until-duration="$VALID_FOR"); fi
  if [[ -n $NETWORK ]]; then command+=(--network="$NETWORK"); fi
  if [[ -n $SUBNETWORK ]]; then command+=(--subnetwork="$SUBNETWORK"); fi
  if [[ -n $SERVICE_ACCOUNT ]]; then command+=(--service-account="$SERVICE_ACCOUNT"); fi
  call "${command[@]}"
}

# create: waits until the slices are there. Deletes a suspended request and makes it again. Does the same with a failed
# request if it had been granted before. Status 4: a gcloud command failed.
granted=
create() {
  local before=
  while true; do
    ASSUME=ABSENT look
    if [[ $now != "$before" && -z $DRY_RUN ]]; then echo "$(date +%T) $NAME: $now" >&2; fi
    before=$now
    case $now in
      ACTIVE)
        granted=1
        return
        ;;
      ABSENT) request || return 4 ;;
      SUSPENDED | FAILED)
        call gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format="yaml(state)" >&2 || true
        if [[ $now == FAILED && -z $granted ]]; then
          fail "the request for $NAME FAILED, as said above; fix the settings, then: launch/tpu.sh delete"
        fi
        delete || return 4
        call sleep "$POLL"
        ;;
      *) call sleep "$POLL" ;;
    esac
    if [[ -n $DRY_RUN ]]; then return; fi
  done
}

# Sends the files that git tracks, and the settings.
setup() {
  local node list
  need_sent
  list=$(mktemp)
  git -C "$here/.." ls-files -z >"$list" || return 4
  call tar -C "$here/.." --null -czf "$archive" -T "$list" || return 4
  rm -f "$list"
  for node in "${nodes[@]}"; do
    call gcloud compute tpus tpu-vm scp "$archive" "$settings" "$node:/tmp/" "${where[@]}" --worker=all || return 4
  done
  everywhere "mkdir -p opd_jax && tar -xzf $archive -C opd_jax && mv /tmp/$(basename "$settings") \
opd_jax/launch/settings.sh && bash opd_jax/launch/worker.sh setup" || return 4
}

start() { everywhere "bash opd_jax/launch/worker.sh start" || return 4; }

# job_states: prints a line for each worker that can be reached. A worker without the scripts has no job.
job_states() {
  # shellcheck disable=SC2016  # the worker's own
  everywhere '[ ! -e opd_jax/launch/worker.sh ] && echo "status $(hostname) absent" || bash opd_jax/launch/worker.sh status'
}

# states_of LINES: prints the distinct states in the output of job_states, sorted, with a space after each.
states_of() { awk '$1 == "status" { sub(/:.*/, "", $3); print $3 }' <<<"$1" | sort -u | tr '\n' ' '; }

# watch: waits until the job ends. Status: 0 done, 1 failed or stopped, 3 the slices are gone, 4 a worker has lost its
# job, for example after a reboot.
watch() {
  local lines states
  while true; do
    look
    if [[ $now != ACTIVE ]]; then return 3; fi
    # Right after a preemption the state may still be ACTIVE although the workers cannot be reached.
    lines=$(job_states) || lines=
    if [[ -n $DRY_RUN ]]; then
      echo "$lines"
      return
    fi
    states=$(states_of "$lines")
    case $states in
      "done ") return ;;
      "absent ") fail "no job runs on $NAME; start it with: launch/tpu.sh start" ;;
      *absent*)
        echo "$(date +%T) $NAME: some workers have lost the job; launch/tpu.sh run starts it on all again" >&2
        return 4
        ;;
      *failed*)
        errors >&2 || true
        return 1
        ;;
      "") echo "$(date +%T) $NAME: the workers cannot be reached" >&2 ;;
    esac
    sleep "$POLL"
  done
}

errors() { everywhere "bash opd_jax/launch/worker.sh errors"; }

# once: gets the slices, starts the job and waits for its end. Sends files only if the job does not run already.
# `run` calls this as `once || ...`, and there bash ignores `set -e`. So each command handles its own failure.
once() {
  local lines states
  create || return
  lines=$(job_states) || true
  if [[ -n $DRY_RUN ]]; then
    echo "$lines"
    lines="status a-worker absent"
  fi
  states=$(states_of "$lines")
  if [[ -z $states ]]; then
    echo "$(date +%T) $NAME: the workers cannot be reached" >&2
    return 4
  fi
  if [[ $states != "running " ]]; then
    if [[ $states == *running* ]]; then stop || true; fi # a worker without the job has nothing to stop
    setup && start || return 4
  fi
  watch
}

run() {
  local status restarts=0
  while true; do
    status=0
    once || status=$?
    ((status == 3 || status == 4)) || return "$status"
    ((++restarts <= MAX_RESTARTS)) || fail "$NAME was lost $restarts times (MAX_RESTARTS=$MAX_RESTARTS)"
    if ((status == 3)); then
      echo "$(date +%T) $NAME was taken away; asking for it again ($restarts of $MAX_RESTARTS)" >&2
    else
      echo "$(date +%T) $NAME: that did not work; trying again ($restarts of $MAX_RESTARTS)" >&2
      sleep "$POLL"
    fi
  done
}

status() {
  look
  if [[ -z $DRY_RUN ]]; then echo "$NAME: $now"; fi
  job_states
}

logs() { on 0 "${nodes[0]}" "bash opd_jax/launch/worker.sh log"; }

stop() { everywhere "bash opd_jax/launch/worker.sh stop"; }

collect() {
  local packed=/tmp/opd-$NAME-records.tar.gz
  on 0 "${nodes[0]}" "bash opd_jax/launch/worker.sh pack"
  call gcloud compute tpus tpu-vm scp "${nodes[0]}:$packed" "$packed" "${where[@]}" --worker=0
  call mkdir -p "$here/../runs"
  call tar -C "$here/../runs" -xzf "$packed"
}

delete() { call gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet; }

case ${1:-} in
  run | create | setup | start | watch | status | logs | errors | stop | collect | delete) "$1" ;;
  *) fail "launch/tpu.sh [--dry-run] run|create|setup|start|watch|status|logs|errors|stop|collect|delete" ;;
esac
