"""Files of tensors: safetensors and torch's own. The one place that opens those of others.

A torch file is a pickle, and a pickle is a program. The reader here runs none of it: it makes
numbers, texts, containers and tensors, keeps what it does not know as an empty shell (a path or a
numpy number among the arguments of a training), and refuses a file that calls anything else. No
tensor may claim more numbers than its file holds, so that memory is bounded by the file's size.
"""

import io
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from msmdiff.core import files
from msmdiff.core.errors import MsmdiffError, UsageError

PAGES = (b"<!doctype", b"<html", b"<?xml")
ZIP = b"PK\x03\x04"


# What is read


def read(path: Path | str) -> Any:
    """What lies in a file of tensors, on the CPU: of safetensors a dictionary of tensors, of a
    torch file whatever was saved. Nothing in it is executed.

    Raises UsageError when the file is not there, and MsmdiffError, in one sentence, when it is
    damaged, claims more than it holds, or asks to run code.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    files.require_regular(path)
    if path.suffix == ".safetensors":
        with files.reading(path, "a safetensors file"):
            return load_file(path)
    with files.reading(path, "a checkpoint of torch's"), path.open("rb") as file:
        start = file.read(512)
        if start.lstrip().lower().startswith(PAGES):
            raise MsmdiffError(f"{path} is a web page, not a checkpoint: download the file itself")
        file.seek(0)
        return _Zipped(path, file).content() if start.startswith(ZIP) else _legacy(path, file)


def metadata(path: Path) -> dict[str, str]:
    """The texts beside a safetensors file's tensors. Raises MsmdiffError where it is damaged."""
    with files.reading(path, "a safetensors file"), safe_open(path, "pt") as file:
        return file.metadata() or {}


class Shell(dict[Any, Any]):
    """What stands for an object of a class that the reader does not know: nothing of the class,
    only what was stored in it, in `state`.
    """

    state: Any = None
    __hash__ = object.__hash__  # type: ignore[assignment]

    def append(self, item: Any) -> None:
        """A list's item is of no use here."""

    def extend(self, items: Any) -> None:
        """Nor are several."""


class Storage(NamedTuple):
    """The bytes that tensors share, and the type of their numbers."""

    data: bytearray
    dtype: torch.dtype


DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8,
}
"""What torch calls a storage, without `Storage`."""

SHELLS = (
    *(("pathlib", f"{kind}Path") for kind in ("", "Pure", "Posix", "PurePosix", "Windows")),
    *(("pathlib._local", f"{kind}Path") for kind in ("", "Posix", "Windows")),
    *((f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *(("numpy", kind) for kind in ("dtype", "ndarray")),
    *(("datetime", kind) for kind in ("datetime", "date", "timedelta")),
    ("torch", "device"),
    ("_codecs", "encode"),
)
"""What checkpoints call that computes nothing of use here: the call gives a shell."""


class _Program(pickle._Unpickler):
    """Reads a pickle without running what it names.

    The interpreter is Python's own in Python: the one in C allocates what a number in the file
    says. `storage` gives the bytes of a persistent id.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)
    # It allocates as much as the file says, and torch writes none.
    del dispatch[pickle.BYTEARRAY8[0]]

    def __init__(self, path: Path, file: IO[bytes], storage: Callable[..., Storage]) -> None:
        super().__init__(file, encoding="latin1")
        self._path, self._storage = path, storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):
            return DTYPES[name.removesuffix("Storage")]
        if module == "torch.storage" and name == "UntypedStorage":
            return torch.uint8
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        rebuilders = {
            ("collections", "OrderedDict"): dict,
            ("collections", "defaultdict"): lambda *default: {},
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._typed,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
            ("builtins", "set"): set,
            ("__builtin__", "set"): set,
        }
        if (module, name) in SHELLS:
            return lambda *arguments: Shell()
        return rebuilders.get((module, name)) or self._unknown(f"{module}.{name}")

    def _unknown(self, name: str) -> Any:
        """A class whose objects are shells: pickles make them without a call. A call is refused."""

        class Refusing(type):
            def __call__(cls, *arguments: Any) -> Any:
                raise MsmdiffError(
                    f"{self._path} asks to run code ({name}), so it was not opened; "
                    "nothing was executed"
                )

        def new(cls: type, *arguments: Any) -> Shell:
            return Shell()

        return Refusing(name, (), {"__new__": new})

    def load_build(self) -> None:
        """Give an object its state: kept where it is a shell, and of no use to anything else."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Shell):
            self.stack[-1].state = state

    dispatch[pickle.BUILD[0]] = load_build

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or view not in ([], [None]):
            raise ValueError(f"it refers to {kind} in a way that torch no longer writes")
        return self._storage(str(key), dtype, count)

    def _tensor(self, storage: Storage, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        return self._typed(storage, offset, size, stride, False, None, storage.dtype)

    def _typed(
        self,
        storage: Storage,
        offset: int,
        size: Any,
        stride: Any,
        grad: Any,
        hooks: Any,
        dtype: torch.dtype,
        *_: Any,
    ) -> Tensor:
        """A tensor that lies in its storage. Each number of it has a place of its own there."""
        count = math.prod(size)
        if count * dtype.itemsize > len(storage.data):
            raise ValueError(
                f"a tensor of shape {list(size)} claims more numbers than its "
                f"{len(storage.data):,} bytes hold"
            )
        if not count:
            return torch.empty(size, dtype=dtype)
        # as_strided refuses what lies outside.
        return torch.frombuffer(storage.data, dtype=dtype).as_strided(size, stride, offset)


class _Zipped:
    """A torch file as it is since 1.6: a zip with a pickle and one entry per storage."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.archive = path, zipfile.ZipFile(file)
        entries = self.archive.infolist()
        size = path.stat().st_size
        if any(entry.compress_type for entry in entries) or size < sum(
            entry.file_size for entry in entries
        ):
            raise MsmdiffError(
                f"{path} is a compressed zip, which torch does not write: unpack it, and save "
                "what it holds with torch.save"
            )
        names = [entry.filename for entry in entries]
        pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError("it is a zip without one data.pkl")
        self.folder = pickles[0].removesuffix("data.pkl")
        if f"{self.folder}constants.pkl" in names:
            raise ValueError("it is a TorchScript archive: save its state_dict() instead")
        order = f"{self.folder}byteorder"
        if order in names and self.archive.read(order) != b"little":
            raise ValueError("its numbers are big-endian")
        self.known: dict[str, Storage] = {}

    def content(self) -> Any:
        program = io.BytesIO(self.archive.read(f"{self.folder}data.pkl"))
        return _Program(self.path, program, self._storage).load()

    def _storage(self, key: str, dtype: torch.dtype, count: int) -> Storage:
        if key not in self.known:
            data = bytearray(self.archive.read(f"{self.folder}data/{key}"))
            self.known[key] = Storage(data, dtype)
        return _checked(self.known[key], dtype, count)


def _legacy(path: Path, file: IO[bytes]) -> Any:
    """What torch wrote before 1.6: five pickles in a row, and then the bytes of each storage."""
    size, taken = path.stat().st_size, 0
    known: dict[str, Storage] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> Storage:
        nonlocal taken
        if key not in known:
            taken += count * dtype.itemsize
            if not 0 <= count * dtype.itemsize <= taken <= size:
                raise ValueError(f"its tensors claim more than its {size:,} bytes")
            known[key] = Storage(bytearray(count * dtype.itemsize), dtype)
        return _checked(known[key], dtype, count)

    def step() -> Any:
        return _Program(path, file, storage).load()

    if step() != 0x1950A86A20F9469CFC6C:
        raise ValueError("it does not begin as torch's files do")
    protocol, about = step(), step()
    if protocol != 1001 or not about.get("little_endian", True):
        raise ValueError("it is of another version, or its numbers are big-endian")
    content = step()
    for key in step():
        data, (count,) = known[str(key)], struct.unpack("<q", file.read(8))
        if count * data.dtype.itemsize != len(data.data):
            raise ValueError(f"its storage {key} is of another size than its tensors say")
        if file.readinto(data.data) != len(data.data):  # type: ignore[attr-defined]
            raise ValueError("it is truncated")
    return content


def _checked(storage: Storage, dtype: torch.dtype, count: int) -> Storage:
    """The storage, when it has as many numbers as the pickle says."""
    if count * dtype.itemsize != len(storage.data):
        raise ValueError(
            f"a storage of {len(storage.data):,} bytes is said to hold {count:,} numbers"
        )
    return Storage(storage.data, dtype)


# What is written


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """A safetensors file, whole or not there, with texts beside the tensors.

    Written here, and not by the library: that one makes files for their owner only, and tells of a
    full disk in words of its own. Raises MsmdiffError where it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(about)}
    # As the library does: the widest numbers first, so that all of them are aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with files.atomic(path) as part, part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().data)


def write_torch(path: Path, content: Any) -> None:
    """A file of torch's, whole or not there. Raises MsmdiffError where it cannot be written."""
    with files.atomic(path) as part, part.open("wb") as file:
        watched = _Watched(file)
        try:
            torch.save(content, watched)  # type: ignore[arg-type]
        except RuntimeError:
            if watched.failure is None:
                raise
            raise watched.failure from None


class _Watched:
    """A file that remembers why it was not written: torch's own words do not tell."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.failure: OSError | KeyboardInterrupt | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except (OSError, KeyboardInterrupt) as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self._file.flush()


CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names of the types of numbers."""
