#!/usr/bin/env bash
# Runs a job on a GKE cluster through xpk: one slice or several, spot or on demand.
#
#   [SETTINGS=FILE] launch/gke.sh [--dry-run] COMMAND
#
#   create    make the cluster with its TPU slices
#   start     submit the job; GKE restarts it if it ends with status 75 or loses its nodes
#   status    the cluster's jobs, and the pods of this one
#   logs      follow the log of process 0
#   errors    the end of the log of every pod that failed
#   stop      delete the job: sends SIGTERM, then leaves it GRACE seconds to save
#   collect   fetch the run's records to runs/NAME, without the checkpoints
#   delete    delete the cluster
#
# --dry-run prints every command and runs none. Settings: launch/settings.example.sh.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

read_settings "${SETTINGS:-$here/settings.sh}"
need NAME PROJECT ZONE ACCELERATOR PROVISIONING SLICES CONFIG SHARED WORKDIR CLUSTER MAX_RESTARTS
where=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")
pods=xpk.google.com/workload=$NAME

create() {
  local command=(xpk cluster create "${where[@]}" --tpu-type="$ACCELERATOR" --num-slices="$SLICES")
  case $PROVISIONING in
    spot) command+=(--spot) ;;
    on-demand) command+=(--on-demand) ;;
    *) fail "PROVISIONING=$PROVISIONING must be spot or on-demand on GKE" ;;
  esac
  call "${command[@]}"
}

# Copies the files that git tracks into a folder of their own: xpk makes an image of the whole folder it is given.
start() {
  local job command sent=/tmp/opd-$NAME
  # exec: SIGTERM then reaches Python, and the container exits with Python's status.
  job="exec python -m opd_jax.train $(quoted --config="$CONFIG" --workdir="$WORKDIR" "${CONFIG_ARGS[@]}")"
  command=(xpk workload create "${where[@]}" --workload="$NAME"
    --tpu-type="$ACCELERATOR" --num-slices="$SLICES"
    --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes="$PREEMPTED"
    --termination-grace-period-seconds="$GRACE"
    --env="JAX_COMPILATION_CACHE_DIR=$COMPILE_CACHE" --env=PYTHONUNBUFFERED=1)
  if [[ -n $STORAGE ]]; then command+=(--storage="$STORAGE"); fi
  if [[ -n $IMAGE ]]; then
    command+=(--docker-image="$IMAGE")
  else
    need_sent
    git -C "$here/.." ls-files -z >"$sent.list"
    if [[ -z $DRY_RUN ]]; then rm -rf "$sent"; fi
    call mkdir -p "$sent"
    call tar -C "$here/.." --null -cf "$sent.tar" -T "$sent.list"
    call tar -C "$sent" -xf "$sent.tar"
    command+=(--base-docker-image="$BASE_IMAGE" --script-dir="$sent")
    job="pip install --quiet -e '.[tpu,demo]' && $job"
  fi
  call "${command[@]}" --command="$job"
}

status() {
  call xpk workload list "${where[@]}" --filter-by-job="$NAME"
  call kubectl get pods --selector="$pods"
}

# Process 0 is the first pod of the first slice.
logs() {
  local first=jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
  call kubectl logs --follow --selector="$pods,$first" --tail=100
}

errors() {
  local failed pod
  local command=(kubectl get pods --selector="$pods" --field-selector=status.phase=Failed --output=name)
  if [[ -n $DRY_RUN ]]; then
    quoted "${command[@]}"
    failed=pod/POD
  else
    failed=$("${command[@]}")
  fi
  for pod in $failed; do call kubectl logs "$pod" --tail=30 --prefix; done
}

stop() { call xpk workload delete "${where[@]}" --workload="$NAME" --force; }

collect() {
  need SHARED_URL
  [[ $WORKDIR == "$SHARED"/* ]] || fail "WORKDIR=$WORKDIR is not in SHARED=$SHARED; collect it yourself"
  call mkdir -p "$here/../runs/$NAME"
  call gcloud storage rsync --recursive --exclude='^checkpoints/' \
    "$SHARED_URL${WORKDIR#"$SHARED"}" "$here/../runs/$NAME"
}

delete() { call xpk cluster delete "${where[@]}" --force; }

case ${1:-} in
  create | start | status | logs | errors | stop | collect | delete) "$1" ;;
  *) fail "launch/gke.sh [--dry-run] create|start|status|logs|errors|stop|collect|delete" ;;
esac
