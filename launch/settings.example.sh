# shellcheck shell=bash disable=SC2034
# Every setting of the launch scripts. Copy this file, fill it in, and name it in SETTINGS:
#
#   cp launch/settings.example.sh launch/settings.sh
#   SETTINGS=launch/settings.sh launch/tpu.sh run        # launch/settings.sh is where they look by themselves
#
# Nothing here is secret, and nothing secret belongs here: the scripts use whatever account `gcloud` is logged
# into on this machine, and the workers use the service account of their VM. The file is copied to the workers.

# ---- The run
# Name of the slice, the job and the run's folder: lower case letters, digits and hyphens.
NAME=opd-first
# What to run: a file of configs/, and fields of it to change.
CONFIG=configs/default.py
CONFIG_ARGS=(
  --config.student.path=/shared/models/Qwen3-1.7B
  --config.teacher.path=/shared/models/Qwen3-8B
)
# A folder that every worker sees under the same path: models, runs and compiled programs live there.
SHARED=/shared
# The one command that brings it there, run on each worker where SHARED is no mount point yet; "" where the
# workers have it already. Filestore (NFS):  sudo mount -t nfs 10.0.0.2:/opd /shared
# A bucket with hierarchical namespace:      gcsfuse --implicit-dirs --rename-dir-limit=200000 my-bucket /shared
MOUNT_COMMAND='sudo mount -t nfs 10.0.0.2:/opd /shared'
# Folder of the run.
WORKDIR=$SHARED/runs/$NAME
# Where compiled programs are kept, so that a restart does not compile again.
COMPILE_CACHE=$SHARED/compiled
# Seconds a process has to save after it was told to stop, before it is killed. A spot VM leaves about 30.
GRACE=300
# Python version of the workers' environment.
PYTHON_VERSION=3.12

# ---- Where
PROJECT=
# A zone that has the accelerator, such as us-west4-a.
ZONE=
# TPU VMs: accelerator type and runtime version, as `gcloud compute tpus accelerator-types list` and
# `... tpus versions list` name them. v5litepod-16 (v2-alpha-tpuv5-lite), v5p-128 (v2-alpha-tpuv5),
# v6e-64 (v2-alpha-tpuv6e).
ACCELERATOR=v5litepod-16
RUNTIME=v2-alpha-tpuv5-lite
# spot (cheapest, may be taken away), on-demand, or reserved.
PROVISIONING=spot
# Slices of this accelerator in one run; a --config.mesh.data of your own must be a multiple of it.
SLICES=1
# How long a request waits in the queue, such as 6h; "" waits for ever.
VALID_FOR=
# Network, subnetwork and service account (its e-mail address) of the VMs; "" takes the project's default.
NETWORK=
SUBNETWORK=
SERVICE_ACCOUNT=

# ---- Watching (launch/tpu.sh run)
# Seconds between looks at the slice and the job.
POLL=60
# How often a slice that was taken away is asked for again.
MAX_RESTARTS=100

# ---- GKE (launch/gke.sh)
# Name of the cluster.
CLUSTER=opd
# Container image with opd_jax and jax[tpu] installed; "" sends this folder on top of BASE_IMAGE and installs
# it at every start.
IMAGE=
BASE_IMAGE=python:3.12
# Name of an `xpk storage` of the cluster that is mounted at SHARED.
STORAGE=opd-shared
# The same folder as a URL, to collect from; "" leaves it to you.
SHARED_URL=gs://my-bucket
