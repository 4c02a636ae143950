"""Figures as PNG files that are known again for ours, so that another command may replace them."""

from pathlib import Path
from typing import Any

from PIL import Image

from msmdiff.core import files
from msmdiff.core.errors import MsmdiffError

MADE_BY = "msmdiff"
"""Stands in the PNG; those of one command have its name after it."""


def save(figure: Any, path: Path, dpi: int, made_by: str = MADE_BY) -> None:
    """A matplotlib figure as a PNG, which `ours` knows again."""
    with files.atomic(path) as part:
        figure.savefig(part, format="png", dpi=dpi, metadata={"Software": made_by})


def ours(path: Path, made_by: str = MADE_BY) -> bool:
    """Whether `save` wrote a file, for the same maker."""
    try:
        files.require_regular(path)
        with files.reading(path, "an image"), Image.open(path) as picture:
            return picture.info.get("Software") == made_by
    except MsmdiffError:
        return False
