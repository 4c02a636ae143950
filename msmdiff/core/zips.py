"""Foreign zip archives, and NumPy's `.npz` in them: sizes are checked before memory is asked for.

Nothing here unpickles, and nothing follows a size that the file itself cannot bear out.
"""

import io
import math
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Literal

import numpy as np

from msmdiff.core import npy_header
from msmdiff.core.files import reading, require_regular

FREE_BYTES = 64 * 2**20
"""What a member may unpack to, however small it is packed."""
LARGEST_RATIO = 200
"""What a larger member may unpack to for each packed byte; images stay far below."""

WHAT = "a NumPy archive"


def open_zip(path: Path | str) -> zipfile.ZipFile:
    """A zip archive, for reading. Raises Unreadable."""
    require_regular(path)
    with reading(path, "a zip archive"):
        return zipfile.ZipFile(path)


def member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytearray:
    """What a member unpacks to. Raises ValueError and what `zipfile` raises, without its name."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # Python unpacks 4 KiB of the others at once, which may become gigabytes.
        raise ValueError("it is compressed in another way than deflate")
    packed = min(entry.compress_size, _size_of(archive))
    if entry.file_size > max(FREE_BYTES, LARGEST_RATIO * packed):
        raise ValueError(f"it would unpack {packed:,} bytes to {entry.file_size:,}")
    content = bytearray(entry.file_size)
    view, done = memoryview(content), 0
    with archive.open(entry) as file:
        while part := file.read(min(2**20, entry.file_size - done)):
            view[done : done + len(part)] = part
            done += len(part)
    if done < entry.file_size:
        raise ValueError("it is cut short")
    return content


def _size_of(archive: zipfile.ZipFile) -> int:
    assert archive.filename is not None
    return Path(archive.filename).stat().st_size


# NumPy's archives


def names_in(path: Path | str) -> list[str]:
    """The arrays that an `.npz` holds. Raises Unreadable."""
    with open_zip(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_arrays(path: Path | str, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that an `.npz` holds. Raises Unreadable."""
    found = {}
    with open_zip(path) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        for name in names:
            if name in entries:
                with reading(f"{path} ({name})", WHAT):
                    content = member(archive, entries[name])
                    dtype, shape, order, start = _header(io.BytesIO(content), len(content))
                    flat = np.frombuffer(content, dtype, math.prod(shape), start)
                    found[name] = flat.reshape(shape, order=order)
    return found


def map_array(path: Path | str, name: str) -> np.ndarray:
    """One array of an `.npz`, left on the disk unless it is compressed: 50,000 images of 256x256
    are 10 GB.

    Raises Unreadable.
    """
    with open_zip(path) as archive, reading(f"{path} ({name})", WHAT):
        entry = archive.getinfo(f"{name}.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            return read_arrays(path, [name])[name]
        archive.open(entry).close()  # checks the local header
        with Path(path).open("rb") as file:
            # The lengths of the local header's two fields of variable length.
            file.seek(entry.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            begin = entry.header_offset + 30 + name_length + extra_length
            file.seek(begin)
            end = min(begin + entry.file_size, _size_of(archive))
            dtype, shape, order, start = _header(file, end)
        return np.memmap(path, dtype, "r", start, shape, order)


def _header(file: IO[bytes], end: int) -> tuple[np.dtype, tuple[int, ...], Literal["C", "F"], int]:
    """Type, shape, order and first byte of the array of numbers or text at a file's place.

    Raises ValueError where it holds something else, or would not end before `end`.
    """
    found = npy_header.parsed(file, end, texts=True)
    if found.dtype is None:
        raise ValueError("it holds Python objects, not plain numbers")
    return found.dtype, found.shape, "F" if found.fortran else "C", found.offset
