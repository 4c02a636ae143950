"""Where images come from: folders, zip archives, ADM `.npz` files, and the embedded digits.

A new kind of source is one class, here or in a plugin, with `opens`, `__len__`, `read` and
`describe`, registered as a "source".
"""

import io
import os
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from msmdiff.core import registry
from msmdiff.core.data.images import SUFFIXES, UNREADABLE, read_rgb
from msmdiff.core.data.source import Source
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.registry import register
from msmdiff.core.sections import AUTO, DataConfig


@register("source", "digits", summary="`digits[:train|:test]`, scikit-learn's scans")
class Digits(Source):
    """scikit-learn's 1,797 real scans of handwritten digits, 8x8 grey, ten classes.

    `digits:test` is every fifth scan, `digits:train` the others.
    """

    @classmethod
    def opens(cls, spec: str) -> bool:
        return spec.partition(":")[0] == "digits" and not Path(spec).exists()

    def __init__(self, spec: str = "digits") -> None:
        from sklearn.datasets import load_digits

        part = spec.partition(":")[2]
        if part not in ("", "train", "test"):
            raise UsageError(
                f"data source '{spec}': the parts of digits are digits:train and digits:test"
            )
        bunch = load_digits()
        chosen = np.arange(len(bunch.target))
        if part:
            chosen = chosen[(chosen % 5 == 0) == (part == "test")]
        self.spec = spec
        self._pixels = (bunch.images[chosen] * (255 / 16)).round().astype(np.uint8)
        self.labels = bunch.target[chosen].astype(np.int64)
        self.class_names = [str(i) for i in range(10)]

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index]).convert("RGB")

    def describe(self, index: int) -> str:
        return f"{self.spec}[{index}]"


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
        if self.path.is_dir():
            self.names = sorted(_walk(self.path))
        else:
            self.names = sorted(
                n for n in self._archive().namelist() if _is_image(PurePosixPath(n))
            )
        if not self.names:
            raise UsageError(
                f"{spec} holds no images: looked, in every sub-folder, for "
                f"{', '.join(sorted(SUFFIXES))} in any case"
            )
        self.labels, self.class_names = _labels(self.names, labels, spec)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Image.Image:
        return read_rgb(
            self.path / self.names[index] if self.path.is_dir() else io.BytesIO(self.content(index))
        )

    def content(self, index: int, suffix: str | None = None) -> bytes:
        name = (
            self.names[index]
            if suffix is None
            else str(PurePosixPath(self.names[index]).with_suffix(suffix))
        )
        try:
            return (
                (self.path / name).read_bytes()
                if self.path.is_dir()
                else self._archive().read(name)
            )
        except (
            KeyError,
            zipfile.BadZipFile,
            zlib.error,
            RuntimeError,
            NotImplementedError,
        ) as error:
            raise OSError(
                str(error)
            ) from None  # damaged, encrypted, or compressed in a way Python cannot read

    def describe(self, index: int) -> str:
        if self.path.is_dir():
            stat = (self.path / self.names[index]).stat()
            return f"{self.names[index]} ({stat.st_size} bytes, changed {stat.st_mtime_ns})"
        entry = self._archive().getinfo(self.names[index])
        return f"{self.names[index]} ({entry.file_size} bytes, crc {entry.CRC:08x})"

    def name(self, index: int) -> str:
        return self.names[index]

    def _archive(self) -> zipfile.ZipFile:
        # One handle per process: a handle shared through fork would share its file position.
        process = os.getpid()
        if process not in self._archives:
            try:
                self._archives = {process: zipfile.ZipFile(self.path)}
            except (OSError, zipfile.BadZipFile) as error:
                raise MsmdiffError(
                    f"{self.path} cannot be opened as a zip archive: {error}"
                ) from None
        return self._archives[process]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_archives": {}}


@register("source", "npz", summary="ADM's .npz of images")
class Npz(Source):
    """ADM's sample files: `arr_0` uint8 [N, H, W, 3], and labels in `arr_1` where present."""

    @classmethod
    def opens(cls, spec: str) -> bool:
        path = Path(spec)
        return path.suffix.lower() == ".npz" and path.exists()

    def __init__(self, spec: str) -> None:
        self.spec = spec
        try:
            with np.load(spec, allow_pickle=False) as content:
                if "arr_0" not in content:
                    raise UsageError(
                        f"{spec} holds {sorted(content)}, not images (ADM's `arr_0`, uint8 "
                        "[N, H, W, 3])"
                    )
                self._pixels = _mapped(spec)
                labels = content.get("arr_1")
        except (
            OSError,
            ValueError,
            EOFError,
            TypeError,
            AttributeError,
            struct.error,
            zipfile.BadZipFile,
        ) as error:
            raise MsmdiffError(f"{spec} cannot be read as a NumPy archive: {error}") from None
        if self._pixels.ndim != 4 or self._pixels.shape[-1] != 3 or self._pixels.dtype != np.uint8:
            raise UsageError(
                f"{spec}: arr_0 is {self._pixels.dtype} {list(self._pixels.shape)}, not uint8 "
                "[N, H, W, 3]"
            )
        if labels is not None and (
            labels.shape != (len(self._pixels),) or labels.min(initial=0) < 0
        ):
            raise UsageError(
                f"{spec}: arr_1 must hold one class index, 0 or more, for each of "
                f"{len(self._pixels)} images"
            )
        if labels is not None:
            self.labels = labels.astype(np.int64)
            self.class_names = [str(i) for i in range(int(labels.max(initial=-1)) + 1)]

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index])

    def describe(self, index: int) -> str:
        return f"{self.spec}[{index}]"


class Subset(Source):
    """Some images of another source, in the given order."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.spec, self.class_names = source.spec, source.class_names
        self._source, self._indices = source, list(indices)
        self.labels = None if source.labels is None else source.labels[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> Image.Image:
        return self._source.read(self._indices[index])

    def describe(self, index: int) -> str:
        return self._source.describe(self._indices[index])

    def content(self, index: int, suffix: str | None = None) -> bytes | None:
        return self._source.content(self._indices[index], suffix)

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])


def open_source(
    spec: str, labels: str = "auto", kind: str = AUTO, options: Mapping[str, Any] | None = None
) -> Source:
    """Open images by what the user wrote.

    `labels` is `auto` (sub-folders if every image lies in one, else `ClassID_*.jpg` names if all
    are of that form with at least two classes, else none), `folders`, `adm` or `none`; `kind` is
    the name of a registered source, whose `options` it takes, or else found by the spec's look.
    Raises UsageError when nothing is there, or when the labels asked for are not.
    """
    entry = registry.find("source", kind, "data.kind") if kind != AUTO else _recognised(spec)
    if entry is None:
        kinds = "; ".join(e.summary for e in registry.entries("source").values())
        there = "is a file of no known kind" if Path(spec).exists() else "does not exist"
        raise UsageError(f"data source '{spec}' {there}: give one of: {kinds}")
    if not entry.make.brings_labels:
        return entry.make(spec, labels, **(options or {}))
    return _with_labels(entry.make(spec, **(options or {})), labels)


def open_configured(config: DataConfig) -> Source:
    """The source of a `data` section."""
    options: dict[str, Any] = {}
    if config.kind != AUTO:
        options = registry.find("source", config.kind, "data.kind").takes(config)
    return open_source(config.source, config.labels, config.kind, options)


def _recognised(spec: str) -> registry.Entry | None:
    """The source that opens what the user wrote, plugins' first."""
    found = registry.entries("source").values()
    in_turn = sorted(found, key=lambda entry: (entry.plugin is None, -entry.make.priority))
    return next((entry for entry in in_turn if entry.make.opens(spec)), None)


def is_data(spec: str) -> bool:
    """Whether there is something that is, or could be meant as, a source."""
    whole = Path(spec.removesuffix(":train").removesuffix(":test"))
    return whole.exists() or _recognised(spec) is not None


def _mapped(path: str) -> np.ndarray:
    """`arr_0` of an `.npz`, left on the disk unless it is compressed: 50,000 images of 256x256 are
    10 GB.
    """
    with zipfile.ZipFile(path) as archive, Path(path).open("rb") as file:
        entry = archive.getinfo("arr_0.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            with archive.open(entry) as member:
                return np.lib.format.read_array(member, allow_pickle=False)
        file.seek(entry.header_offset + 26)  # the lengths of the local header's two variable fields
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = header(file)
        return np.memmap(
            filename=path,
            dtype=dtype,
            mode="r",
            offset=file.tell(),
            shape=shape,
            order="F" if fortran else "C",
        )


def holds_images(path: Path) -> bool:
    """Whether an `.npz` holds ADM's `arr_0`."""
    with np.load(path, allow_pickle=False) as content:
        return "arr_0" in content


def _with_labels(source: Source, rule: str) -> Source:
    """A source that brings its own labels has no other rule for them than `none`."""
    if rule == "none":
        source.labels, source.class_names = None, ()
    elif rule != "auto":
        raise UsageError(
            f"data.labels '{rule}' is for folders and zips: {source.spec} brings its own labels"
        )
    return source


def _walk(root: Path) -> list[str]:
    names: list[str] = []
    seen = {root.resolve()}

    def refuse(error: OSError) -> None:
        raise MsmdiffError(f"{error.filename} cannot be read: {error.strerror}") from None

    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        real = {s: (Path(folder) / s).resolve() for s in subfolders if not s.startswith(".")}
        subfolders[:] = [
            s for s, target in real.items() if target not in seen
        ]  # a link may lead back up
        seen.update(real.values())
        relative = PurePosixPath(Path(folder).relative_to(root).as_posix())
        names += [str(relative / f) for f in files if _is_image(relative / f)]
    return names


def _is_image(path: PurePosixPath) -> bool:
    return (
        path.suffix.lower() in SUFFIXES
        and not path.name.startswith(".")
        and "__MACOSX" not in path.parts
    )


def _labels(names: list[str], rule: str, spec: str) -> tuple[np.ndarray | None, list[str]]:
    # An archive of one folder (`zip -r photos.zip photos`) has its classes one level further down.
    parents = [PurePosixPath(n).parts[:-1] for n in names]
    common = next(
        (i for i, level in enumerate(zip(*parents, strict=False)) if len(set(level)) > 1), 0
    )
    inside = all(len(p) > common for p in parents)
    deeper = [PurePosixPath(n).parts[common if inside else 0 :] for n in names]
    folders = [parts[0] if len(parts) > 1 else None for parts in deeper]
    stems = [re.match(r"[^_]+(?=_)", PurePosixPath(n).name) for n in names]
    prefixes = [m.group() if m else None for m in stems]
    if rule == "auto":
        if None not in folders and len(set(folders)) > 1:
            rule = "folders"
        elif None not in prefixes and 1 < len(set(prefixes)) <= len(names) // 2:
            rule = "adm"
        else:
            rule = "none"
    if rule == "none":
        return None, []
    keys = folders if rule == "folders" else prefixes
    if None in keys:
        name, form = (
            names[keys.index(None)],
            "class/image.png" if rule == "folders" else "ClassID_anything.jpg",
        )
        raise UsageError(
            f"data.labels is '{rule}', but {spec} holds {name}, which is not of the form {form}"
        )
    classes = sorted({k for k in keys if k is not None})
    index = {c: i for i, c in enumerate(classes)}
    return np.array([index[k] for k in keys if k is not None], dtype=np.int64), classes


def survey(source: Source) -> tuple[dict[int, str], Counter[tuple[int, int]]]:
    """Decode every image, in threads: {index: reason} of those that fail, and how many have which
    (width, height).
    """
    from concurrent.futures import ThreadPoolExecutor

    def attempt(index: int) -> tuple[int, int] | str:
        try:
            return source.read(index).size
        except UNREADABLE as error:
            return f"{type(error).__name__}: {error}".strip(": ")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(attempt, range(len(source))))
    bad = {index: result for index, result in enumerate(results) if isinstance(result, str)}
    return bad, Counter(result for result in results if not isinstance(result, str))
