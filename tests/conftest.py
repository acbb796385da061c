"""Test set-up: CPU with eight virtual devices, and rank promotion is an error."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with tests.tiny's pair, saved as Hugging Face folders student and teacher."""
    from tests import tiny  # after jax is configured

    folder = tmp_path_factory.mktemp("models")
    tiny.save_pair(folder)
    return folder
