"""What goes wrong inside a child: one file operation that fails or is the last one, a network that
is not there, and a watch over what is written, started and connected.

Everything is installed in a process of its own and ends with it.
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = ("rename", "replace", "link", "symlink", "mkdir", "rmdir", "unlink", "remove", "truncate")
"""Functions of `os` that change names or sizes; the first path they take is what they change."""

ON_DESCRIPTORS = ("fsync", "ftruncate", "posix_fallocate", "pwrite")


class Operations:
    """Counts the file operations below a folder, and lets one of them go wrong.

    Args:
        folder: what lies elsewhere is not counted.
        kind: `kill` ends the process with SIGKILL before the operation (a write is then half done);
            `ENOSPC` and `EIO` fail it, once, and nothing of it is done: what Python's buffers hold
            is written when the file is closed. EIO hits reading too. `SIGINT` is Ctrl-C before
            the operation; `none` only counts.
        at: the number of the operation, from 0 on.
        log: a file that gets a line per operation: its name, and the path within the folder.
    """

    def __init__(self, folder: Path, kind: str, at: int, log: Path) -> None:
        self.folder, self.kind, self.at, self.count = f"{folder}/", kind, at, 0
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._write = os.write

    def passes(self, name: str, where: Any, half: Callable[[], Any] | None = None) -> None:
        """Called before each operation. `half` does the first half of a write, before a kill."""
        path = _path_of(where)
        if not path.startswith(self.folder):
            return
        if self.kind != "EIO" and name in ("read", "open to read"):
            return
        number, self.count = self.count, self.count + 1
        self._write(self._log, f"{name}\t{path.removeprefix(self.folder)}\n".encode())
        if number != self.at or self.kind == "none":
            return
        if self.kind == "kill":
            if half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "SIGINT":
            signal.raise_signal(signal.SIGINT)
            return
        code = getattr(errno, self.kind)
        raise OSError(code, os.strerror(code), path)

    def install(self) -> None:
        """Put the count between Python and the system, for this process."""
        for name in CHANGES:
            setattr(os, name, self._counted(name, getattr(os, name)))
        for name in ON_DESCRIPTORS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        opened = os.open

        def open_descriptor(path: Any, flags: int, *more: Any, **named: Any) -> int:
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            self.passes("open" if writes else "open to read", _absolute(path))
            return opened(path, flags, *more, **named)

        os.open = open_descriptor
        io.open = self._open  # pathlib, os.fdopen
        import builtins

        builtins.open = self._open

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(where: Any, *more: Any, **named: Any) -> Any:
            self.passes(name, where if isinstance(where, int) else _absolute(where))
            return function(where, *more, **named)

        return counted

    def _open(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        """As `open`, on files whose reads and writes are counted."""
        if not isinstance(file, int):
            self.passes("open to read" if set(mode) <= set("rbt") else "open", _absolute(file))
        plain = mode.replace("t", "").replace("b", "")
        raw = _Counted(self, file, plain, closefd, opener)
        if buffering == 0:
            return raw
        kind = io.BufferedRandom if "+" in mode else io.BufferedWriter
        if raw.readable() and not raw.writable():
            kind = io.BufferedReader
        buffered = kind(raw)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)
        text.mode = mode
        return text


class _Counted(io.FileIO):
    """A file each of whose reads and writes is an operation."""

    def __init__(self, counts: Operations, file: Any, mode: str, closefd: bool, opener: Any):
        super().__init__(file, mode, closefd, opener)
        self._counts = counts

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        half = view[: len(view) // 2]
        self._counts.passes("write", self.fileno(), lambda: io.FileIO.write(self, half))
        return super().write(data)

    def readinto(self, buffer: Any) -> int:
        self._counts.passes("read", self.fileno())
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self._counts.passes("read", self.fileno())
        return super().readall()

    def truncate(self, size: int | None = None) -> int:
        self._counts.passes("truncate", self.fileno())
        return super().truncate(size)


def _path_of(where: Any) -> str:
    if isinstance(where, int):
        try:
            return str(Path(f"/proc/self/fd/{where}").readlink())
        except OSError:
            return ""
    return where


def _absolute(path: Any) -> str:
    if isinstance(path, int):
        return _path_of(path)
    return os.path.abspath(os.fsdecode(path))  # noqa: PTH100 (follows links)


class Watch:
    """Notes what a process must not do, by Python's audit events, and lets nothing connect.

    Args:
        places: folders below which it may write.

    `seen` are the violations: sentences of what was tried.
    """

    PROGRAMS = ("git", "uname")
    """What a training asks for its circumstances."""

    CHANGED = {  # noqa: RUF012
        **dict.fromkeys(("os.remove", "os.mkdir", "os.rmdir", "os.truncate"), (0,)),
        **dict.fromkeys(("os.chmod", "os.chown", "os.utime"), (0,)),
        "os.rename": (0, 1),
        "os.link": (1,),
        "os.symlink": (1,),
    }
    """Events, and which of their arguments are paths that change."""

    def __init__(self, places: list[str]) -> None:
        self.places = tuple(f"{place}/" for place in [*places, "/dev", "/proc"])
        self.seen: list[str] = []

    def install(self) -> None:
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not isinstance(path, int):
                self._require_inside(event, path)
        elif event in self.CHANGED:
            for place in self.CHANGED[event]:
                if not isinstance(arguments[place], int):
                    self._require_inside(event, arguments[place])
        elif event in ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn"):
            self.seen.append(f"{event} {arguments!r}")
        elif event == "subprocess.Popen":
            if Path(os.fsdecode(arguments[0])).name not in self.PROGRAMS:
                self.seen.append(f"{event} {arguments[:2]!r}")
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            self._refuse(event, arguments)
        elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
            self._refuse(event, arguments[1:])

    def _refuse(self, event: str, arguments: tuple[Any, ...]) -> None:
        self.seen.append(f"{event} {arguments!r}")
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    def _require_inside(self, event: str, path: Any) -> None:
        where = f"{_absolute(path)}/"
        if not where.startswith(self.places):
            self.seen.append(f"{event} {where}")
