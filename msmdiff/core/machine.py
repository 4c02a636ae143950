"""Making a process use its CPU well."""

import ctypes
import os

import torch

from msmdiff.core.errors import UsageError

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def prepare(threads: int | None = None) -> None:
    """Set torch's threads, flush denormals, and keep freed memory.

    threads None: OMP_NUM_THREADS, else this process's share of the cores. By default glibc hands
    every large tensor back to the system and asks for fresh, zeroed pages at the next step; keeping
    them makes a training step on a CPU up to 1.5 times as fast (docs/benchmarks.md).
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    # torchrun sets OMP_NUM_THREADS=1 by itself, so that it is somebody's wish only in a single
    # process.
    words = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if words and not (words.isdecimal() and int(words) < 2**15):
        raise UsageError(f"OMP_NUM_THREADS={words}: give a number of threads, such as 4")
    wished = int(words or 0) if processes == 1 else 0
    torch.set_num_threads(threads or wished or max(1, cores // processes))
    torch.set_flush_denormal(True)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent outside glibc
    if mallopt is not None and not torch.cuda.is_available():
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
