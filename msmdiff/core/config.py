"""The configuration: typed sections, put together from layers, and what may change when a run is
resumed.

Precedence: defaults < preset or YAML file < named flags < `--set section.key=value`. A section has
the keys that are common to all choices (`sections`) and the options of what it chooses, which are
declared beside the thing that is chosen (`registry`).
"""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, create_model

from msmdiff.core import registry, sections
from msmdiff.core.errors import UsageError, nearest
from msmdiff.core.layers import SECTIONS, merge
from msmdiff.core.presets import dump_yaml, parse_yaml, read
from msmdiff.core.registry import Entry
from msmdiff.core.sections import AUTO, Section
from msmdiff.core.sections import (
    ModelConfig as ModelConfig,
)  # what Python users build networks from


class Config(Section):
    """Every section, complete. Made by `build`.

    `plugins` are the names of the plugins without which it cannot be read.
    """

    data: sections.DataConfig
    codec: sections.CodecConfig
    model: sections.ModelConfig
    process: sections.ProcessConfig
    mask: sections.MaskConfig
    objective: sections.ObjectiveConfig
    optim: sections.OptimConfig
    ema: sections.EmaConfig
    train: sections.TrainConfig
    sample: sections.SampleConfig
    eval: sections.EvalConfig
    plugins: list[str] = Field(default=[])

    def as_dict(self) -> dict[str, Any]:
        """Everything, as it is stored. Of a choice that was left open, options that only plugins
        take and nobody gave are left out, so that it is read without those plugins.
        """
        content = {}
        for name in SECTIONS:
            section = getattr(self, name)
            content[name] = section.model_dump(mode="json", exclude=_ungiven(name, section))
        return {**content, "plugins": list(self.plugins)}

    def to_yaml(self) -> str:
        return dump_yaml(self.as_dict())


# Keys that may differ when a run is resumed: they change when things are shown or saved, never what
# is computed.
MUTABLE = re.compile(
    r"train\.(steps|max_seconds|log_every|checkpoint_every|keep_checkpoints|preview_every|trackers)"
    r"|data\.(workers|verify)|codec\.vae_sha256|sample\..*|eval\..*|plugins"
)


# ------------------------------------------------------------------ from layers to a configuration


def build(*layers: dict[str, Any]) -> Config:
    """Merge nested dictionaries, later ones winning, and validate the result.

    A layer's `plugins` are loaded first. Raises UsageError that lists every problem at once, an
    unknown key with the nearest valid name.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        _check_shape(layer)
        for spec in layer.get("plugins") or []:
            registry.load_plugin(str(spec), "plugins:")
        merged = merge(merged, layer)
    merged.pop("plugins", None)
    problems = [f"unknown configuration key '{name}'{nearest(name, list(SECTIONS))}"
                for name in merged if name not in SECTIONS]  # fmt: skip
    complete: dict[str, Section] = {}
    for name in SECTIONS:
        try:
            complete[name] = section(name, **merged.get(name, {}))
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("; ".join(problems))
    return Config(**complete, plugins=_plugins_of(complete))


def section(name: str, /, **fields: Any) -> Any:
    """One section from its keys, with the options of what it chooses.

    Raises UsageError for a wrong value, an unknown choice or key, and a key that belongs to another
    choice than the one that is made.
    """
    kind = SECTIONS[name]
    fields = kind.prepare(fields)
    chosen = choices(name, fields)
    try:
        return _complete(kind, tuple(entry.options for entry in chosen))(**fields)
    except ValidationError as error:
        problems = [_explain(name, fields, problem) for problem in error.errors()]
        raise UsageError("; ".join(problems)) from None


def choices(name: str, fields: dict[str, Any]) -> list[Entry]:
    """What a section's fields choose. What is still automatic may be any of its kind."""
    found: list[Entry] = []
    for key, kind in SECTIONS[name].CHOICES.items():
        value = fields.get(key, SECTIONS[name].model_fields[key].default)
        if value in (None, AUTO):
            found += registry.entries(kind).values()
        else:
            found.append(registry.find(kind, value, f"{name}.{key}"))
    return found


@cache
def _complete(kind: type[Section], options: tuple[type[registry.Options], ...]) -> type[Section]:
    """The section's model with the fields of its choices' options."""
    distinct = [each for each in dict.fromkeys(options) if each is not registry.Options]
    # A model's bases must not repeat a base of another one.
    leaves = [o for o in distinct if not any(o is not other and issubclass(other, o)
                                             for other in distinct)]  # fmt: skip
    bases: Any = (kind, *leaves)
    return create_model(kind.__name__, __base__=bases) if leaves else kind


def _plugins_of(complete: dict[str, Section]) -> list[str]:
    """The plugins that what is chosen comes from, and the options that were given."""
    found: set[str] = set()
    for name, content in complete.items():
        for offered in _of_plugins(name, content):
            own = set(offered.options.model_fields) - _built_in(name)
            if own & content.model_fields_set:
                found.add(offered.plugin or "")
        for key, kind in SECTIONS[name].CHOICES.items():
            entry = registry.entries(kind).get(str(getattr(content, key)))
            if entry is not None and entry.plugin:
                found.add(entry.plugin)
    model = complete["model"].model_dump()
    for kind, value in (("size", model["name"]), ("backbone", model["family"])):
        entry = registry.entries(kind).get(value)
        if entry is not None and entry.plugin:
            found.add(entry.plugin)
    return sorted(found)


def _of_plugins(name: str, content: Section) -> list[Entry]:
    """What plugins bring to a choice that a section leaves open."""
    found: list[Entry] = []
    for key, kind in SECTIONS[name].CHOICES.items():
        if getattr(content, key) in (None, AUTO):
            found += [entry for entry in registry.entries(kind).values() if entry.plugin]
    return found


def _ungiven(name: str, content: Section) -> set[str]:
    """The options of plugins that might have been chosen, and were not given."""
    options = {key for entry in _of_plugins(name, content) for key in entry.options.model_fields}
    return options - content.model_fields_set - _built_in(name)


def _built_in(name: str) -> set[str]:
    """The keys of a section that need no plugin."""
    keys = set(SECTIONS[name].model_fields)
    for kind in SECTIONS[name].CHOICES.values():
        for entry in registry.entries(kind).values():
            keys |= set() if entry.plugin else set(entry.options.model_fields)
    return keys


def preset(name: str) -> dict[str, Any]:
    """The layer of a preset or a YAML file; a run's own config.yaml is read as runs are.

    Raises UsageError where there is no such preset or file.
    """
    content = read(name)
    if Path(name).is_file() and (Path(name).parent / "run.json").is_file():
        return stored(content, name)
    return content


def stored(content: dict[str, Any], where: str) -> dict[str, Any]:
    """Turn a configuration that a file of ours holds into a layer that is valid today.

    Older files hold the keys of every choice; those of choices that were not made are left out.
    Raises UsageError if it needs a plugin that is not loaded: a file never loads one.
    """
    registry.require_plugins(content.get("plugins") or [], where)
    layer: dict[str, Any] = {}
    for name, fields in content.items():
        if name not in SECTIONS or not isinstance(fields, dict):
            continue
        fields = SECTIONS[name].prepare(fields)
        foreign = _foreign(name, fields)
        layer[name] = {key: value for key, value in fields.items() if key not in foreign}
    if "model" in layer:
        layer["model"] = {**_network_defaults(layer["model"]), **layer["model"]}
    return layer


def settled(name: str, chosen: Section) -> Any:
    """A section whose automatic choice has been made, without the options of other choices.

    Raises UsageError if such an option was given.
    """
    fields = chosen.model_dump()
    usual = {key: field.default for key, field in type(chosen).model_fields.items()}
    foreign = _foreign(name, fields) & fields.keys()
    idle = {key for key in foreign if fields[key] == usual[key]}
    return section(name, **{key: value for key, value in fields.items() if key not in idle})


def _foreign(name: str, fields: dict[str, Any]) -> set[str]:
    """The options of choices that a section's fields do not make."""
    taken = {key for entry in choices(name, fields) for key in entry.options.model_fields}
    return set(_takers(name)) - taken - set(SECTIONS[name].model_fields)


def _network_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """What a network takes that was not there yet when a file was written."""
    entry = registry.entries("backbone").get(str(fields.get("family")))
    if entry is None:
        return {}
    options = entry.options.model_fields
    return {key: field.default for key, field in options.items() if not field.is_required()}


def _takers(name: str) -> dict[str, list[str]]:
    """For every option of a section's choices: which of them take it."""
    found: dict[str, list[str]] = {}
    for kind in SECTIONS[name].CHOICES.values():
        for entry in registry.entries(kind).values():
            for key in entry.options.model_fields:
                found.setdefault(key, []).append(entry.name)
    return found


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1, "a.c": None}` -> `{"a": {"b": 1}}`: None means not given."""
    out: dict[str, Any] = {}
    for dotted, value in flat.items():
        if value is not None:
            node = out
            *parents, leaf = dotted.split(".")
            for name in parents:
                node = node.setdefault(name, {})
            node[leaf] = value
    return out


def parse_sets(items: list[str]) -> dict[str, Any]:
    """`["optim.lr=1e-4", "mask.kind=block"]` -> nested dictionary; values are read as YAML.

    Raises UsageError for an item without `=` or without a section.
    """
    out: dict[str, Any] = {}
    for item in items:
        dotted, equals, text = item.partition("=")
        if not equals or "." not in dotted:
            raise UsageError(
                f"--set {item}: write section.key=value, for example --set optim.lr=1e-4"
            )
        node = out
        *parents, leaf = dotted.strip().split(".")
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise UsageError(
                    f"--set {item}: {name} was given a value before, it cannot hold {leaf}"
                )
        node[leaf] = parse_yaml(text, f"--set {item}")
    return out


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    out: dict[str, Any] = {}
    for name, value in nested.items():
        out |= (
            flatten(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: value}
        )
    return out


def plain(config: Config) -> dict[str, int | float | str | bool]:
    """One flat table of numbers and text, which is what experiment trackers take."""
    flat = flatten(config.as_dict())
    return {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in flat.items()}


def difference(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The keys in which two configurations compute different things, as `{key: (old, new)}`."""
    a, b = flatten(old.as_dict()), flatten(new.as_dict())
    keys = [k for k in [*a, *(k for k in b if k not in a)] if a.get(k) != b.get(k)]
    return {k: (a.get(k), b.get(k)) for k in keys if not MUTABLE.fullmatch(k)}


# ------------------------------------------------------------------ messages


def _explain(name: str, fields: dict[str, Any], problem: Any) -> str:
    # Beyond a key are places in a list, and names that the library gives to alternatives.
    places = [part for i, part in enumerate(problem["loc"]) if i == 0 or isinstance(part, int)]
    where = ".".join(map(str, (name, *places)))
    key = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        takers = _takers(name)
        if key in takers:
            return _no_effect(name, fields, key, takers[key])
        known = [*SECTIONS[name].model_fields, *takers]
        return f"unknown configuration key '{where}'{nearest(key, known)}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if problem["type"] == "missing":  # there the library gives all the other values
        return f"{where}: {message}"
    return f"{where} = {problem['input']!r}: {message}"


def _no_effect(name: str, fields: dict[str, Any], key: str, takers: list[str]) -> str:
    """A key of another choice than the one that is made."""
    for choice, kind in SECTIONS[name].CHOICES.items():
        entries = registry.entries(kind)
        if any(taker in entries for taker in takers):
            made = fields.get(choice, SECTIONS[name].model_fields[choice].default)
            what = f"{kind.replace('_', ' ')} {made}"
            break
    value = fields[key]
    shown = f"{value:g}" if isinstance(value, float) else value
    return f"{name}.{key} {shown} has no effect on the {what}, only on {_listed(takers)}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _check_shape(layer: dict[str, Any]) -> None:
    for name, content in layer.items():
        if content is not None and not isinstance(content, dict) and name in SECTIONS:
            raise UsageError(f"{name} must be a mapping of keys, not {content!r}")
    specs = layer.get("plugins")
    if specs is not None and not isinstance(specs, list):
        raise UsageError(f"plugins must be a list of files or names, not {specs!r}")
