"""Files of samples: what a folder of them claims, what its images are called, and the record of
their making.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from msmdiff.core import config as configuration
from msmdiff.core import files
from msmdiff.core.config import flatten
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.seeding import parse_range, spans

RECORD = "msmdiff"
"""What the record of its making is called inside a picture or an archive."""

ELSEWHERE = ("weights", "sample.guide", "codec.vae")
"""Places, for which checksums stand: what was moved is the same."""


class Folder:
    """A folder of sampled images, all made with the same settings.

    An image is called by its seed, and by its class where the classes have names:
    `000012-Flags.png`. A folder that was begun without the names goes on without them.

    Args:
        path: the folder.
        settings: what images are made with.
        class_of: the name of a seed's class, "" for none.
        overwrite: replace a record that this tool did not write.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        class_of: Callable[[int], str],
        overwrite: bool = False,
    ) -> None:
        self.path, self.settings, self.overwrite = path, settings, overwrite
        self._class_of = class_of
        self._names_classes: bool | None = None

    def image(self, seed: int) -> Path:
        """Where a seed's image lies, or will. The folder must be claimed, by whichever process."""
        if self._names_classes is None:
            stored = _stored_record(self.path / "sample.json") or {}
            self._names_classes = bool(stored.get("names_classes"))
        name = _plain(self._class_of(seed)) if self._names_classes else ""
        return self.path / f"{seed:06d}{'-' if name else ''}{name}.png"

    def record(self, seeds: Iterable[int]) -> None:
        """Write what the folder holds."""
        about = {**self.settings, "seeds": spans(seeds), "names_classes": self._names_classes}
        files.write_json(self.path / "sample.json", about)

    def claim(self, held: ExitStack) -> list[int]:
        """Make the folder, or check that what it holds was sampled with the same settings: sets
        must not mix. No other process writes to it as long as `held` is open.

        The settings are written before the first image. Returns the seeds of an earlier, finished
        sampling.
        """
        out, settings = self.path, self.settings
        with files.writing(out):
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(files.Lock(out, f"another process is sampling into {out}: wait"))
        stored = _stored_record(out / "sample.json")
        drawn = any(path.suffix == ".png" for path in out.iterdir())
        if stored is None:
            files.require_ours(out / "sample.json", False, self.overwrite)
            if drawn:
                raise UsageError(
                    f"{out} holds images that were not sampled here: give another --out"
                )
        if stored is None or not drawn:  # a sampling that failed at once claims nothing
            self._names_classes = True
            self.record([])
            return []
        self._names_classes = bool(stored.get("names_classes"))
        if isinstance(stored.get("sample"), dict):
            stored["sample"] = _of_today(stored["sample"], out)
        old, new = flatten(stored), flatten(settings)
        changed = [
            f"{key}: {old.get(key)!r} there, {value!r} now"
            for key, value in new.items()
            if key not in ELSEWHERE and old.get(key) != value
        ]
        if changed:
            raise UsageError(
                f"{out} holds images sampled with other settings ({'; '.join(changed)}): give "
                "another --out"
            )
        for part in out.glob(".[0-9]*.png.part"):
            part.unlink()  # of a process that was killed while writing
        return parse_range(stored["seeds"], "seeds") if stored.get("seeds") else []


def _plain(name: str) -> str:
    """A class's name as a part of a file's: `Food & Drink` is Food-Drink. No underscore, which
    would make a class of what stands before it.
    """
    return re.sub(r"[^\w.]+|_", "-", name)[:40].strip("-.")


def is_whole(path: Path) -> bool:
    """Whether a PNG is there down to its end mark."""
    try:
        return path.read_bytes().endswith(b"IEND\xaeB`\x82")
    except OSError:
        return False


def save(picture: Image.Image, path: Path, record: dict[str, Any] | None = None) -> Path:
    about = PngInfo()
    if record is not None:
        about.add_text(RECORD, json.dumps(record))
    with files.atomic(path) as part:
        picture.save(part, format="PNG", pnginfo=about)
    return path


def is_ours(path: Path) -> bool:
    """Whether a picture or an archive carries the record of what made it."""
    with suppress(MsmdiffError), files.reading(path, "a picture or an archive"):
        if not path.is_file():
            return False
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return f"{RECORD}.npy" in archive.namelist()
        with Image.open(path) as picture:
            return RECORD in picture.info
    return False


def _of_today(sample: dict[str, Any], out: Path) -> dict[str, Any]:
    """A stored `sample` section in the keys of today; as it is where it chose what is not there
    today, such as a plugin's sampler: then it differs in any case.
    """
    layer = configuration.stored({"sample": sample}, str(out))
    try:
        section = configuration.section("sample", **layer["sample"])
    except UsageError:
        return sample
    return dict(section.model_dump(mode="json"))


def _stored_record(path: Path) -> dict[str, Any] | None:
    """What `Gallery` wrote into a folder, or None where there is nothing of it."""
    if not path.is_file():
        return None
    with files.reading(path, "a record of samples"):
        content = path.read_bytes()
    with suppress(ValueError):
        stored = json.loads(content)
        if isinstance(stored, dict) and {"sha256", "sample", "seeds"} <= stored.keys():
            return stored
    return None
