"""Test set-up: CPU with eight virtual devices, programs compiled once, and rank promotion is an error."""

import atexit
import gc
import importlib.util
import os
import platform
import shutil
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["JAX_PLATFORMS"] = "cpu"  # what tests start too, where the TPU compiler is installed
# Every process of a test session, pytest's workers and what they start, reads what another has compiled.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="opd_jax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

from tests import slow

# Programs here are small and run a few times: what compiles them fastest, not what makes them fast. Set
# before XLA first reads it, for what tests start too.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"  # each worker has about one core
if jax.__version_info__ < (0, 11):  # jax 0.12 has no such flag
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# What JAX traces is millions of small objects that stay: looking through them took a seventh of the time.
gc.set_threshold(100_000, 50, 1000)

# Files of twenty seconds and more, the longest first: one that is begun last leaves the other workers idle.
LONGEST = (
    "test_notebooks",
    "test_sweep",
    "test_train",
    "test_tpu",
    "test_meshes",
    "test_train_step",
    "test_pod",
    "test_docs",
    "test_rollout",
    "test_few_rows",
    "test_preflight",
    "test_segments",
    "test_parity",
    "test_bench",
    "test_grading",
    "test_benchmarks",
    "test_look",
)


def pytest_collection_modifyitems(items):
    """Orders the files, which make test has pytest-xdist keep, and marks the slow tests."""
    rank = {name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))
    listed = set(slow.FILE.read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid.partition("[")[0] in listed:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """Modules and tests stay to the end too."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with tests.tiny's pair, saved as Hugging Face folders student and teacher."""
    from tests import tiny  # after jax is configured

    folder = tmp_path_factory.mktemp("models")
    tiny.save_pair(folder)
    return folder


@pytest.fixture(scope="session")
def tpu_compiler():
    """The TPU compiler: needed on Linux x86_64, where it exists, and skipped elsewhere."""
    if importlib.util.find_spec("libtpu") is None:
        if (sys.platform, platform.machine()) != ("linux", "x86_64"):
            pytest.skip("there is no TPU compiler for this machine")
        pytest.fail("the TPU compiler is not installed: pip install -e '.[test,tpu]', as make test does")
