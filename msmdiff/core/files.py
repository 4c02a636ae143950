"""Files that are written whole or not at all."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msmdiff.core.errors import MsmdiffError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place at the end. Makes the folder.

    Raises MsmdiffError where it cannot be written; what was there before is intact then.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except OSError as error:
        raise MsmdiffError(f"{path} cannot be written: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    """One text in a file, as UTF-8."""
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """One JSON document in a file."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def checksum(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
