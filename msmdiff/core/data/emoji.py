"""The pictures of the npm packages `emoji-datasource-*`: small, in colour, of ten categories."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from msmdiff.core import files
from msmdiff.core.data.halves import parted
from msmdiff.core.data.images import Decoding, read_rgb
from msmdiff.core.data.source import Source
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import register

SIDE = 64
"""Of the pictures, in pixels; the packages' sheets hold smaller copies."""


@register("source", "emoji", summary="an unpacked npm package emoji-datasource-*[:train|:test]")
class Emoji(Source):
    """Every picture of a package `emoji-datasource-*` as it is unpacked, laid on white, with its
    category as class.

    `PATH:test` is every fifth emoji of each category, and `PATH:train` the others. Skin tones go
    with the emoji that they are of, so that no held-out picture has a twin in training.

    Raises UsageError for a package without pictures of 64 pixels, and Unreadable for a list or a
    picture that is damaged.
    """

    @classmethod
    def opens(cls, spec: str) -> bool:
        folder = Path(parted(spec)[0])
        return (folder / "emoji.json").is_file() and (folder / "img").is_dir()

    def __init__(self, spec: str) -> None:
        self.spec, (whole, part) = spec, parted(spec)
        folder = Path(whole)
        pictures = sorted(folder.glob(f"img/*/{SIDE}"))
        if len(pictures) != 1:
            raise UsageError(
                f"{folder}/img holds {len(pictures)} folders */{SIDE} of pictures: unpack one of "
                "the packages emoji-datasource-google, -twitter, -apple, -facebook"
            )
        entries = _entries(folder / "emoji.json")
        self.class_names = sorted({category for category, _ in entries})
        chosen = []
        for number, name in enumerate(self.class_names):
            own = [names for category, names in entries if category == name]
            for place, names in enumerate(own):
                if not part or (place % 5 == 0) == (part == "test"):
                    paths = [pictures[0] / each for each in names]
                    chosen += [(number, path) for path in paths if path.exists()]
        self.labels = np.array([number for number, _ in chosen], np.int64)
        self._paths = [path for _, path in chosen]

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> Image.Image:
        return _decoded(self._paths[index], self.decoding)

    def describe(self, index: int) -> str:
        return self._paths[index].name


@cache
def _decoded(path: Path, decoding: Decoding) -> Image.Image:
    """A picture, kept: all of a package's are 46 MB, and the trainings of a comparison share
    them.
    """
    return read_rgb(path, decoding)


def _entries(path: Path) -> list[tuple[str, list[str]]]:
    """Of every emoji: its category, and the files of its pictures, skin tones included. In the
    order of the code points, which further releases keep.
    """
    with files.reading(path, "a list of emoji"):
        content: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        content.sort(key=lambda entry: entry["unified"])
        return [(str(entry["category"]), _pictures_of(entry)) for entry in content]


def _pictures_of(entry: dict[str, Any]) -> list[str]:
    variants = entry.get("skin_variations", {}).values()
    return [Path(each["image"]).name for each in (entry, *variants)]
