"""WebDataset's shards: tar archives, whose files of one name and several suffixes are an entry."""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from msmdiff.core import files
from msmdiff.core.data import names
from msmdiff.core.data.images import BEGINNING, SUFFIXES, read_rgb
from msmdiff.core.data.source import Source
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.registry import register

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
LARGEST_SET = 1_000_000
"""Shards of a set."""

Member = tuple[str, int, int]
"""(name, where its content begins, its length)"""


@register("source", "webdataset", summary="WebDataset's shards, folder/ or name-{000..146}.tar")
class WebDataset(Source):
    """Images in tar shards, an entry's class in its `.cls`.

    `shard-{000..146}.tar`, one uncompressed `.tar`, or a folder that holds nothing but them. The
    images are in the order of the shards and, within each, of its files; any of them is read
    without the others. Where the files lie is remembered in the user's cache folder.

    Raises UsageError where there are no images, and MsmdiffError for damaged shards.
    """

    priority = 2

    @classmethod
    def opens(cls, spec: str) -> bool:
        if RANGE.search(spec):
            return spec.endswith(".tar")
        path = Path(spec)
        if path.is_dir():
            there = [entry.name for entry in path.iterdir() if not names.hidden(entry.name)]
            return any(name.endswith(".tar") for name in there) and all(
                name.endswith((".tar", ".json", ".txt", ".md")) for name in there
            )
        return path.name.endswith(".tar") and path.is_file() and _is_plain(path)

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.shards = [Path(name) for name in _expanded(spec)]
        self._files: dict[tuple[int, int], int] = {}
        classes: list[int | None] = []
        self._entries: list[tuple[int, str, int, int]] = []  # shard, name, offset, size
        for number, shard in enumerate(self.shards):
            for image, label in _entries(shard):
                self._entries.append((number, *image))
                classes.append(label)
        if not self._entries:
            raise UsageError(f"{spec} holds no images: none of its files ends in one's suffix")
        self._label(classes)

    def _label(self, classes: list[int | None]) -> None:
        known = [label for label in classes if label is not None]
        if len(known) == len(classes):
            self.labels = np.array(known, np.int64)
            self.class_names = [str(i) for i in range(max(known) + 1)]
        elif known:
            lacking = self.name(classes.index(None))
            self.unlabelled = (
                f"no labels: {lacking} has no .cls beside it, {len(known):,} others do"
            )

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, index: int) -> Image.Image:
        return read_rgb(self.content(index), self.decoding)

    def content(self, index: int) -> bytes:
        return self._bytes(index, self._entries[index][3])

    def beginning(self, index: int) -> bytes:
        return self._bytes(index, min(BEGINNING, self._entries[index][3]))

    def _bytes(self, index: int, size: int) -> bytes:
        number, _, offset, _ = self._entries[index]
        with files.reading(f"{self.name(index)} in {self.shards[number]}", "a shard's file"):
            found = os.pread(self._descriptor(number), size, offset)
            if len(found) != size:
                raise ValueError("the shard ends before it")
        return found

    def _descriptor(self, number: int) -> int:
        # `pread` has no file position that processes could share, but few files may be open.
        key = (os.getpid(), number)
        if key not in self._files:
            if len(self._files) >= 64:
                oldest = next(iter(self._files))
                descriptor = self._files.pop(oldest)
                if oldest[0] == key[0]:
                    os.close(descriptor)
            self._files[key] = os.open(self.shards[number], os.O_RDONLY)
        return self._files[key]

    def name(self, index: int) -> str:
        number, name, _, _ = self._entries[index]
        return f"{names.shown(self.shards[number].name)}/{names.shown(name)}"

    def describe(self, index: int) -> str:
        return f"{self.name(index)} ({self._entries[index][3]} bytes)"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}


def _is_plain(path: Path) -> bool:
    """Whether an archive holds images among its first files, and is not CIFAR-10's."""
    with files.reading(path, "a tar archive"), suppress(StopIteration):
        members = _members(path)
        return any(names.suffix_of(next(members)[0]) in SUFFIXES for _ in range(8))
    return False


def _expanded(spec: str) -> list[str]:
    """The shards that a spec names. Raises UsageError for a range that is none."""
    path = Path(spec)
    if path.is_dir():
        found = [entry for entry in path.iterdir() if entry.name.endswith(".tar")]
        return sorted(str(entry) for entry in found if not names.hidden(entry.name))
    found_range = RANGE.search(spec)
    if found_range is None:
        return [spec]
    first, last = found_range[1], found_range[2]
    if not int(first) <= int(last) < int(first) + LARGEST_SET:
        raise UsageError(f"{spec}: {found_range[0]} is no rising range, such as {{000..146}}")
    numbers = [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    head, tail = spec[: found_range.start()], spec[found_range.end() :]
    return [name for n in numbers for name in _expanded(f"{head}{n}{tail}")]


def _entries(shard: Path) -> Iterator[tuple[Member, int | None]]:
    """The images of a shard and their classes."""
    classes: dict[str, int] = {}
    images: list[Member] = []
    for name, offset, size in _index(shard):
        if any(names.hidden(part) for part in name.split("/")):
            continue
        if names.suffix_of(name) in SUFFIXES:
            images.append((name, offset, size))
        elif name.endswith(".cls"):
            classes[_key(name)] = _class_of(shard, name, offset, size)
    return ((image, classes.get(_key(image[0]))) for image in images)


def _key(name: str) -> str:
    """An entry's name: up to the first dot of the last part."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _class_of(shard: Path, name: str, offset: int, size: int) -> int:
    with (
        files.reading(f"{names.shown(name)} in {shard}", "a class index"),
        shard.open("rb") as file,
    ):
        file.seek(offset)
        number = int(file.read(min(size, 32)))
        if not 0 <= number < 1_000_000:
            raise ValueError(f"{number} is not from 0 to 999,999")
        return number


def _index(shard: Path) -> list[Member]:
    """The files of a shard, from the cache where it was looked through before."""
    files.require_regular(shard)
    stat = shard.stat()
    text = f"{shard.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]
    place = files.cache_folder() / "shards" / f"{digest}.json"
    with suppress(MsmdiffError, ValueError, TypeError, RecursionError):
        stored = json.loads(files.read_text(place))
        return [(str(name), int(offset), int(size)) for name, offset, size in stored]
    with files.reading(shard, "a tar archive"):
        found = list(_members(shard))
    if any(offset + size > stat.st_size for _, offset, size in found):
        raise MsmdiffError(f"{shard} is damaged: it ends before its last file does")
    with suppress(MsmdiffError):
        files.write_json(place, found)
    return found


def _members(shard: Path) -> Iterator[Member]:
    """The ordinary files of an uncompressed tar archive."""
    with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # it keeps all that it has seen
            if member.isreg() and not member.issparse():
                yield member.name, member.offset_data, member.size
