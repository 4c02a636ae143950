"""The one way to files: what is read may be damaged, what is written is whole or not there, what
is locked has one writer, and what this tool did not write is not replaced.
"""

import codecs
import errno
import hashlib
import json
import logging
import os
import stat
import unicodedata
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from msmdiff.core import systems
from msmdiff.core.errors import MsmdiffError, UsageError

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
"""What file systems answer to an operation that they do not have."""

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins with UTF-16's mark, so that it comes before it
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""What a text may begin with, and what it is in then."""


# What is read


class Unreadable(MsmdiffError):
    """A foreign file, or a part of one, that cannot be read; `reason` is why, without its name."""

    reason = ""


@contextmanager
def reading(path: Path | str, what: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a foreign file into one sentence.

    Args:
        path: the file that is read; the sentence begins with it.
        what: what it should be, with its article, such as "a safetensors file".

    Raises Unreadable, in place of any other exception: decoders raise nearly anything at damaged
    bytes. What is the machine's fault and not the file's (an OSError that has a number, too little
    memory) stays the cause, so that `passing` tells it from damage.
    """
    try:
        yield
    except MsmdiffError:
        raise
    except MemoryError as error:
        raise _unreadable(f"{path} asks for", "more memory than there is") from error
    except OSError as error:
        if error.errno is None:  # a library's own words for damage: Pillow, tarfile, zipfile
            raise _unreadable(f"{path} is not {what} that can be read:", brief(error)) from None
        raise _unreadable(f"{path} cannot be read:", error.strerror or str(error)) from error
    except Exception as error:
        raise _unreadable(f"{path} is not {what} that can be read:", brief(error)) from None


def _unreadable(sentence: str, reason: str) -> Unreadable:
    error = Unreadable(f"{sentence} {reason}")
    error.reason = reason
    return error


def reason(error: MsmdiffError) -> str:
    """Why something cannot be read, where the file is named already."""
    return error.reason if isinstance(error, Unreadable) and error.reason else str(error)


def passing(error: BaseException) -> bool:
    """Whether a failure to read may be gone at the next try: the fault of the disk, the network or
    the memory, not the file's.
    """
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
        return True
    return error.__cause__ is not None and passing(error.__cause__)


def brief(error: BaseException) -> str:
    """The first line of what a library says, at most 200 characters, or the error's name."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def require_regular(path: Path | str) -> None:
    """Refuse what is no ordinary file: a pipe or a device would be waited for without end.

    Raises Unreadable, also when the file is not there.
    """
    with reading(path, "a file"):
        _require_regular(path, Path(path).stat().st_mode)


def _require_regular(path: Path | str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise _unreadable(f"{path} is", f"{kind}, not a file")


def read_bytes(path: Path | str, limit: int = 2**31) -> bytes:
    """The content of an ordinary file of at most `limit` bytes. Raises Unreadable."""
    with reading(path, "a file"), _opened(path) as file:
        about = os.fstat(file.fileno())
        _require_regular(path, about.st_mode)
        if about.st_size > limit:
            raise _unreadable(f"{path} has", f"{about.st_size:,} bytes, more than {limit:,}")
        return file.read()


def named(path: Path) -> Path:
    """The path with its last part, beside which others can lie: of `.` its real one.

    Raises UsageError where there is none.
    """
    found = path if path.name else path.resolve()
    if not found.name:
        raise UsageError(f"{path} has no name that others could lie beside: give another place")
    return found


def cache_folder() -> Path:
    """Where things that can be made again are kept: MSMDIFF_CACHE, or ~/.cache/msmdiff.

    Raises UsageError for a user without a home (a container's number without a name).
    """
    if given := os.environ.get("MSMDIFF_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "msmdiff"
    except RuntimeError:
        raise UsageError("there is no home folder for a cache: set HOME or MSMDIFF_CACHE") from None


def beginning(path: Path | str, size: int) -> bytes:
    """The first bytes of an ordinary file. Raises Unreadable."""
    with reading(path, "a file"), _opened(path) as file:
        _require_regular(path, os.fstat(file.fileno()).st_mode)
        return file.read(size)


def _opened(path: Path | str) -> IO[bytes]:
    return os.fdopen(os.open(path, systems.READING), "rb")


def read_text(path: Path | str) -> str:
    """The text of an ordinary file, by `decoded`. Raises Unreadable."""
    with reading(path, "a text"):
        return decoded(read_bytes(path))


def decoded(content: bytes) -> str:
    """Text in what its byte-order mark says; or else in UTF-8, in UTF-16 or UTF-32 where there are
    zeros, or in Windows' Latin-1 (cp1252).

    Raises ValueError for bytes that are none of these.
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            return content.decode(encoding, errors="replace")
    encodings = ["utf-8", "cp1252"]
    if b"\0" in content:
        # Of a Latin letter, and of an end of line in any script, the upper bytes are zero.
        little = content[1::2].count(0) >= content[::2].count(0)
        orders = ("le", "be") if little else ("be", "le")
        encodings = [f"{kind}-{order}" for order in orders for kind in ("utf-16", "utf-32")]
        if content.count(0) < len(content) / 4 and _decodes(content, "utf-8"):
            encodings = []  # a stray zero
    for encoding in encodings:
        text = _decodes(content, encoding)
        if text is not None and (encoding == "utf-8" or not _odd(text)):
            return text
    raise ValueError("it is in none of UTF-8, UTF-16 and Latin-1: save it as UTF-8")


def _decodes(content: bytes, encoding: str) -> str | None:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        return None


def _odd(text: str) -> bool:
    """Whether a text has characters that only other bytes give which are taken for it: controls,
    and such as Unicode has not.
    """
    return any(unicodedata.category(c) in ("Cc", "Cn", "Co") and not c.isspace() for c in text)


def checksum(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# What is written


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn a failure to write into one sentence that names the file. Raises MsmdiffError."""
    try:
        yield
    except OSError as error:
        raise MsmdiffError(f"{path} cannot be written: {error.strerror or error}") from None


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place when it is on the disk. Makes the
    folder.

    Raises MsmdiffError where it cannot be written, or another process is writing it; what was
    there before is intact then, and nothing is left over.
    """
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with Lock(part, f"another process is writing {path}: wait for it"):
            try:
                yield part
                fsync(part)
                part.replace(path)
                fsync(path.parent)
            except BaseException:
                with suppress(OSError):
                    part.unlink(missing_ok=True)
                raise


def write_text(path: Path, text: str) -> None:
    """One text in a file, as UTF-8."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """One JSON document in a file."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    try:
        systems.sync(path)
    except OSError as error:
        if error.errno not in UNSUPPORTED:  # some file systems cannot sync a folder
            raise


def require_ours(path: Path, ours: bool, overwrite: bool = False) -> None:
    """Refuse to replace what this tool did not write: the one rule of all outputs.

    Args:
        path: the output, a file or a folder.
        ours: whether what is there now was recognised as written by this tool; asked only of what
            exists.
        overwrite: the user said to replace it all the same.

    Raises UsageError.
    """
    if os.path.lexists(path) and not ours and not overwrite:
        raise UsageError(
            f"{path} is there already, and was not written by msmdiff: give another place, "
            "or --overwrite to replace it"
        )


def require_writable(path: Path) -> None:
    """Refuse, before costly work, an output for which there is no place: a folder, a name below a
    file, or what may not be written. What shows only while writing is for `writing`.

    Raises MsmdiffError.
    """
    if path.is_dir():
        raise MsmdiffError(f"{path} is a folder: name a file")
    folder = path.parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise MsmdiffError(f"{path} cannot be written: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MsmdiffError(f"{path} cannot be written: {folder} is read-only")


# Who writes


class Lock:
    """One process at a time: held from construction to `close`, also as a context manager.

    The kernel lets it go when the process ends, however it ends. Forked children (loader workers)
    do not keep it: they may outlive a killed parent, whose restart must not wait for them.

    Args:
        path: the file or the folder that is locked; a file is made when it does not exist.
        held: the sentence when another process holds it.

    On a file system without locks nothing keeps a second process out: that is told once. Raises
    MsmdiffError with `held`, or OSError where the file cannot be made.
    """

    def __init__(self, path: Path, held: str) -> None:
        place = systems.place_of_lock(path)
        self._beside = place if place != path else None
        flags = os.O_RDONLY if place.is_dir() else os.O_WRONLY | os.O_CREAT
        self._descriptor: int | None = os.open(place, flags | systems.PRIVATE, 0o666)
        try:
            systems.lock(self._descriptor)
        except BlockingIOError:
            self.close()
            raise MsmdiffError(held) from None
        except OSError as error:
            # EBADF: network file systems lock only what is open for writing, which no folder is.
            if error.errno not in (*UNSUPPORTED, errno.EBADF):
                self.close()
                raise
            _tell_unlocked(path)
        _held.add(self)

    def close(self) -> None:
        """Let another process in."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            if self._beside is not None:
                with suppress(OSError):  # another process has it open by now
                    self._beside.unlink()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _tell_unlocked(path: Path) -> None:
    device = path.stat().st_dev
    if device not in _unlocked:  # every file that is written has its lock: once is enough
        _unlocked.add(device)
        words = "note: the file system of %s has no locks: let no other process write there"
        logging.getLogger(__name__).warning(words, path)


_unlocked: set[int] = set()
"""File systems (by device number) that were found without locks."""

_held: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _let_go() -> None:
    # A child's copy of the descriptor shares the parent's lock: closing the copy does not free it,
    # and keeping it would hold the lock after the parent's death.
    for lock in list(_held):
        lock.close()


systems.after_fork(_let_go)
