"""YAML in and out; and the presets, which lie in `configs/` and may name a `base:`."""

import re
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from msmdiff.core.errors import UsageError, nearest
from msmdiff.core.layers import merge

# ------------------------------------------------------------------ YAML 1.2

_NULL = re.compile(r"|~|null|Null|NULL")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# What the library makes of a scalar that has no tag; what it is, is for `_scalar` to say.
_IMPLIED = {"str", "int", "float", "bool", "null", "timestamp", "value", "merge"}


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML 1.2 text by its core schema: `no` and `2024-01-01` are strings, `1e-4` is a number.

    Builds plain values only. Raises UsageError naming `where` for what is malformed, and for
    aliases, with which a short text can stand for an endless one.
    """
    try:
        return _plain(YAML(typ="safe", pure=True).compose(StringIO(text)), set())
    except (YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{where} is not valid YAML: {reason}") from None


def dump_yaml(content: Any) -> str:
    """Plain values -> YAML 1.2 text that `parse_yaml` reads as the same values."""
    out = StringIO()
    writer: Any = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False
    writer.allow_unicode = True
    writer.width = 2**20  # a folded line is hard to read, and no easier to edit
    writer.dump(content, out)
    return out.getvalue()


def _plain(node: Node | None, seen: set[int]) -> Any:
    if node is None:
        return None
    if id(node) in seen:
        raise ValueError("aliases (*name) are not read: write the value out")
    seen.add(id(node))
    if isinstance(node, SequenceNode):
        return [_plain(item, seen) for item in node.value]
    if isinstance(node, MappingNode):
        content: dict[Any, Any] = {}
        for key_node, value in node.value:
            key = _plain(key_node, seen)
            if not isinstance(key, str | int | float | bool | None):
                raise ValueError("a key must be one word or number")
            if key in content:
                raise ValueError(f"the key {key} stands twice")
            content[key] = _plain(value, seen)
        return content
    assert isinstance(node, ScalarNode)
    if str(node.tag).rpartition(":")[2] not in _IMPLIED:
        raise ValueError(f"the tag {node.tag} is not read")
    return node.value if node.style else _scalar(node.value)


def _scalar(text: str) -> str | int | float | bool | None:
    """A scalar without quotes, by YAML 1.2's core schema."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text in ("true", "True", "TRUE")
    if _INT.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", ""))
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
    """What a preset says of itself in its first line."""
    first = (folder() / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()


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
    near = nearest(name_or_path, names())
    raise UsageError(
        f"{where} {name_or_path}: no such file and no such preset{near}; presets: {names()}"
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
    base = content.pop("base", None)
    if base is None:
        return content
    under = _read(_locate(str(base), f"{path}: base", path.parent), (*above, path.resolve()))
    return merge(under, content)
