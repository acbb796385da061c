"""How a process on a CPU uses its memory. Imports no JAX: it acts before any thread has allocated."""

import ctypes
import glob
import os
import platform

# Files of accelerators: TPUs, then NVIDIA's and AMD's GPUs.
ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")
# Parameters of glibc's mallopt: one arena, nothing mapped by itself, nothing ever given back.
KEPT = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}


def keep() -> bool:
    """Has this process keep the memory that it frees, where its programs run on a CPU.

    XLA's CPU client takes a program's temporaries from malloc at every call, and frees them after it. For
    gigabytes, malloc asks the system anew each time, and every page is cleared and mapped again: a fifth of a
    training step's CPU time on some virtual machines (benchmarks/kept_memory.py). The process then holds its
    peak until it ends. Nothing is done beside an accelerator, or without glibc.

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
