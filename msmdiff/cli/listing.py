"""`list`: what there is to choose from, and the options of each choice."""

from typing import Annotated, Any

import typer

NAMES = {
    "models": "size",
    "backbones": "backbone",
    "masks": "mask",
    "routes": "route",
    "schedules": "schedule",
    "predictions": "prediction",
    "weightings": "weighting",
    "time-samplings": "time_sampling",
    "objectives": "objective",
    "alignments": "alignment",
    "codecs": "codec",
    "samplers": "sampler",
    "times": "times",
    "guidance": "guidance",
    "optimisers": "optimiser",
    "metrics": "metric",
    "features": "features",
    "sources": "source",
    "layouts": "layout",
}
"""What users call the kinds of the registry."""

OTHERS = ("presets", "plugins", "keys")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "list",
        epilog="Examples: `msmdiff list` · `msmdiff list samplers` · `msmdiff list samplers ddim` "
        "· `msmdiff list keys train` · `msmdiff list presets digits-edt`",
    )(listing)


def listing(
    what: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help=f"One of {', '.join((*NAMES, *OTHERS))}.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Argument(help="One of its names, to see the options; of keys, a section or one key."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Only JSON, on stdout.")] = False,
) -> None:
    """Show what can be chosen (models, samplers, presets, ...), and the options of each choice."""
    from msmdiff.cli.console import Console, print_json

    what = _plural(what)
    header, rows = table(what, name)
    if as_json:
        print_json([dict(zip(header, row, strict=True)) for row in rows])
    else:
        Console().table(
            " ".join(x for x in (what or "kinds", name) if x), header, rows, figures=False
        )


Rows = list[tuple[str, ...]]


def table(what: str | None = None, name: str | None = None) -> tuple[tuple[str, ...], Rows]:
    """The header and the rows that `list WHAT NAME` shows; the reference pages show them too.

    Raises UsageError for a kind or a name that does not exist.
    """
    from msmdiff.core import registry
    from msmdiff.core.errors import UsageError, nearest

    known = [*NAMES, *OTHERS]
    if what is None:
        counted = [(kind, f"{len(_names(kind))} to choose from") for kind in known]
        rows: Rows = [(kind, count, NAMES.get(kind, "")) for kind, count in counted]
        return ("kind", "", "as plugins register it"), rows
    if what not in known:
        near = nearest(what, known)
        raise UsageError(f"list {what}: no such kind{near}; there are {', '.join(known)}")
    if what == "keys":
        return ("key", "default", "what it is"), _keys(name)
    if what == "presets" and name is not None:
        return ("key", "value"), _preset(name)
    if name is None:
        return ("name", "what it is"), _summaries(what)
    if what == "plugins":
        raise UsageError(f"list {what} {name}: {what} have no options")
    entry = registry.find(NAMES[what], name, f"list {what}")
    return ("option", "default", "what it is"), _options(entry)


def _plural(what: str | None) -> str | None:
    """What users call a kind, of what plugins call it or of one of them: `sampler`, `preset`."""
    plural = {kind: name for name, kind in NAMES.items()} | {name[:-1]: name for name in OTHERS}
    return plural.get(what, what) if what is not None and what not in NAMES else what


def _preset(name: str) -> list[tuple[str, ...]]:
    """What a preset sets, its base's keys included."""
    from msmdiff.core import presets
    from msmdiff.core.config import flatten
    from msmdiff.core.errors import UsageError, nearest

    if name not in presets.names():
        near = nearest(name, presets.names())
        raise UsageError(f"list presets {name}: no such preset{near}")
    return [(key, _shown(value)) for key, value in flatten(presets.read(name)).items()]


def _names(what: str) -> list[str]:
    return [row[0] for row in (_keys(None) if what == "keys" else _summaries(what))]


def _summaries(what: str) -> list[tuple[str, ...]]:
    from msmdiff.core import presets, registry

    if what == "presets":
        return [(name, presets.summary(name)) for name in presets.names()]
    if what == "plugins":
        loaded = registry.plugins()
        offered = dict.fromkeys(registry.installed(), "installed; load it with --plugin")
        return [*(offered | loaded).items()]
    found = registry.entries(NAMES[what]).values()
    return [(e.name, e.summary + (f" (plugin {e.plugin})" if e.plugin else "")) for e in found]


def _options(entry: Any) -> list[tuple[str, ...]]:
    if isinstance(entry.make, dict):  # a size is a table of its backbone's options
        return [(key, str(value), "") for key, value in entry.make.items()]
    return [_row(key, field) for key, field in entry.options.model_fields.items()]


def _keys(wanted: str | None) -> list[tuple[str, ...]]:
    """Every key that does not depend on a choice, and where the choices are; of a section, or one
    of them alone.
    """
    from msmdiff.core.errors import UsageError, nearest
    from msmdiff.core.layers import SECTIONS

    section, dot, one = (wanted or "").partition(".")
    if dot and section in SECTIONS:
        rows = [row for row in _keys(section) if row[0] == wanted]
        if not rows:
            near = nearest(one, list(SECTIONS[section].model_fields))
            raise UsageError(
                f"list keys {wanted}: no such key{near}; those of a choice are shown beside it, as "
                "by `msmdiff list samplers ddim`"
            )
        return rows
    if section and section not in SECTIONS:
        near = nearest(section, list(SECTIONS))
        raise UsageError(f"list keys {section}: no such section{near}: {', '.join(SECTIONS)}")
    shown = {kind: name for name, kind in NAMES.items()}
    rows = []
    for name in [section] if section else SECTIONS:
        for key, field in SECTIONS[name].model_fields.items():
            dotted, default, about = _row(f"{name}.{key}", field)
            kind = SECTIONS[name].CHOICES.get(key)
            more = f" See `msmdiff list {shown[kind]}`." if kind else ""
            rows.append((dotted, default, about + more))
    return rows


def _row(key: str, field: Any) -> tuple[str, str, str]:
    default = "required" if field.is_required() else field.get_default(call_default_factory=True)
    return key, _shown(default), field.description or ""


def _shown(value: Any) -> str:
    """A value as YAML has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
