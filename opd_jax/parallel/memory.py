"""How a process on a CPU uses its memory. Imports no JAX, because it must run before any thread allocates."""

import ctypes
import glob
import os
import platform

# Files of accelerators: TPUs, then NVIDIA's and AMD's GPUs.
ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")
# Parameters of glibc's mallopt: one arena, no allocation with its own mapping, no memory returned.
KEPT = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}


def keep() -> bool:
    """Makes this process keep the memory that it frees, if its programs run on a CPU.

    XLA's CPU client allocates a program's temporaries with malloc at every call, and frees them afterwards.
    For gigabytes, malloc gets new memory from the system each time, which clears and maps every page again.
    On some virtual machines this takes a fifth of a training step's CPU time (benchmarks/kept_memory.py).
    With this setting the process holds its peak memory until it ends. On machines with an accelerator or
    without glibc nothing is changed.

    Returns:
      Whether the memory is kept.
    """
    if any(map(glob.glob, ACCELERATORS)) and os.environ.get("JAX_PLATFORMS") != "cpu":
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = [mallopt(*setting) for setting in KEPT.values()]
    return all(done)
