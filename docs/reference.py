"""Writes the reference pages when the site is built, from the registry and the command line.

Nothing of them is stored, so that they cannot be out of date. mkdocs calls `on_files`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer

from msmdiff.cli import app, listing

FAMILIES = {
    "digits": "On the embedded digits",
    "maskdm": "MaskDM",
    "uvit": "U-ViT",
    "dit": "DiT, and the routes on it",
    "sit": "SiT",
    "jit": "JiT",
    "mdt": "MDT",
    "mdtv2": "MDTv2",
    "edt": "EDT",
}
"""The presets' first words, and what the page calls each group."""


def on_files(files: Any, config: Any) -> Any:
    """mkdocs: add the pages to what is built."""
    from mkdocs.structure.files import File

    for name, write in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=write()))
    return files


def keys() -> str:
    """Every key of the configuration, section by section, with the options of each choice."""
    from msmdiff.core.layers import SECTIONS

    page = [
        "# Configuration keys",
        "`--set section.key=value` sets a key, and so does a YAML file. `null` means that the "
        "value is derived or not set. `msmdiff list keys` prints these tables.",
    ]
    plural = {kind: name for name, kind in listing.NAMES.items()}
    for section, model in SECTIONS.items():
        header, rows = listing.table("keys", section)
        page += [f"## {section}", _table(header, _coded(rows, 2))]
        for key, kind in model.CHOICES.items():
            page += _options(section, key, plural[kind])
    return _joined(page)


def _options(section: str, key: str, kind: str) -> Iterator[str]:
    """The options that the choices of one key bring, in one table."""
    _, choices = listing.table(kind)
    rows: list[tuple[str, ...]] = []
    for name, _ in choices:
        options = listing.table(kind, name)[1]
        rows += [(name, f"{section}.{o}", default, about) for o, default, about in options]
    if rows:
        yield f"### Options of `{section}.{key}`"
        yield _table(("choice", "key", "default", "what it is"), _coded(rows, 3))


def choices() -> str:
    """Everything that is chosen by name, kind by kind."""
    page = [
        "# Choices",
        "What each kind offers. `msmdiff list KIND` prints a table, `msmdiff list KIND NAME` the "
        "options of one choice. A [plugin](../plugins.md) adds to them.",
    ]
    for kind in listing.NAMES:
        if kind != "models":
            header, rows = listing.table(kind)
            page += [f"## {kind}", _table(header, _coded(rows, 1))]
    return _joined(page)


def models() -> str:
    """The published sizes, family by family."""
    page = [
        "# Models",
        "`--model NAME` takes a size. Every option in these tables is a key of `model` and can be "
        "changed: `--set model.depth=8`.",
    ]
    groups: dict[str, list[tuple[str, ...]]] = {}
    for name, about in listing.table("models")[1]:
        family, _, options = about.partition(": ")
        groups.setdefault(family, []).append((name, options))
    for family, rows in groups.items():
        header, options = listing.table("backbones", family)
        page += [f"## {family}", _table(("name", "options"), _coded(rows, 1))]
        page += [f"### Options of `{family}`", _table(header, _coded(options, 2))]
    return _joined(page)


def presets() -> str:
    """The presets, by family."""
    page = [
        "# Presets",
        "`--config NAME` takes a preset. `msmdiff list presets NAME` prints what one sets; the "
        "files are in `configs/`.",
    ]
    _, rows = listing.table("presets")
    for word, title in FAMILIES.items():
        page += [f"## {title}", _table(("name", "what it is"), _coded(_begun(rows, word), 1))]
    return _joined(page)


def _begun(rows: listing.Rows, word: str) -> listing.Rows:
    return [row for row in rows if row[0].partition("-")[0] == word]


def commands() -> str:
    """Every command with its arguments and options, as `--help` tells them."""
    page = ["# Commands", "Every command also takes `--help`."]
    for words, command in _commands(typer.main.get_command(app), ("msmdiff",)):
        page += [f"## {' '.join(words)}", _paragraphs(command.help)]
        rows = [_parameter(each) for each in command.params if each.name != "help"]
        if rows:
            page.append(_table(("option", "default", "what it does"), rows))
        if command.epilog:
            page.append(command.epilog)
    return _joined(page)


def _commands(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A command and those below it, each with the words that call it."""
    below = getattr(command, "commands", {})
    if not below or command.invoke_without_command:
        yield words, command
    for name, each in below.items():
        yield from _commands(each, (*words, name))


def _parameter(parameter: Any) -> tuple[str, ...]:
    names = [*parameter.opts, *parameter.secondary_opts]
    shown = "` `".join(names if parameter.param_type_name == "option" else [parameter.name.upper()])
    required = parameter.required and parameter.param_type_name == "option"
    default = "required" if required else _default(parameter.default)
    return f"`{shown}`", default, parameter.help or ""


def _default(value: Any) -> str:
    if value is None or value is False or value == () or callable(value):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


# ------------------------------------------------------------------ Markdown


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _coded(rows: Sequence[Sequence[str]], columns: int) -> listing.Rows:
    """The first columns of each row as code."""
    return [
        (*(f"`{cell}`" if cell else "" for cell in row[:columns]), *row[columns:]) for row in rows
    ]


def _paragraphs(text: str | None) -> str:
    paragraphs = (text or "").split("\n\n")
    return "\n\n".join(" ".join(each.split()) for each in paragraphs)


def _joined(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "commands": commands,
    "keys": keys,
    "presets": presets,
    "models": models,
    "choices": choices,
}
