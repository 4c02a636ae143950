"""Data sets of Hugging Face's `datasets` on disk: Parquet files, or what `save_to_disk` wrote."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from msmdiff.core import files
from msmdiff.core.data import names
from msmdiff.core.data.images import read_rgb
from msmdiff.core.data.source import Source
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import Options, register


class HuggingFaceOptions(Options):
    image_column: str | None = Field(
        None, description="The column of the images; null takes the only one."
    )
    label_column: str | None = Field(
        None, description="The column of the classes; null takes `label`, or the only such column."
    )


@register("source", "huggingface", HuggingFaceOptions, summary="Parquet, or datasets' save_to_disk")
class HuggingFace(Source):
    """`train.parquet`, a folder of Parquet files, or a folder that `save_to_disk` wrote, read by
    `datasets` (`pip install 'msmdiff[datasets]'`). Nothing is fetched.

    Raises UsageError where there is no such column, or the library is missing, and MsmdiffError for
    damaged files.
    """

    priority = 2

    @classmethod
    def opens(cls, spec: str) -> bool:
        path = Path(spec)
        if path.is_dir():
            return (path / "dataset_info.json").is_file() or _only_tables(path)
        return path.suffix == ".parquet" and path.is_file()

    def __init__(
        self, spec: str, *, image_column: str | None = None, label_column: str | None = None
    ) -> None:
        self.spec = spec
        rows = _opened(Path(spec))
        self._column = _image_column(rows, image_column, spec)
        label = _label_column(rows, label_column, spec)
        if label is not None:
            self._label(rows, label, asked=label_column is not None)
        # Its images are decoded here, by the one rule, and not by the library.
        import datasets

        self._rows = rows.select_columns([self._column])
        self._rows = self._rows.cast_column(self._column, datasets.Image(decode=False))
        if not len(self._rows):
            raise UsageError(f"{spec} holds no images")

    def _label(self, rows: Any, column: str, asked: bool) -> None:
        found = np.asarray(rows[column])
        known = getattr(rows.features[column], "names", None)
        if found.dtype.kind in "UO" and all(isinstance(value, str) for value in found):
            known, found = np.unique(found, return_inverse=True)
        if found.dtype.kind not in "iu" or found.min(initial=0) < 0:
            problem = f"column {column} holds {found.dtype}"
            if found.dtype.kind in "iu":
                problem = f"column {column} holds {found.min()}"
            if asked:
                raise UsageError(f"{self.spec}: {problem}, not classes of 0 or more, or names")
            self.unlabelled = f"no labels: {problem}"
            return
        self.labels = found.astype(np.int64)
        self.class_names = (
            [names.shown(name) for name in known]
            if known is not None
            else [str(i) for i in range(int(found.max()) + 1)]
        )

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Image.Image:
        return read_rgb(self.content(index), self.decoding)

    def content(self, index: int) -> bytes:
        with files.reading(f"{self.name(index)} of {self.spec}", "an image"):
            cell = self._rows[int(index)][self._column]
            if cell is None:
                raise ValueError("there is none")
            return cell["bytes"] if cell["bytes"] else files.read_bytes(cell["path"])

    def name(self, index: int) -> str:
        return f"row {index}"

    def describe(self, index: int) -> str:
        return f"{self.name(index)} of {self._rows._fingerprint}"


def _parquets(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.parquet") if not names.hidden(path.name))


def _only_tables(folder: Path) -> bool:
    """Whether a folder holds Parquet files, and nothing but what describes them: beside images, a
    table of captions is no data set.
    """
    there = [entry for entry in folder.iterdir() if not names.hidden(entry.name)]
    beside = (".parquet", ".json", ".txt", ".md")
    return bool(_parquets(folder)) and all(e.is_file() and e.suffix in beside for e in there)


def _opened(path: Path) -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise UsageError(f"{path} is read by `datasets`: pip install 'msmdiff[datasets]'")
    import datasets

    datasets.disable_progress_bars()
    with files.reading(path, "a data set of Parquet or Arrow files"):
        if (path / "dataset_info.json").is_file():
            return datasets.load_from_disk(str(path))
        found = _parquets(path) if path.is_dir() else [path]
        for file in found:
            files.require_regular(file)
        cache = files.cache_folder() / "datasets"
        rows = datasets.Dataset.from_parquet([str(file) for file in found], cache_dir=str(cache))
        return rows


def _image_column(rows: Any, wanted: str | None, spec: str) -> str:
    import datasets

    there = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    there += [name for name, kind in rows.features.items() if _holds_files(kind)]
    if wanted is not None:
        if wanted not in there:
            raise UsageError(
                f"data.image_column {wanted}: {spec} has images in {', '.join(there) or 'none'}"
            )
        return wanted
    if len(there) != 1:
        found = ", ".join(there) or f"none of {', '.join(rows.features)}"
        raise UsageError(f"{spec} has images in {found}: name a column with data.image_column")
    return there[0]


def _holds_files(kind: Any) -> bool:
    """Whether a column is of `bytes` and `path`, as images are without their type."""
    return isinstance(kind, dict) and set(kind) == {"bytes", "path"}


def _label_column(rows: Any, wanted: str | None, spec: str) -> str | None:
    import datasets

    if wanted is not None:
        if wanted not in rows.features:
            raise UsageError(f"data.label_column {wanted}: {spec} has {', '.join(rows.features)}")
        return wanted
    classes = [n for n, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
    return "label" if "label" in rows.features else classes[0] if len(classes) == 1 else None
