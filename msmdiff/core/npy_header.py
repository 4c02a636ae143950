"""The header of NumPy's format, in `.npy` files and in the members of an `.npz`: what an array says
of itself, believed only as far as its bytes bear it out.

NumPy's own reader is not asked: it makes types of whatever a header says, and allocates whatever
it claims.
"""

import ast
import math
import re
from typing import IO, Any, NamedTuple

import numpy as np

LONGEST = 10_000
"""Bytes of a header, as NumPy itself allows."""


class Header(NamedTuple):
    """What an array says of itself; `dtype` is None for one of Python objects, `offset` is where
    the content begins.
    """

    dtype: np.dtype | None
    fortran: bool
    shape: tuple[int, ...]
    offset: int


def parsed(file: IO[bytes], end: int, texts: bool = False) -> Header:
    """The header at a file's place, of an array whose content ends at `end` or before.

    `texts` admits arrays of text beside those of plain numbers. Raises ValueError for anything
    else, before anything of the size that is claimed is made.
    """
    start = file.read(8)
    if start[:6] != b"\x93NUMPY" or len(start) < 8:
        raise ValueError("it does not begin as one")
    if start[6] not in (1, 2, 3):
        raise ValueError(f"it is of format {start[6]}.{start[7]}, not 1.0 to 3.0")
    size = int.from_bytes(file.read(2 if start[6] == 1 else 4), "little")
    if size > LONGEST:
        raise ValueError(f"its header has {size:,} bytes")
    text = file.read(size).decode("latin1").strip()
    # Python 2 wrote an L behind long numbers.
    text = re.sub(r"(\d)L\b", r"\1", text)
    try:
        fields = ast.literal_eval(text)
        kind, fortran, shape = (fields[key] for key in ("descr", "fortran_order", "shape"))
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError):
        raise ValueError("its header is damaged") from None
    dtype = None if kind in ("|O", "O") else plain(kind, texts)
    found = Header(dtype, fortran is True, require_shape(shape), file.tell())
    if dtype is not None:
        # An item without bytes would fit any number of times.
        claimed = math.prod(found.shape) * max(1, dtype.itemsize)
        there = end - found.offset
        if claimed > there:
            raise ValueError(f"its header speaks of {claimed:,} bytes, it has {there:,}")
    return found


def plain(kind: Any, texts: bool = False) -> np.dtype:
    """The type of plain numbers, or of text: nothing structured, no objects. Raises ValueError."""
    known = r"[<>=|]?(f[248]|[iu][1248]|b1|\?)" + (r"|[<>=|]?[US]\d{1,6}" if texts else "")
    if not isinstance(kind, str) or not re.fullmatch(known, kind):
        raise ValueError("it does not hold plain numbers")
    return np.dtype(kind)


def require_shape(shape: Any) -> tuple[int, ...]:
    """A shape as it is, where it is one. Raises ValueError."""
    if not isinstance(shape, tuple) or len(shape) > 32:
        raise ValueError("its shape is damaged")
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError("its shape is damaged")
    return shape
