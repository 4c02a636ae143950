"""`.npy` files: those of other projects, read without running anything that is in them, and our
own, whose rows several processes fill.

NumPy's own reader is not asked about foreign files: it would unpickle arrays of objects.
"""

import math
import os
import pickletools
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from msmdiff.core import files, npy_header, systems
from msmdiff.core.errors import MsmdiffError
from msmdiff.core.npy_header import Header, require_shape

LONGEST_PICKLE = 1000
"""Opcodes; a pair of an array and a label has about 150."""


# Reading


def load(path: Path) -> np.ndarray:
    """The numbers of a file. Raises MsmdiffError for what is no plain array of them."""
    with _opened(path) as (file, about):
        return _numbers(file.read(), about)


def load_pair(path: Path) -> tuple[np.ndarray, int | None]:
    """As `load`, with the label where the file is a pickled pair of both, as U-ViT writes it."""
    with _opened(path) as (file, about):
        if about.dtype is None:
            return _pair(_tree(file.read()))
        return _numbers(file.read(), about), None


def load_whole(path: Path) -> int:
    """The one whole number of a file, such as a label."""
    with _opened(path) as (file, about):
        return _whole(_numbers(file.read(), about))


def mapped(path: Path) -> np.ndarray:
    """The numbers of a file, memory-mapped. Copy-on-write, since torch wants memory that it could
    write; nothing here does.
    """
    with _opened(path) as (_, about):
        if about.dtype is None or not math.prod(about.shape):
            return _numbers(b"", about)
        if not about.dtype.isnative:
            raise ValueError("its numbers are in another machine's byte order")
        order: Literal["F", "C"] = "F" if about.fortran else "C"
        return np.memmap(path, about.dtype, "c", about.offset, about.shape, order=order)


def header(path: Path) -> Header:
    """What a file says of itself, which fits its size. Raises MsmdiffError as `load` does."""
    with _opened(path) as (_, found):
        return found


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Header]]:
    """A file at the begin of its content, and its header; what goes wrong inside becomes one
    sentence.
    """
    files.require_regular(path)
    with files.reading(path, "a .npy file of numbers"), path.open("rb") as file:
        found = npy_header.parsed(file, os.fstat(file.fileno()).st_size)
        yield file, found


def _numbers(content: bytes, about: Header) -> np.ndarray:
    """An array of its own memory, which is not larger than `content`."""
    if about.dtype is None:
        raise ValueError("it holds Python objects")
    count = math.prod(about.shape)
    array = np.frombuffer(content, about.dtype, count) if count else np.empty(0, about.dtype)
    array = array.reshape(about.shape, order="F" if about.fortran else "C")
    return array.astype(array.dtype.newbyteorder("="))  # torch wants the machine's byte order


# U-ViT's pickled pairs: a pickle is a little program. It is not run: what it would call becomes a
# node of a tree, in which the array and the label are then looked for.


class _Call:
    """What a pickle would call, with which arguments, and the state it would set afterwards."""

    __match_args__ = ("name", "arguments", "state")

    def __init__(self, name: str, arguments: Any) -> None:
        self.name, self.arguments, self.state = name, arguments, None


class _Name(str):
    """A function or class of NumPy that a pickle speaks of, without its module."""


_NAMES = ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer", "encode")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = re.compile(r"(SHORT_)?BIN(UNICODE|BYTES|STRING|INT)[128]?|LONG[14]|BYTEARRAY8")


def _tree(content: bytes) -> Any:
    """What the pickle would make, as numbers, text, tuples, lists and `_Call`s."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    marks: list[int] = []
    argument: Any
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        # Many references to one long text are no memory, but each opcode makes objects.
        if number > LONGEST_PICKLE:
            break
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack[-1]
            case "MARK":
                marks.append(len(stack))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "EMPTY_LIST":
                stack.append([])
            case "APPENDS" | "TUPLE":
                since = _cut(stack, marks.pop())
                stack.append(tuple(since)) if opcode.name == "TUPLE" else stack[-1].extend(since)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(_cut(stack, -int(opcode.name[-1]))))
            case "GLOBAL":
                stack.append(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_name(*_cut(stack, -2)))
            case "REDUCE" | "BUILD":
                called, what = _cut(stack, -2)
                stack.append(_reduced(called, what) if opcode.name == "REDUCE" else called)
                if opcode.name == "BUILD":
                    called.state = what
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if _VALUES.fullmatch(name):
                stack.append(argument)
            case name:
                raise ValueError(f"its pickle does more than hold an array and a label ({name})")
    raise ValueError("its pickle has no end")


def _cut(stack: list[Any], start: int) -> list[Any]:
    """Take the values from `start` on off the stack."""
    taken = stack[start:]
    del stack[start:]
    return taken


def _name(module: str, name: str) -> _Name:
    if name not in _NAMES or module.partition(".")[0] not in ("numpy", "_codecs"):
        raise ValueError(f"it asks for {module}.{name}")
    return _Name(name)


def _reduced(called: Any, arguments: Any) -> Any:
    if not isinstance(called, _Name):
        raise ValueError("its pickle is damaged")
    return _Call(str(called), arguments)


def _pair(tree: Any) -> tuple[np.ndarray, int]:
    """The array and the label in the tree of `np.array([moments, label], dtype=object)`."""
    match tree:
        case _Call("_reconstruct", _, (1, (2,), _Call("dtype"), False, [moments, label])):
            return _array(moments), _label(label)
    raise ValueError("it holds Python objects, not a pair of an array and a label")


def _array(node: Any) -> np.ndarray:
    match node:
        case _Call("_reconstruct", _, (1, shape, _Call("dtype") as kind, fortran, content)):
            pass
        case _Call("_frombuffer", (content, _Call("dtype") as kind, shape, order)):
            fortran = order == "F"
        case _:
            raise ValueError("it holds Python objects that are no arrays of numbers")
    about = Header(_pickled_dtype(kind), fortran is True, require_shape(shape), 0)
    return _numbers(_bytes(content), about)


def _label(node: Any) -> int:
    match node:
        case int():
            return int(node)
        case _Call("scalar", (_Call("dtype") as kind, content)):
            number = _numbers(_bytes(content), Header(_pickled_dtype(kind), False, (), 0))
        case _:
            number = _array(node)
    return _whole(number)


def _whole(number: np.ndarray) -> int:
    """The one whole number in an array. Raises ValueError for something else."""
    if number.size != 1 or number.dtype.kind not in "iub":
        raise ValueError("its label is not a whole number")
    return int(number.item())


def _pickled_dtype(call: _Call) -> np.dtype:
    """Of `dtype("f4", ...)` and its state (3, "<", ...)."""
    match call:
        case _Call("dtype", (str(kind), *_), (3, str(order), *_)):
            return npy_header.plain(order + kind)
    raise ValueError("it does not hold plain numbers")


def _bytes(node: Any) -> bytes:
    match node:
        case bytes() | bytearray():
            return bytes(node)
        case str():  # as Python 2 wrote bytes
            return node.encode("latin1")
        case _Call("encode", (str(text), "latin1")):  # as protocol 2 writes them
            return text.encode("latin1")
    raise ValueError("its pickle is damaged")


# Writing


def require_room(path: Path, size: int) -> None:
    """Raise MsmdiffError where the disk of a file or a folder has less than `size` bytes free."""
    free = shutil.disk_usage(path if path.is_dir() else path.parent).free
    if size > free:
        raise MsmdiffError(
            f"{path} needs {size / 2**20:,.1f} MiB, its disk has {free / 2**20:,.1f} MiB free"
        )


def create(path: Path, dtype: str, shape: Sequence[int]) -> None:
    """Make a file of zeros, with all of its space on the disk.

    A file with holes would let a full disk kill whoever reads it through a memory map. Raises
    MsmdiffError where there is no room; nothing is left then.
    """
    kind = np.dtype(dtype)
    fields = {"descr": kind.str, "fortran_order": False, "shape": tuple(map(int, shape))}
    with files.writing(path):
        try:
            with path.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, fields)
                size = file.tell() + math.prod(shape) * kind.itemsize
                file.truncate(size)
                _reserve(file.fileno(), size)
                os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise


def _reserve(descriptor: int, size: int) -> None:
    try:
        systems.reserve(descriptor, size)
    except OSError as error:
        if error.errno not in files.UNSUPPORTED:  # plain writes still say when the disk is full
            raise


def write_rows(path: Path, rows: Sequence[int], values: np.ndarray) -> None:
    """Rows [B, ...] of a file that `create` made, by plain writes: through a memory map a full disk
    would kill the process.
    """
    dtype, _, shape, offset = header(path)
    assert dtype is not None
    content = np.ascontiguousarray(values.astype(dtype, copy=False))
    with files.writing(path), path.open("r+b") as file:
        for row, value in zip(rows, content, strict=True):
            file.seek(offset + row * math.prod(shape[1:]) * dtype.itemsize)
            file.write(value.tobytes())
        file.flush()
        os.fsync(file.fileno())
