"""Several processes as one run: how they find each other, and how they stop together.

A process belongs to a larger run if JAX_NUM_PROCESSES is set (with JAX_COORDINATOR_ADDRESS and
JAX_PROCESS_ID, as in launch/local_pod.sh), or if it is on a TPU host that may be one of many. Otherwise it
runs alone.
"""

import glob
import importlib.util
import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from opd_jax.errors import UserError, reason

# JAX stops all processes at the point after the last one that any process has reached. So the numbers of
# points go on through all runs of a process: a notice between two runs would otherwise wait for a step that
# the second run may not have.
_SYNC_POINTS = itertools.count(1)
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the run can continue later


class Preempted(SystemExit):
    """Ends the program because it was told to stop. Exit status PREEMPTED asks for a restart."""

    def __init__(self):
        super().__init__(PREEMPTED)


def initialize():
    """Joins the processes of this run; call it before anything uses a device.

    Raises:
      UserError: the environment describes a run incompletely, or the other processes cannot be reached.
    """
    environment = os.environ
    try:
        if environment.get("JAX_NUM_PROCESSES"):
            jax.distributed.initialize(
                environment["JAX_COORDINATOR_ADDRESS"],
                int(environment["JAX_NUM_PROCESSES"]),
                int(environment["JAX_PROCESS_ID"]),
            )
        elif _may_be_one_of_many_tpu_hosts(environment):
            jax.distributed.initialize()  # asks the host's metadata
    except KeyError as error:
        raise UserError(
            f"JAX_NUM_PROCESSES is set but {error} is not; set both and JAX_PROCESS_ID, or none"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"the other processes of this run cannot be found ({error}); start it on every host, or unset "
            "JAX_NUM_PROCESSES (on a TPU host that is alone, set TPU_SKIP_MDS_QUERY=1)"
        ) from error


def _may_be_one_of_many_tpu_hosts(environment) -> bool:
    """Whether this is a TPU host that may not be the only one."""
    # jax declares its settings at runtime, where pyright does not see them.
    platforms: str | None = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if platforms and "tpu" not in platforms.split(","):
        return False
    if not glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"):
        return False
    if importlib.util.find_spec("libtpu") is None:
        return False
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if hosts:
        return "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1
    return "TPU_SKIP_MDS_QUERY" not in environment


def gathered(values: Any) -> np.ndarray:
    """Collects the values of all processes, one row each. Call it in every process, with equal shapes."""
    with jax.transfer_guard("allow"):  # the values are host numbers
        return multihost_utils.process_allgather(np.asarray(values))


def by_first(act: Callable[[], Any], what: str) -> None:
    """Runs act() in process 0 alone. It succeeds or raises in all processes alike; call it in every process.

    Args:
      what: is written, for the message.

    Raises:
      UserError: process 0 could not write.
    """
    failed = None
    if jax.process_index() == 0:
        try:
            act()
        except OSError as error:
            failed = UserError(
                f"{what} can't be written ({reason(error)}); make room or restore access, and start again"
            )
    if jax.process_count() > 1 and gathered([failed is not None]).any():
        raise failed or UserError(f"{what} can't be written by process 0, which says why")
    if failed is not None:
        raise failed


class Preemption:
    """Whether SIGTERM has told this run to stop; a context manager around the loop.

    In a run of several processes, a notice to one of them reaches all, and all stop after the same step. They
    catch the signal from `initialize` on. A process that runs alone catches it only inside the context. There
    it also catches the first SIGINT (Ctrl-C, a notebook's stop button); a second SIGINT has its usual effect.
    """

    def __init__(self):
        self._told = False
        self._before = {}

    def reached(self) -> bool:
        """Whether to save and stop after this step. Call it at every step, in every process."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(next(_SYNC_POINTS))
        return self._told

    def _tell(self, number, _):
        self._told = True
        if number == signal.SIGINT:
            print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)
            signal.signal(number, self._before[number])

    def __enter__(self) -> Self:
        if not jax.distributed.is_initialized():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._tell) or signal.SIG_DFL
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
