"""File names: which are images, what they say of classes, and how they are shown. One rule for
folders and archives.
"""

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from msmdiff.core.data.images import SUFFIXES
from msmdiff.core.errors import UsageError
from msmdiff.core.files import reading

LEFT_BY_SYSTEMS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")
"""Folders that no user made: of macOS' archives, Synology's previews, Windows' drives."""


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is passed over, with all that is in it."""
    return name.startswith(".") or name in LEFT_BY_SYSTEMS


def shown(name: str) -> str:
    """A name on one line, in characters that UTF-8 has: the others' bytes as %XX, a backslash too,
    which archives take for a separator.
    """
    return "".join(
        "".join(f"%{byte:02X}" for byte in c.encode("utf-8", "surrogateescape"))
        if c == "\\" or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
        else c
        for c in name
    )


def separated(name: str) -> str:
    """An archive's name with `/` between its parts, whatever made the archive."""
    parts = name.replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def sorted_out(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The images among names with `/` between their parts, in order; and what is left out: other
    files, hidden ones, and hidden folders, each named once, with a `/`.

    The caption of an image, a .txt beside it, is neither.
    """
    images, others = [], set()
    for name in names:
        parts = PurePosixPath(name).parts
        first = next((i for i, part in enumerate(parts) if hidden(part)), None)
        if first is not None:
            inside = first + 1 < len(parts) or name.endswith("/")
            others.add("/".join(parts[: first + 1]) + ("/" if inside else ""))
        elif PurePosixPath(name).suffix.lower() in SUFFIXES:
            images.append(name)
        else:
            others.add(name)
    captions = {str(PurePosixPath(name).with_suffix(".txt")) for name in images}
    return sorted(images), sorted(others - captions)


def walk(root: Path) -> Iterable[str]:
    """The names of all files in a folder, and of hidden folders, which are not entered.

    Raises Unreadable for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        with reading(error.filename, "a folder"):
            raise error

    seen = {root.resolve()}
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        relative = PurePosixPath(Path(folder).relative_to(root).as_posix())
        yield from (f"{relative / name}/" for name in subfolders if hidden(name))
        real = {name: (Path(folder) / name).resolve() for name in subfolders if not hidden(name)}
        # A link may lead back up.
        subfolders[:] = [name for name, target in real.items() if target not in seen]
        seen.update(real.values())
        yield from (str(relative / name) for name in files)


def classes(
    names: list[str], rule: str, spec: str
) -> tuple[np.ndarray | None, list[str], str | None]:
    """The labels of images, the classes' names, and what keeps `auto` from seeing classes where
    most names have one.

    `rule` is as for `sources.open_source`. Raises UsageError when a rule that is asked for does
    not fit.
    """
    # An archive of one folder (`zip -r photos.zip photos`) has its classes one level further down.
    parents = [PurePosixPath(n).parts[:-1] for n in names]
    common = next(
        (i for i, level in enumerate(zip(*parents, strict=False)) if len(set(level)) > 1), 0
    )
    inside = all(len(p) > common for p in parents)
    deeper = [PurePosixPath(n).parts[common if inside else 0 :] for n in names]
    folders = [parts[0] if len(parts) > 1 else None for parts in deeper]
    stems = [re.match(r"[^_]+(?=_)", PurePosixPath(n).name) for n in names]
    prefixes = [m.group() if m else None for m in stems]
    by_rule = {
        "folders": (folders, "class/image.png"),
        "adm": (prefixes, "ClassID_anything.jpg"),
    }
    if rule == "auto":
        if None not in folders and len(set(folders)) > 1:
            rule = "folders"
        elif None not in prefixes and 1 < len(set(prefixes)) <= len(names) // 2:
            rule = "adm"
        else:
            return None, [], _stray(names, folders) or _stray(names, prefixes)
    if rule == "none":
        return None, [], None
    keys, form = by_rule[rule]
    if None in keys:
        name = shown(names[keys.index(None)])
        raise UsageError(
            f"data.labels is '{rule}', but {spec} holds {name}, which is not of the form {form}"
        )
    found = sorted({k for k in keys if k is not None})
    index = {c: i for i, c in enumerate(found)}
    labels = np.array([index[k] for k in keys if k is not None], dtype=np.int64)
    return labels, [shown(name) for name in found], None


def _stray(names: list[str], keys: list[str | None]) -> str | None:
    """Names the images that have no class where more than half of them have one of several."""
    without = [shown(name) for name, key in zip(names, keys, strict=True) if key is None]
    known = sorted({shown(key) for key in keys if key is not None})
    if not without or len(without) >= len(names) / 2 or not 1 < len(known) <= len(names) // 2:
        return None
    more = f" and {len(without) - 1} more" if len(without) > 1 else ""
    return (
        f"no labels: {without[0]}{more} belongs to none of the classes that the other names have "
        f"({', '.join(known[:3])}{', ...' if len(known) > 3 else ''}): move or remove it"
    )
