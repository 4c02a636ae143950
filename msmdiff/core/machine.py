"""Making a process use its CPU well. Torch is imported late here: how its threads wait must be said
before.
"""

import ctypes
import os
from typing import Any

from msmdiff.core.errors import UsageError

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

SPINS = "1000"
"""How often a waiting OpenMP thread looks before it sleeps (docs/benchmarks.md)."""
_SAID = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def wait_briefly() -> None:
    """Let OpenMP threads that wait for each other sleep soon, unless the user has said how they
    wait. To be called before torch is imported.

    By default they spin, for milliseconds: where another program keeps a core busy, the thread that
    is waited for does not run, and a training step takes several times as long.
    """
    if not any(os.environ.get(name) for name in _SAID):
        os.environ["GOMP_SPINCOUNT"] = SPINS  # GNU's, which torch's wheels carry
        os.environ["KMP_BLOCKTIME"] = "0"  # Intel's and LLVM's, in milliseconds


def waiting() -> str:
    """How OpenMP threads wait, for people."""
    said = [f"{name}={os.environ[name]}" for name in _SAID if os.environ.get(name)]
    return f"by {', '.join(said)}" if said else "as OpenMP does by default"


def name_of(device: Any) -> str:
    """A torch device, for people."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def use(device: str | None) -> None:
    """Let this process see one device only: `cpu`, `cuda`, `cuda:N`, or None for what there is. To
    be called before CUDA is first used.

    Where CUDA_VISIBLE_DEVICES is set, N counts what it lists: a scheduler hides the other GPUs.

    Raises UsageError for another name, or a GPU that is not there.
    """
    if device in (None, "auto"):
        return
    kind, _, number = str(device).partition(":")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    if kind != "cuda" or (number and not number.isdecimal()) or str(device).endswith(":"):
        raise UsageError(f"--device {device}: give cpu, cuda or cuda:N")
    if number:
        os.environ["CUDA_VISIBLE_DEVICES"] = _listed(int(number))
    import torch

    if not torch.cuda.is_available():
        raise UsageError(f"--device {device}: there is no such GPU here; leave it out, or give cpu")


def _listed(number: int) -> str:
    """A GPU's name for CUDA_VISIBLE_DEVICES, by its place among those that are seen now."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is None:
        return str(number)
    listed = [name.strip() for name in seen.split(",")]
    ends = [place for place, name in enumerate(listed) if name in ("", "-1")]  # CUDA stops there
    listed = listed[: min(ends, default=len(listed))]
    if number >= len(listed):
        there = ", ".join(f"cuda:{i}" for i in range(len(listed))) or "no GPU; give cpu"
        raise UsageError(
            f"--device cuda:{number}: CUDA_VISIBLE_DEVICES={seen} leaves this process {there}"
        )
    return listed[number]


def prepare(threads: int | None = None) -> None:
    """Set torch's threads, flush denormals, and keep freed memory.

    threads None: OMP_NUM_THREADS, else this process's share of the cores. By default glibc hands
    every large tensor back to the system and asks for fresh, zeroed pages at the next step; keeping
    them makes a training step on a CPU up to 1.5 times as fast (docs/benchmarks.md).

    Raises UsageError where OMP_NUM_THREADS is no number.
    """
    import torch

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
    library = ctypes.CDLL(None) if os.name == "posix" else None
    mallopt = getattr(library, "mallopt", None)  # absent outside glibc
    if mallopt is not None and not torch.cuda.is_available():
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def repeat_exactly(wanted: bool) -> None:
    """Let a GPU add up in one order, or in whichever is fastest; to be called before its first
    product.
    """
    import torch

    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
