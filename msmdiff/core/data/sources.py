"""Where images come from: folders, zip archives and ADM `.npz` files (`embedded` has what packages
carry, `archives` and `latents` the rest).

A new kind of source is one class, here or in a plugin, with `opens`, `__len__`, `read` and
`describe`, registered as a "source".
"""

import os
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from msmdiff.core import files, registry, zips
from msmdiff.core.config import section
from msmdiff.core.data import halves, names
from msmdiff.core.data.halves import Subset as Subset
from msmdiff.core.data.images import BEGINNING, SUFFIXES, Decoding, read_rgb
from msmdiff.core.data.source import Source
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.registry import register
from msmdiff.core.sections import AUTO, DataConfig

LARGEST_CLASS = 1_000_000
"""Class indices stay below: each class has a name, and a row in the network."""


@register("source", "files", summary="a folder of images, or a .zip")
class Files(Source):
    """Image files in a folder (recursive) or a zip archive, in sorted order."""

    priority = 0
    brings_labels = False

    @classmethod
    def opens(cls, spec: str) -> bool:
        path = Path(spec)
        return path.is_dir() or (path.suffix.lower() == ".zip" and path.exists())

    def __init__(self, spec: str, labels: str = "auto") -> None:
        self.spec = spec
        self.path = Path(spec)
        self._archives: dict[int, zipfile.ZipFile] = {}
        self._entries: dict[str, zipfile.ZipInfo] = {}
        if self.path.is_dir():
            found = list(names.walk(self.path))
        else:
            entries = [
                entry
                for entry in self._archive().infolist()
                if entry.filename and not entry.is_dir()  # a damaged entry may have no name
            ]
            self._entries = {names.separated(entry.filename): entry for entry in entries}
            found = list(self._entries)
        self.names, others = names.sorted_out(found)
        self.left_out = [names.shown(name) for name in others]
        if not self.names:
            such = f"; there is {self.left_out[0]}" if others else ""
            raise UsageError(
                f"{spec} holds no images: looked, in every sub-folder, for "
                f"{', '.join(sorted(SUFFIXES))} in any case{such}"
            )
        self.labels, self.class_names, self.unlabelled = names.classes(self.names, labels, spec)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Image.Image:
        return read_rgb(self.content(index), self.decoding)

    def content(self, index: int) -> bytes:
        return self._content(self.names[index])

    def beginning(self, index: int) -> bytes | None:
        if not self.path.is_dir():
            return self.content(index)[:BEGINNING]
        return files.beginning(f"{self.path}/{self.names[index]}", BEGINNING)

    def caption_file(self, index: int) -> bytes | None:
        name = str(PurePosixPath(self.names[index]).with_suffix(".txt"))
        there = (self.path / name).exists() if self.path.is_dir() else name in self._entries
        return self._content(name) if there else None

    def _content(self, name: str) -> bytes:
        if self.path.is_dir():
            return files.read_bytes(self.path / name)
        with files.reading(f"{names.shown(name)} in {self.spec}", "a zip archive's member"):
            return bytes(zips.member(self._archive(), self._entries[name]))

    def describe(self, index: int) -> str:
        if not self.path.is_dir():
            entry = self._entries[self.names[index]]
            return f"{self.name(index)} ({entry.file_size} bytes, crc {entry.CRC:08x})"
        try:
            # Not through Path, which takes longer than the system: there may be a million.
            stat = os.stat(f"{self.path}/{self.names[index]}")  # noqa: PTH116
        except OSError as error:  # a link that leads nowhere
            return f"{self.name(index)} ({error.strerror})"
        return f"{self.name(index)} ({stat.st_size} bytes, changed {stat.st_mtime_ns})"

    def name(self, index: int) -> str:
        return names.shown(self.names[index])

    def _archive(self) -> zipfile.ZipFile:
        # One handle per process: a handle shared through fork would share its file position.
        process = os.getpid()
        if process not in self._archives:
            self._archives = {process: zips.open_zip(self.path)}
        return self._archives[process]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_archives": {}}


@register("source", "npz", summary="ADM's .npz of images")
class Npz(Source):
    """ADM's sample files: `arr_0` uint8 [N, H, W, 3], and labels in `arr_1` where present."""

    named_by_place = True
    verified = True

    @classmethod
    def opens(cls, spec: str) -> bool:
        path = Path(spec)
        return path.suffix.lower() == ".npz" and path.exists()

    def __init__(self, spec: str) -> None:
        self.spec = spec
        if "arr_0" not in (there := zips.names_in(spec)):
            raise UsageError(
                f"{spec} holds {sorted(there)}, not images (ADM's `arr_0`, uint8 [N, H, W, 3])"
            )
        self._pixels = pixels = zips.map_array(spec, "arr_0")
        if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8 or not pixels.size:
            raise UsageError(
                f"{spec}: arr_0 is {pixels.dtype} {list(pixels.shape)}, not uint8 [N, H, W, 3]"
            )
        labels = zips.read_arrays(spec, ["arr_1"]).get("arr_1")
        if labels is not None:
            self.labels = _class_indices(spec, labels, len(pixels))
            self.class_names = [str(i) for i in range(int(self.labels.max()) + 1)]

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index])

    def describe(self, index: int) -> str:
        return f"{self.spec}[{index}]"


def _class_indices(spec: str, labels: np.ndarray, count: int) -> np.ndarray:
    """`arr_1` as int64. Raises UsageError for what cannot be class indices."""
    if labels.shape != (count,) or labels.dtype.kind not in "iuf":
        raise UsageError(
            f"{spec}: arr_1 is {labels.dtype} {list(labels.shape)}, and must hold one class index, "
            f"0 or more, for each of {count} images"
        )
    wrong = labels[~((labels >= 0) & (labels < LARGEST_CLASS) & (labels == np.floor(labels)))]
    if len(wrong):
        raise UsageError(
            f"{spec}: arr_1 holds {wrong[0]}, and must hold class indices, whole numbers from 0 to "
            f"{LARGEST_CLASS - 1}"
        )
    return labels.astype(np.int64)


def open_source(
    spec: str, labels: str = "auto", kind: str = AUTO, options: Mapping[str, Any] | None = None
) -> Source:
    """Open images by what the user wrote.

    `SOURCE:train` and `SOURCE:test` are the two halves of any source, see `halves`.

    `labels` is `auto` (sub-folders if every image lies in one, else `ClassID_*.jpg` names if all
    are of that form with at least two classes, else none), `folders`, `adm` or `none`; `kind` is
    the name of a registered source, or else found by the spec's look; `options` are those of the
    source that it is.

    Raises UsageError when nothing is there, when the labels asked for are not, and for an option
    that this source does not take.
    """
    if names.shown(spec) != spec:
        raise UsageError(
            f"data source '{names.shown(spec)}': its name is not plain text in UTF-8: rename it"
        )
    entry, part = _recognised(spec, kind)
    if part is not None:
        whole = open_source(part[0], labels, kind, options)
        return halves.half(whole, part[1], spec)
    if entry is None:
        kinds = "; ".join(e.summary for e in registry.entries("source").values())
        there = "is a file of no known kind" if Path(spec).exists() else "does not exist"
        raise UsageError(
            f"data source '{spec}' {there}: give one of: {kinds} {registry.OR_A_PLUGINS}"
        )
    for key, value in (options or {}).items():
        if key not in entry.options.model_fields:
            takers = ", ".join(takers_of(key)) or "no source at all"
            raise UsageError(
                f"data.{key} {value} has no effect on the source {entry.name}, only on {takers}"
            )
    complete = section("data", kind=entry.name, **(options or {}))
    own = entry.takes(complete)
    if not entry.make.brings_labels:
        return entry.make(spec, labels, **own)
    return _with_labels(entry.make(spec, **own), labels)


def takers_of(option: str) -> list[str]:
    """The sources that take an option."""
    every = registry.entries("source").values()
    return [entry.name for entry in every if option in entry.options.model_fields]


def takes(spec: str, option: str) -> bool:
    """Whether the source that opens `spec`, or of which it is a half, takes an option."""
    entry, part = _recognised(spec)
    if part is not None:
        return takes(part[0], option)
    return entry is not None and option in entry.options.model_fields


def open_configured(config: DataConfig) -> Source:
    """The source of a `data` section, with the options that were given.

    A stored configuration holds all options: those with their default were not given.
    """
    fields = type(config).model_fields
    given = {key: getattr(config, key) for key in sorted(config.model_fields_set)}
    options = {
        key: value
        for key, value in given.items()
        if key not in DataConfig.model_fields and value != fields[key].default
    }
    source = open_source(config.source, config.labels, config.kind, options)
    source.decoding = Decoding(float_range=config.float_range, alpha=config.background)
    return halves.chosen(source, config)


def _recognised(
    spec: str, kind: str = AUTO
) -> tuple[registry.Entry | None, tuple[str, str] | None]:
    """The source that opens what the user wrote, and, where it is a half of one, `halves.named`."""
    part = halves.named(spec)
    if kind == AUTO:
        entry = _by_look(spec)
        halved = part is not None and entry is None and is_data(part[0])
    else:
        entry = registry.find("source", kind, "data.kind")
        halved = part is not None and _is_half_of(entry, spec, part[0])
    return (entry, part) if halved else (entry, None)


def _is_half_of(entry: registry.Entry, spec: str, whole: str) -> bool:
    """Whether `spec` is a half of what a chosen source opens; some have halves of their own."""
    if Path(spec).exists() or entry.make.opens(spec):
        return False
    return Path(whole).exists() or entry.make.opens(whole)


def _by_look(spec: str) -> registry.Entry | None:
    """The source that opens what the user wrote, plugins' first."""
    found = registry.entries("source").values()
    in_turn = sorted(found, key=lambda entry: (entry.plugin is None, -entry.make.priority))
    return next((entry for entry in in_turn if entry.make.opens(spec)), None)


def is_data(spec: str) -> bool:
    """Whether there is something that is, or could be meant as, a source."""
    return Path(halves.parted(spec)[0]).exists() or _by_look(spec) is not None


def holds_images(path: Path) -> bool:
    """Whether an `.npz` holds ADM's `arr_0`."""
    return "arr_0" in zips.names_in(path)


def _with_labels(source: Source, rule: str) -> Source:
    """A source that brings its own labels has no other rule for them than `none`."""
    if rule == "none":
        source.labels, source.class_names = None, ()
    elif rule != "auto":
        raise UsageError(
            f"data.labels '{rule}' is for folders and zips: {source.spec} brings its own labels"
        )
    return source


def survey(
    source: Source, indices: Sequence[int] | None = None
) -> tuple[dict[int, MsmdiffError], Counter[tuple[int, int]]]:
    """Decode every image, or those at `indices`: what fails and why, and how many have which
    (width, height).
    """
    sizes: Counter[tuple[int, int]] = Counter()

    def decode(index: int) -> None:
        sizes[source.image(index).size] += 1

    return failing(decode, range(len(source)) if indices is None else indices), sizes


TOGETHER = 64
"""Images that a thread looks at in a row: handing over a single one takes as long as a glance."""


def failing(look: Callable[[int], object], indices: Sequence[int]) -> dict[int, MsmdiffError]:
    """The indices at which `look` fails, in threads, and why."""

    def attempt(some: Sequence[int]) -> dict[int, MsmdiffError]:
        failed = {}
        for index in some:
            try:
                look(index)
            except MsmdiffError as error:
                failed[index] = error
        return failed

    groups = [indices[at : at + TOGETHER] for at in range(0, len(indices), TOGETHER)]
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        return {
            index: error for found in pool.map(attempt, groups) for index, error in found.items()
        }
    finally:
        # After Ctrl-C, the images that are left are not waited for.
        pool.shutdown(cancel_futures=True)
