"""Test set-up: CPU with eight virtual devices, and rank promotion is an error."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
