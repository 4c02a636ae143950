"""Whether the images of a data set can be read: looked at before the first training, remembered."""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from msmdiff.core import files
from msmdiff.core.data import sources
from msmdiff.core.data.latents import Latents
from msmdiff.core.data.source import Source
from msmdiff.core.errors import MsmdiffError
from msmdiff.core.sections import DataConfig

Report = Callable[[str], None]
Verdict = dict[int, str]
"""The images that cannot be read, and why."""

MANY = 50_000
"""Of more images than this, `data.verify=auto` looks at the beginnings of the files only."""

AT_ONCE = 4096
"""Images between two looks at the clock."""

REPORT_EVERY, REMEMBER_EVERY = 10.0, 30.0
"""Seconds between two notes on how far it is, and between two notes of it on the disk."""


def open_training(config: DataConfig, report: Report) -> Source:
    """Open a data set for training and check its images, see `checked`."""
    return checked(opened(config, report), config, report)


def opened(config: DataConfig, report: Report) -> Source:
    """The source of a `data` section, its images not looked at yet."""
    source = sources.open_configured(config)
    if source.unlabelled:
        report(f"note: {config.source} has {source.unlabelled}")
    return source


def checked(
    source: Source,
    config: DataConfig,
    report: Report,
    shared: Callable[[Callable[[], Verdict]], Verdict] = lambda make: make(),
) -> Source:
    """The source without the images that cannot be read.

    By `data.verify`, every image is decoded once (`all`), or its file's beginning is looked at and
    the rest is found out when it is read (`lazy`). Unreadable images stop the training by name, or
    are left out when `data.skip_unreadable` is set; what was left out is reported. The verdict is
    remembered per listing (names, sizes, times) in the user's cache folder, also of a check that
    was broken off.

    `shared` hands the verdict of the first of several processes to all; it is called only where
    there is something to check.
    """
    way = _way(source, config)
    if way == "off":
        return source
    bad = shared(lambda: _verdict(source, way, report))
    if not bad:
        return source
    listed = [f"{source.name(i)} ({reason})" for i, reason in list(bad.items())[:5]]
    summary = f"{len(bad)} of {len(source)} images in {config.source} cannot be read: "
    summary += "; ".join(listed) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    if not config.skip_unreadable:
        raise MsmdiffError(
            f"{summary}. Repair or remove them, or leave them out: --set "
            "data.skip_unreadable=true where training, "
            "--skip-unreadable where packing"
        )
    if len(bad) == len(source):
        raise MsmdiffError(summary)
    report(f"left out: {summary}")
    return sources.Subset(source, [i for i in range(len(source)) if i not in bad])


def _way(source: Source, config: DataConfig) -> Literal["off", "lazy", "all"]:
    if config.verify == "off" or source.verified or isinstance(source, Latents):
        return "off"
    if config.verify == "auto":
        return "lazy" if len(source) > MANY else "all"
    return config.verify


def _verdict(source: Source, way: Literal["lazy", "all"], report: Report) -> Verdict:
    """The images that cannot be read, and why: looked at now, or remembered.

    What failed is looked at again each time, and nothing is remembered where the disk failed and
    not a file: a repair need not change a name, a size or a time.
    """
    place = _place(source, way)
    known = _remembered(place, len(source))
    if known is None and len(source) > 10 * AT_ONCE:
        how = "the beginnings of " if way == "lazy" else ""
        report(f"checking {how}all {len(source):,} images of {source.spec} once (data.verify)")
    done, failed = known or (0, [])
    look = source.image if way == "all" else source.glance
    errors = sources.failing(look, failed)
    started = told = kept = time.monotonic()
    whole = not failed and done == len(source)
    for first in range(done, len(source), AT_ONCE):
        done = min(first + AT_ONCE, len(source))
        errors |= sources.failing(look, range(first, done))
        now = time.monotonic()
        if now - told > REPORT_EVERY:
            told = now
            left = (now - started) / (done - (known or (0, []))[0]) * (len(source) - done)
            report(f"checked {done:,} of {len(source):,} images, {left / 60:.0f} minutes left")
        if now - kept > REMEMBER_EVERY:
            kept = now
            _remember(place, done, errors)
    if not whole:
        _remember(place, done, errors)
    return {index: files.reason(error) for index, error in sorted(errors.items())}


def _place(source: Source, way: str) -> Path:
    digest = hashlib.sha256(f"{way}\n".encode() if way == "lazy" else b"")
    text = "\n".join(source.describe(i) for i in range(len(source)))
    digest.update(text.encode(errors="surrogateescape"))
    return files.cache_folder() / "verified" / f"{digest.hexdigest()[:32]}.json"


def _remember(place: Path, done: int, errors: dict[int, MsmdiffError]) -> None:
    if any(files.passing(error) for error in errors.values()):
        return
    # A cache that cannot be written costs the next start some time, nothing else.
    with suppress(MsmdiffError):
        files.write_json(place, {"done": done, "failed": sorted(errors)})


def _remembered(place: Path, count: int) -> tuple[int, list[int]] | None:
    """How many images were looked at, and which of them could not be read; None where that is not
    known.
    """
    try:
        stored = json.loads(files.read_text(place))
        done, failed = int(stored["done"]), [int(index) for index in stored["failed"]]
    except (MsmdiffError, ValueError, TypeError, KeyError, RecursionError):
        return None
    fits = 0 <= done <= count and all(0 <= index < done for index in failed)
    return (done, failed) if fits else None
