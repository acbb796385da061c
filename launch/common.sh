# shellcheck shell=bash
# Shared functions of the scripts in this folder. Source it, do not run it. It removes --dry-run from the script's
# arguments.

# Exit status of a run that was told to stop and saved a checkpoint: opd_jax/parallel/distributed.py, PREEMPTED.
# shellcheck disable=SC2034  # used by the scripts that source this
PREEMPTED=75
DRY_RUN=${DRY_RUN:-}
if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=1
  shift
fi

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
  echo "error: this is bash $BASH_VERSION; install bash 5.1 or newer" >&2
  exit 2
fi

# fail MESSAGE: prints one line and exits with status 2.
fail() {
  echo "error: $*" >&2
  exit 2
}

# quoted WORD...: prints the words so that a shell reads them back, with quotes only where they are needed.
quoted() {
  local word line=
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  echo "${line# }"
}

# call COMMAND...: runs the command, or prints it with --dry-run.
call() {
  if [[ -n $DRY_RUN ]]; then quoted "$@"; else "$@"; fi
}

# read_settings FILE: sources a settings file. It must contain exactly the settings of settings.example.sh.
read_settings() {
  [[ -f $1 ]] || fail "no settings file $1; copy launch/settings.example.sh there and fill it in"
  local known given name
  known=$(grep -oE '^[A-Z_]+=' "$(dirname "${BASH_SOURCE[0]}")/settings.example.sh" | tr -d '=')
  given=$(grep -oE '^[A-Z_]+=' "$1" | tr -d '=')
  for name in $given; do
    grep -qx "$name" <<<"$known" || fail "$1: $name is no setting; see launch/settings.example.sh"
  done
  for name in $known; do
    grep -qx "$name" <<<"$given" || fail "$1: $name is missing; copy its line from launch/settings.example.sh"
  done
  # shellcheck source=launch/settings.example.sh
  source "$1"
}

# need NAME...: fails if one of these settings is empty.
need() {
  local name
  for name in "$@"; do
    [[ -n ${!name:-} ]] || fail "$name is not set in the settings file; see launch/settings.example.sh"
  done
}

# need_sent: fails if CONFIG would be missing on the workers, because only files that git tracks are sent. The part
# of CONFIG after a colon is an argument of the file.
need_sent() {
  local folder
  folder=$(dirname "${BASH_SOURCE[0]}")/..
  [[ $CONFIG == /* ]] || git -C "$folder" ls-files --error-unmatch "${CONFIG%%:*}" >/dev/null 2>&1 ||
    fail "CONFIG=$CONFIG is no file that git tracks, so it would not be sent; git add it"
}
