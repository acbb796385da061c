"""A process that keeps the memory it frees."""

import sys
import textwrap

import pytest

from opd_jax.parallel import memory
from tests import tiny


def test_memory_is_left_alone_beside_an_accelerator_and_without_glibc(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(memory, "ACCELERATORS", ("/dev/null",))  # a file that is there
    assert not memory.keep()
    monkeypatch.setattr(memory, "ACCELERATORS", ())
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("musl", "1.2"))
    assert not memory.keep()


@pytest.mark.skipif(memory.platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_an_entry_maps_no_page_of_a_programs_temporaries_again():
    """They are 64 MB here, 16,384 pages; given back, they are mapped anew at every call.

    On a busy machine a call may begin before the last one's memory is free, so a single call must show it.
    """
    code = """
        import resource, sys

        sys.argv[0] = "-m"  # as Python has it while it looks for opd_jax.train
        import opd_jax

        import jax
        import jax.numpy as jnp

        program = jax.jit(lambda x: (jnp.sin(x) @ jnp.ones((1024, 1024))).sum())
        x = jnp.ones((16, 1024, 1024))
        faults = []
        for _ in range(12):
            jax.block_until_ready(program(x))
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        print(min(after - before for before, after in zip(faults[-9:], faults[-8:])))
    """
    done = tiny.entry(textwrap.dedent(code), command=(sys.executable, "-c"), env={"GLIBC_TUNABLES": ""})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000
