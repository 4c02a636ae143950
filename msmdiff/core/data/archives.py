"""Data sets in containers of their own: LSUN's LMDB, and CIFAR-10's binary version."""

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from msmdiff.core.data.images import read_rgb
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
        stat = (Path(spec) / "data.mdb").stat()
        self._state = f"({stat.st_size} bytes, changed {stat.st_mtime_ns})"
        with _lmdb(self.spec).begin() as view, view.cursor() as cursor:
            self.keys = list(cursor.iternext(keys=True, values=False))
        if not self.keys:
            raise UsageError(f"{spec} holds no images")

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> Image.Image:
        with _lmdb(self.spec).begin(buffers=True) as view:
            return read_rgb(io.BytesIO(view.get(self.keys[index])))

    def name(self, index: int) -> str:
        return self.keys[index].decode(errors="replace")

    def describe(self, index: int) -> str:
        return f"{self.name(index)} {self._state}"


_open: dict[str, tuple[int, Any]] = {}


def _lmdb(path: str) -> Any:
    """The environment in a folder: open once in a process, and not shared with one that was forked
    from it.
    """
    process, environment = _open.get(path, (0, None))
    if process != os.getpid():
        try:
            import lmdb
        except ImportError:
            raise MsmdiffError("LMDB needs the lmdb package: pip install 'msmdiff[lsun]'") from None
        if environment is not None:
            environment.close()
        try:
            environment = lmdb.open(path, readonly=True, lock=False, readahead=False, meminit=False)
        except lmdb.Error as error:
            raise MsmdiffError(f"{path} cannot be opened as an LMDB: {error}") from None
        _open[path] = os.getpid(), environment
    return environment


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
        whole = Path(spec.removesuffix(":train").removesuffix(":test"))
        packed = whole.name.endswith((".tar.gz", ".tgz", ".tar")) and whole.is_file()
        return packed or (whole / "batches.meta.txt").is_file()

    def __init__(self, spec: str) -> None:
        self.spec = spec
        path, _, part = (
            spec.rpartition(":") if spec.endswith((":train", ":test")) else (spec, "", "train")
        )
        wanted = (
            ["test_batch.bin"] if part == "test" else [f"data_batch_{i}.bin" for i in range(1, 6)]
        )
        wanted.append("batches.meta.txt")
        try:
            if Path(path).is_dir():
                files = {p.name: p.read_bytes() for p in Path(path).iterdir() if p.name in wanted}
            else:
                with tarfile.open(path) as archive:
                    members = {Path(m.name).name: m for m in archive if m.isfile()}
                    opened = {n: archive.extractfile(members[n]) for n in wanted if n in members}
                    files = {n: file.read() for n, file in opened.items() if file is not None}
        except (OSError, EOFError, tarfile.TarError) as error:
            raise MsmdiffError(f"{path} cannot be read: {error}") from None
        if missing := [name for name in wanted if name not in files]:
            raise UsageError(f"{path} lacks {', '.join(missing)}: give CIFAR-10's binary version")
        self.class_names = files.pop("batches.meta.txt").decode().split()
        content = np.frombuffer(b"".join(files[name] for name in wanted[:-1]), np.uint8)
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
