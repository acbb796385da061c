"""When a process looks for others, and what it says where it cannot find them."""

import os
import signal
import time

import jax
import pytest

from opd_jax.errors import UserError
from opd_jax.parallel import compile_cache, distributed


@pytest.fixture
def joined(monkeypatch):
    """The arguments of every call of jax.distributed.initialize, which does nothing."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    for name in [name for name in os.environ if name.startswith(("JAX_", "TPU_", "MEGASCALE_"))]:
        monkeypatch.delenv(name)
    return calls


@pytest.fixture
def tpu_host(monkeypatch):
    """A machine with TPU chips and libtpu."""
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: ["/dev/vfio/0"] * ("vfio" in pattern))
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield
    jax.config.update("jax_platforms", before)


def test_a_lone_process_joins_nothing(joined):
    distributed.initialize()
    assert joined == []


def test_a_process_of_a_local_pod_joins_the_one_its_environment_names(joined, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    with pytest.raises(UserError, match="JAX_COORDINATOR_ADDRESS"):
        distributed.initialize()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    distributed.initialize()
    assert joined == [("localhost:1", 2, 1)]


@pytest.mark.parametrize(
    ("environment", "looks"),
    [
        ({}, True),  # a TPU VM, which asks its metadata
        ({"TPU_SKIP_MDS_QUERY": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1"}, False),  # a notebook
        ({"TPU_WORKER_HOSTNAMES": "pod-0,pod-1"}, True),  # GKE
        ({"TPU_WORKER_HOSTNAMES": "pod-0", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_a_tpu_host_looks_for_others_unless_it_is_known_to_be_alone(
    joined, tpu_host, monkeypatch, environment, looks
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert joined == [()] * looks


def test_a_tpu_host_that_is_told_to_use_its_cpu_joins_nothing(joined, tpu_host):
    jax.config.update("jax_platforms", "cpu")
    distributed.initialize()
    assert joined == []


def test_others_that_cannot_be_found_are_a_line_with_a_remedy(joined, tpu_host, monkeypatch):
    def fail():
        raise RuntimeError("no metadata")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match="no metadata.*TPU_SKIP_MDS_QUERY=1"):
        distributed.initialize()


def test_the_first_interrupt_of_a_lone_process_ends_it_after_a_step_and_the_second_at_once(capsys):
    before = signal.getsignal(signal.SIGINT)
    with distributed.Preemption() as preemption:
        assert not preemption.reached()
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.reached()
        assert "stopping after this step" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def cache_config():
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_are_kept_by_themselves_on_accelerators_only(cache_config, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache.enable("auto") is None
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert compile_cache.enable("auto") == str(tmp_path / "opd_jax" / "compiled")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "opd_jax" / "compiled")


def test_a_folder_of_ones_own_wins_and_off_is_off(cache_config, tmp_path):
    assert compile_cache.enable(str(tmp_path / "mine")) == str(tmp_path / "mine")
    assert compile_cache.enable("auto") == str(tmp_path / "mine")  # as $JAX_COMPILATION_CACHE_DIR would
    assert compile_cache.enable("off") is None
    assert not jax.config.jax_enable_compilation_cache
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="compile.cache=.*file/x: cannot make"):
        compile_cache.enable(str(tmp_path / "file" / "x"))
