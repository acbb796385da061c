# shellcheck shell=bash disable=SC2034
# All settings of the launch scripts. Copy this file and fill it in:
#
#   cp launch/settings.example.sh launch/settings.sh
#   launch/tpu.sh run                                    # reads launch/settings.sh
#   SETTINGS=launch/other.sh launch/tpu.sh run           # reads another file
#
# Do not put secrets here: the file is copied to the workers. The scripts use the account that `gcloud` is logged
# into on this machine. The workers use the service account of their VM.

# ---- The run
# Name of the slice, of the job and of the run's folder: lower-case letters, digits and hyphens.
NAME=opd-first
# What to run: a config file, and the fields to change in it.
CONFIG=configs/demo.py
CONFIG_ARGS=(
  --config.student.path=/shared/models/Qwen3-1.7B
  --config.teacher.path=/shared/models/Qwen3-8B
)
# A folder that every worker sees under the same path. It holds models, runs and compiled programs.
SHARED=/shared
# The command that mounts SHARED. It runs on each worker on which SHARED is not a mount point yet; "" if the workers
# have the folder already.
#   Filestore (NFS):                       sudo mount -t nfs 10.0.0.2:/opd /shared
#   a bucket with hierarchical namespace:  gcsfuse --implicit-dirs --rename-dir-limit=200000 my-bucket /shared
MOUNT_COMMAND='sudo mount -t nfs 10.0.0.2:/opd /shared'
# Folder of the run.
WORKDIR=$SHARED/runs/$NAME
# Folder for compiled programs, so that a restart does not compile again.
COMPILE_CACHE=$SHARED/compiled
# Seconds that a process has to save after it was told to stop. Then it is killed. A spot VM leaves about 30.
GRACE=300
# Python version of the workers' environment.
PYTHON_VERSION=3.12

# ---- Where
PROJECT=
# A zone that has the accelerator, such as us-west4-a.
ZONE=
# TPU VMs: the accelerator type and the runtime version, as listed by `gcloud compute tpus accelerator-types list`
# and `gcloud compute tpus versions list`. Pairs: v5litepod-16 and v2-alpha-tpuv5-lite, v5p-128 and
# v2-alpha-tpuv5, v6e-64 and v2-alpha-tpuv6e.
ACCELERATOR=v5litepod-16
RUNTIME=v2-alpha-tpuv5-lite
# spot (cheapest, may be taken away), on-demand, or reserved (TPU VMs only).
PROVISIONING=spot
# Number of slices of this accelerator in one run. If you set --config.mesh.data, it must be a multiple of SLICES.
SLICES=1
# How long a request may wait in the queue, such as 6h; "" for no limit.
VALID_FOR=
# Network, subnetwork and service account (its e-mail address) of the VMs; "" for the project's default.
NETWORK=
SUBNETWORK=
SERVICE_ACCOUNT=

# ---- Watching (launch/tpu.sh run)
# Seconds between two status queries, and before a retry.
POLL=60
# Limit of all retries together: slices that were taken away, and commands that failed. On GKE: restarts of the job.
MAX_RESTARTS=100

# ---- GKE (launch/gke.sh)
# Name of the cluster.
CLUSTER=opd
# Container image with opd_jax and jax[tpu] installed. "" sends this folder on top of BASE_IMAGE and installs it at
# every start.
IMAGE=
BASE_IMAGE=python:3.12
# Name of the cluster's `xpk storage` that is mounted at SHARED.
STORAGE=opd-shared
# SHARED as a URL, for `launch/gke.sh collect`; "" if you collect the results yourself.
SHARED_URL=gs://my-bucket
