"""What systems do differently: what POSIX has, and what takes its place on Windows."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None  # type: ignore[assignment]

# Without O_NONBLOCK, opening a pipe would wait for someone to write into it.
READING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
PRIVATE = getattr(os, "O_CLOEXEC", 0)


def after_fork(call: Callable[[], None]) -> None:
    """Call this in every child that is forked, where there is forking."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=call)


def place_of_lock(path: Path) -> Path:
    """What is locked for a file or a folder: itself, or a file beside it where a locked file can be
    neither replaced nor read, and a folder not be opened.
    """
    if fcntl is not None:
        return path
    return path / ".locked" if path.is_dir() else path.with_name(f"{path.name}.locked")


def lock(descriptor: int) -> None:
    """Lock an open file until it is closed.

    Raises BlockingIOError where another process holds it, and OSError on a file system without
    locks.
    """
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt

    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError(*error.args) from None


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has nothing like it
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reserve(descriptor: int, size: int) -> None:
    """Take room on the disk for a file, where the system can. Raises OSError for a full one."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)


def memory() -> int | None:
    """Bytes of memory that the machine has; None where the system does not tell."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def largest_resident() -> int:
    """Bytes of memory that this process has held at most."""
    if resource is None:
        import psutil  # which Accelerate brings

        return int(psutil.Process().memory_info().peak_wset)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # macOS counts bytes
