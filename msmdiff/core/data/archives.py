"""Data sets in containers of their own: LSUN's LMDB, and CIFAR-10's binary version."""

import gzip
import os
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from msmdiff.core import files
from msmdiff.core.data import halves
from msmdiff.core.data.images import read_rgb
from msmdiff.core.data.lmdb import Pages
from msmdiff.core.data.names import shown
from msmdiff.core.data.source import Source
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.registry import register


@register("source", "lmdb", summary="LSUN's LMDB folder")
class Lmdb(Source):
    """LSUN's layout: a folder with `data.mdb`, an encoded image under every key, in the order of
    the keys.
    """

    @classmethod
    def opens(cls, spec: str) -> bool:
        return (Path(spec) / "data.mdb").is_file()

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._pages = Pages(Path(spec) / "data.mdb")
        self._entries = self._pages.entries()
        stat = self._pages.path.stat()
        self._state = f"({stat.st_size} bytes, changed {stat.st_mtime_ns})"
        if not self._entries:
            raise UsageError(f"{spec} holds no images")

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, index: int) -> Image.Image:
        return read_rgb(self._pages.value(self._entries[index]), self.decoding)

    def name(self, index: int) -> str:
        return shown(os.fsdecode(self._entries[index].key))

    def describe(self, index: int) -> str:
        return f"{self.name(index)} {self._state}"


LARGEST_MEMBER = 64 * 2**20
"""CIFAR-10's files have 31 MB."""


META = "batches.meta.txt"


@register("source", "cifar10", summary="cifar-10-binary.tar.gz, packed or unpacked")
class Cifar10(Source):
    """CIFAR-10's binary version, packed or unpacked: `cifar-10-binary.tar.gz[:train|:test]`, 32x32,
    ten classes.

    Raises UsageError where the files are not there, and MsmdiffError for damaged ones.
    """

    @classmethod
    def opens(cls, spec: str) -> bool:
        path = Path(spec)
        if (path / "batches.meta").is_file():
            raise UsageError(
                f"{spec} is CIFAR-10's Python version, which are pickles: give "
                "cifar-10-binary.tar.gz"
            )
        whole = Path(halves.parted(spec)[0])
        packed = whole.name.endswith((".tar.gz", ".tgz", ".tar")) and whole.is_file()
        return packed or (whole / META).is_file()

    def __init__(self, spec: str) -> None:
        self.spec = spec
        path, part = halves.parted(spec)
        wanted = (
            ["test_batch.bin"] if part == "test" else [f"data_batch_{i}.bin" for i in range(1, 6)]
        )
        wanted.append(META)
        with files.reading(path, "CIFAR-10's binary version"):
            found = _in_folder(Path(path), wanted) if Path(path).is_dir() else _in_tar(path, wanted)
        if missing := [name for name in wanted if name not in found]:
            raise UsageError(f"{path} lacks {', '.join(missing)}: give CIFAR-10's binary version")
        self.class_names = [shown(name) for name in files.decoded(found.pop(META)).split()]
        content = np.frombuffer(b"".join(found[name] for name in wanted[:-1]), np.uint8)
        if len(content) % 3073 or (rows := content.reshape(-1, 3073))[:, 0].max(initial=0) >= len(
            self.class_names
        ):
            raise MsmdiffError(
                f"{path} is damaged: it is not made of records of a label and 32x32 pixels"
            )
        self.labels, self._pixels = rows[:, 0].astype(np.int64), rows[:, 1:].reshape(-1, 3, 32, 32)

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self._pixels[index].transpose(1, 2, 0)))

    def describe(self, index: int) -> str:
        return f"{self.spec}[{index}]"


def _in_folder(folder: Path, wanted: list[str]) -> dict[str, bytes]:
    """Those of the wanted files that are there."""
    there = [name for name in wanted if (folder / name).exists()]
    return {name: files.read_bytes(folder / name, LARGEST_MEMBER) for name in there}


def _in_tar(path: str, wanted: list[str]) -> dict[str, bytes]:
    """Those of the wanted files that an archive holds, in whatever folder."""
    files.require_regular(path)
    with Path(path).open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        with tarfile.open(fileobj=_Gzip(fileobj=file) if packed else file, mode="r:") as archive:
            found = {}
            for member in archive:
                name = PurePosixPath(member.name).name
                # A Mac puts a hidden file beside each: `._data_batch_1.bin`.
                if name not in wanted or not member.isfile():
                    continue
                if member.size > LARGEST_MEMBER:
                    raise ValueError(f"its {name} would unpack to {member.size:,} bytes")
                if (content := archive.extractfile(member)) is not None:
                    found[name] = content.read()
    return found


class _Gzip(gzip.GzipFile):
    """What unpacks no more at once than a member may have: headers of `tarfile` ask for what they
    please.
    """

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LARGEST_MEMBER:
            raise ValueError(f"it asks for {size} bytes at once")
        return super().read(size)
