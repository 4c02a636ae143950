"""YAML files of configurations, and the presets among them, which lie in `configs/`."""

import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from msmdiff.core.errors import UsageError, nearest


class _Yaml12Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `no` is a string, `1e-4` is a number."""


_Yaml12Loader.yaml_implicit_resolvers = {
    first: [
        (tag, rule) for tag, rule in rules if not tag.endswith((":bool", ":float", ":timestamp"))
    ]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"true|false|True|False"), list("tTfF")
)
_Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?|[-+]?\.inf|\.nan"),
    list("-+.0123456789"),
)
# Resolvers are tried in the order they were added: integers must keep winning over the float rule
# above.
for _first, _rules in _Yaml12Loader.yaml_implicit_resolvers.items():
    _rules.sort(key=lambda rule: not rule[0].endswith(":int"))


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML 1.2 text; raises UsageError naming `where` when it is malformed."""
    try:
        return yaml.load(text, Loader=_Yaml12Loader)  # a SafeLoader: builds plain values only
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def folder() -> Path:
    """Where the YAML presets lie: inside the wheel, or beside the package in a checkout."""
    inside = Path(str(resources.files("msmdiff"))) / "configs"
    return inside if inside.is_dir() else inside.parent.parent / "configs"


def names() -> list[str]:
    """Names that `--config` accepts."""
    root = folder()
    return sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))


def read(name_or_path: str) -> dict[str, Any]:
    """Read a YAML file, or a preset by its name.

    Raises UsageError when there is neither, or when the file is not a mapping of sections.
    """
    path = Path(name_or_path)
    if not path.is_file():
        path = folder() / f"{name_or_path}.yaml"
        if not path.is_file():
            near = nearest(name_or_path, names())
            raise UsageError(
                f"--config {name_or_path}: no such file and no such preset{near}; "
                f"presets: {names()}"
            )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from None
    content = parse_yaml(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path} must be a mapping of sections: data, model, train and so on")
    return content
