"""YAML in and out; and the presets, which lie in `configs/` and may name a `base:`."""

import re
from collections.abc import Callable, Iterator
from importlib import resources
from io import StringIO
from itertools import takewhile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    MappingEndEvent,
    MappingStartEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
    StreamStartEvent,
)
from ruamel.yaml.representer import SafeRepresenter

from msmdiff.core.errors import UsageError, nearest
from msmdiff.core.layers import merge

# ------------------------------------------------------------------ YAML 1.2

Scalar = str | int | float | bool | None

# The core schema (YAML 1.2, section 10.3.2): what a scalar without quotes is, first match wins.
CORE_SCHEMA: list[tuple[re.Pattern[str], Callable[[str], Scalar]]] = [
    (re.compile(r"|~|null|Null|NULL"), lambda text: None),
    (re.compile(r"true|True|TRUE"), lambda text: True),
    (re.compile(r"false|False|FALSE"), lambda text: False),
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"0o[0-7]+"), lambda text: _integer(text, 8)),
    (re.compile(r"0x[0-9a-fA-F]+"), lambda text: _integer(text, 16)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (
        re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
        lambda text: float(text.replace(".", "")),
    ),
]


def _integer(text: str, base: int) -> int:
    # Python reads, but then cannot show, longer ones.
    if len(text) > 100:
        raise ValueError(f"{text[:20]}... has too many digits")
    return int(text, base)


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML 1.2 text by its core schema: `no` and `2024-01-01` are strings, `1e-4` is a number.

    Builds plain values only. Raises UsageError naming `where` for what is malformed, for tags, and
    for aliases, with which a short text can stand for an endless one.
    """
    try:
        return _Reader(text).document()
    except (YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{where} is not valid YAML: {reason}") from None


def dump_yaml(content: Any) -> str:
    """Plain values -> YAML 1.2 text that `parse_yaml` reads as the same values."""
    writer: Any = YAML(typ="safe", pure=True)
    writer.Representer = _Representer
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False
    writer.allow_unicode = True
    writer.width = 2**20  # a folded line is hard to read, and no easier to edit
    out = StringIO()
    writer.dump(content, out)
    return out.getvalue().removesuffix("...\n")  # what ends a document that is one word


class _Representer(SafeRepresenter):
    """Escapes what does not show; writes equal lists twice instead of once with an alias."""

    def represent_str(self, data: str) -> Any:
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Representer.add_representer(str, _Representer.represent_str)


class _Reader:
    """Builds the value of one document from the library's parsing events.

    Its own constructor is not used: that one follows aliases and tags, and raises whatever its
    conversions raise.
    """

    def __init__(self, text: str) -> None:
        reader: Any = YAML(typ="safe", pure=True)
        reader.version = (1, 2)
        self._events = iter(reader.parse(StringIO(text)))

    def document(self) -> Any:
        event = self._next()
        if isinstance(event, StreamEndEvent):
            return None
        value = self._value(self._next())
        self._next()  # the document's end
        if not isinstance(self._next(), StreamEndEvent):
            raise ValueError("it holds several documents: one is read")
        return value

    def _next(self) -> Any:
        """The next event after the stream's beginning."""
        return next(event for event in self._events if not isinstance(event, StreamStartEvent))

    def _value(self, event: Any) -> Any:
        if isinstance(event, AliasEvent):
            raise ValueError("aliases (*name) are not read: write the value out")
        if event.tag is not None:
            raise ValueError(f"tags (here {event.tag}) are not read: quote what is text")
        if isinstance(event, SequenceStartEvent):
            return list(self._items(SequenceEndEvent))
        if isinstance(event, MappingStartEvent):
            return self._mapping()
        return event.value if event.style else _scalar(event.value)

    def _items(self, end: type) -> Iterator[Any]:
        while not isinstance(event := self._next(), end):
            yield self._value(event)

    def _mapping(self) -> dict[Scalar, Any]:
        content: dict[Scalar, Any] = {}
        items = self._items(MappingEndEvent)
        for key in items:
            if isinstance(key, list | dict):
                raise ValueError("a key must be one word or number")
            if key in content:
                raise ValueError(f"the key {key} stands twice")
            content[key] = next(items)
        return content


def _scalar(text: str) -> Scalar:
    """A scalar without quotes."""
    for pattern, convert in CORE_SCHEMA:
        if pattern.fullmatch(text):
            return convert(text)
    return text


# ------------------------------------------------------------------ presets


def folder() -> Path:
    """Where the YAML presets lie: inside the wheel, or beside the package in a checkout."""
    inside = Path(str(resources.files("msmdiff"))) / "configs"
    return inside if inside.is_dir() else inside.parent.parent / "configs"


def names() -> list[str]:
    """Names that `--config` accepts; what lies in `base/` is for other presets to differ from."""
    root = folder()
    found = (path.relative_to(root) for path in root.rglob("*.yaml"))
    return sorted(str(path.with_suffix("")) for path in found if path.parts[0] != "base")


def summary(name: str) -> str:
    """What a preset says of itself in the first sentence of its comment."""
    lines = (folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    prose = takewhile(lambda line: re.match("# [^ ]", line), lines)
    text = " ".join(line.removeprefix("# ") for line in prose)
    return re.split(r"(?<=\.) (?=[A-Z])", text, maxsplit=1)[0].rstrip(":")


def read(name_or_path: str) -> dict[str, Any]:
    """Read a YAML file, or a preset by its name, over the base that it names.

    Raises UsageError when there is neither, or when the file is not a mapping of sections.
    """
    return _read(_locate(name_or_path, "--config"), ())


def _locate(name_or_path: str, where: str, beside: Path | None = None) -> Path:
    """A file, here or beside another one, or a preset's."""
    candidates = [Path(name_or_path), folder() / f"{name_or_path}.yaml"]
    if beside is not None:
        candidates.insert(0, beside / name_or_path)
    for path in candidates:
        if path.is_file():
            return path
    files = [path.name for path in beside.glob("*.y*ml")] if beside is not None else []
    raise UsageError(
        f"{where} {name_or_path}: no such file and no such preset"
        f"{nearest(name_or_path, [*files, *names()])}; `msmdiff list presets` shows them"
    )


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        raise UsageError(f"{path}: its base leads back to itself")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from None
    content = parse_yaml(text, str(path))
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UsageError(f"{path} must be a mapping of sections: data, model, train and so on")
    if isinstance(content.get("plugins"), list):
        content["plugins"] = [_beside(path, spec) for spec in content["plugins"]]
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise UsageError(f"{path}: base must be one preset's name or one file, not {base!r}")
    under = _read(_locate(base, f"{path}: base", path.parent), (*above, path.resolve()))
    return merge(under, content)


def _beside(path: Path, spec: Any) -> str:
    """A plugin's file that a YAML file names: beside it, or where the command runs."""
    beside = path.parent / str(spec)
    return str(beside) if str(spec).endswith(".py") and beside.is_file() else str(spec)
