"""Parts of a data set: some of its images, and the two halves `SOURCE:train` and `SOURCE:test` of
any source that has none of its own.

Which half an image is in is told by a hash of its name and a seed: it stays there when others come
or go, and wherever the data lie.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from msmdiff.core.data.images import Decoding
from msmdiff.core.data.source import Source
from msmdiff.core.errors import UsageError, nearest
from msmdiff.core.sections import DataConfig

SHARE = 0.1
"""Of the images, what `SOURCE:test` holds."""
SEED = 0


class Subset(Source):
    """Some images of another source, in the given order."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.spec, self.class_names = source.spec, source.class_names
        self._source, self._indices = source, list(indices)
        self.left_out, self.unlabelled = source.left_out, source.unlabelled
        self.labels = None if source.labels is None else source.labels[self._indices]

    @property
    def decoding(self) -> Decoding:
        """The whole's, which does the reading."""
        return self._source.decoding

    @decoding.setter
    def decoding(self, decoding: Decoding) -> None:
        self._source.decoding = decoding

    @property
    def verified(self) -> bool:  # type: ignore[override]
        return self._source.verified

    @property
    def named_by_place(self) -> bool:  # type: ignore[override]
        return self._source.named_by_place

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> Image.Image:
        return self._source.read(self._indices[index])

    def describe(self, index: int) -> str:
        return self._source.describe(self._indices[index])

    def content(self, index: int) -> bytes | None:
        return self._source.content(self._indices[index])

    def sight(self, index: int) -> bytes:
        return self._source.sight(self._indices[index])

    def beginning(self, index: int) -> bytes | None:
        return self._source.beginning(self._indices[index])

    def caption_file(self, index: int) -> bytes | None:
        return self._source.caption_file(self._indices[index])

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])


def parted(spec: str) -> tuple[str, str]:
    """(`SOURCE`, `train` or `test`) of what a user wrote; the part is "" where none is named."""
    whole, colon, part = spec.rpartition(":")
    return (whole, part) if colon and whole and part in ("train", "test") else (spec, "")


def named(spec: str) -> tuple[str, str] | None:
    """As `parted`, or None where no part is named."""
    whole, part = parted(spec)
    return (whole, part) if part else None


def whole(spec: str) -> Path:
    """The place of what a spec is a half of, or is itself, however it is written."""
    return Path(parted(spec)[0]).resolve()


def overlap(one: str, two: str) -> bool:
    """Whether two sources share images: the same one unless they are its two halves, or a folder
    in the other's.
    """
    first, second = whole(one), whole(two)
    if first == second:
        halves = named(one), named(two)
        return None in halves or halves[0][1] == halves[1][1]  # type: ignore[index]
    return any(a.is_dir() and a in b.parents for a, b in ((first, second), (second, first)))


def held_out(name: str, share: float = SHARE, seed: int = SEED) -> bool:
    """Whether the image of this name is in the test half."""
    digest = hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split(source: Source, share: float = SHARE, seed: int = SEED) -> tuple[Subset, Subset]:
    """A source's two halves, train and test. Raises UsageError where one of them is empty, or for
    encoded sets, which are split before they are encoded.
    """
    if hasattr(source, "gather"):
        raise UsageError(
            f"{source.spec} is a packed set: split the images (`msmdiff data split`), then encode "
            "both halves"
        )
    test = [i for i in range(len(source)) if held_out(source.name(i), share, seed)]
    rest = sorted(set(range(len(source))) - set(test))
    if not test or not rest:
        raise UsageError(
            f"{source.spec} has {len(source)} images, too few for two halves with a share of "
            f"{share:g}"
        )
    return Subset(source, rest), Subset(source, test)


def half(source: Source, part: str, spec: str) -> Subset:
    """`train` or `test` of a source that the user wrote as `spec`."""
    chosen = split(source)[part == "test"]
    chosen.spec = spec
    return chosen


def chosen(source: Source, config: DataConfig) -> Source:
    """The images that `data.classes` and `data.share` ask for: of every k of a class the same
    number, so that a share of sorted images is of all of them.

    Raises UsageError where there are none, or the source's images cannot be chosen.
    """
    if config.classes is None and config.share == 1:
        return source
    asked = f"data.share {config.share:g}"
    if config.classes is not None:
        asked = f"data.classes {config.classes}"
    if hasattr(source, "gather"):
        raise UsageError(f"{asked}: {source.spec} is encoded; choose images before encoding them")
    names, labels = list(source.class_names), source.labels
    if config.classes is not None and labels is None:
        raise UsageError(f"{asked}: {source.spec} has no classes")
    for name in config.classes or []:
        if name not in names:
            raise UsageError(
                f"data.classes: {source.spec} has no class {name}{nearest(name, names)}"
            )
    wanted = range(len(names)) if config.classes is None else map(names.index, config.classes)
    groups = (
        [np.arange(len(source))]
        if labels is None
        else [np.flatnonzero(labels == number) for number in wanted]
    )
    kept: list[int] = []
    for group in groups:
        count = round(len(group) * config.share)
        kept += group[np.arange(count) * len(group) // max(1, count)].tolist()
    if not kept:
        raise UsageError(f"{asked} leaves none of the {len(source)} images of {source.spec}")
    return Subset(source, sorted(kept))
