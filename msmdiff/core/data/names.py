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
    if name.isascii() and name.isprintable() and "\\" not in name:
        return name  # as nearly all of a million are
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
        # Strings, not paths: of a million names each microsecond is a second.
        if not _may_be_hidden(name):
            if suffix_of(name) in SUFFIXES:
                images.append(name)
            else:
                others.add(name)
            continue
        parts = PurePosixPath(name).parts
        first = next((i for i, part in enumerate(parts) if hidden(part)), None)
        if first is not None:
            inside = first + 1 < len(parts) or name.endswith("/")
            others.add("/".join(parts[: first + 1]) + ("/" if inside else ""))
        elif suffix_of(name) in SUFFIXES:
            images.append(name)
        else:
            others.add(name)
    texts = {name for name in others if name.endswith(".txt")}
    if texts:
        stems = {name[: len(name) - len(suffix_of(name))] for name in images}
        texts = {name for name in texts if name.removesuffix(".txt") in stems}
    return sorted(images), sorted(others - texts)


def suffix_of(name: str) -> str:
    """The suffix of a name with `/` between its parts, in lower case, with its dot; "" without."""
    file = name.rpartition("/")[2]
    stem, dot, suffix = file.rpartition(".")
    return f".{suffix.lower()}" if dot and stem and suffix else ""


def _may_be_hidden(name: str) -> bool:
    """Whether `hidden` has to be asked about the parts of a name."""
    return name.startswith(".") or "/." in name or any(part in name for part in LEFT_BY_SYSTEMS)


def walk(root: Path) -> Iterable[str]:
    """The names of all files in a folder, and of hidden folders, which are not entered.

    Raises Unreadable for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        with reading(error.filename, "a folder"):
            raise error

    seen = {root.resolve()}
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        relative = Path(folder).relative_to(root).as_posix()
        start = "" if relative == "." else f"{relative}/"
        yield from (f"{start}{name}/" for name in subfolders if hidden(name))
        real = {name: (Path(folder) / name).resolve() for name in subfolders if not hidden(name)}
        # A link may lead back up.
        subfolders[:] = [name for name, target in real.items() if target not in seen]
        seen.update(real.values())
        yield from (start + name for name in files)


def classes(
    names: list[str], rule: str, spec: str
) -> tuple[np.ndarray | None, list[str], str | None]:
    """The labels of images, the classes' names, and what keeps `auto` from seeing classes where
    most names have one.

    `rule` is as for `sources.open_source`. Raises UsageError when a rule that is asked for does
    not fit.
    """
    # An archive of one folder (`zip -r photos.zip photos`) has its classes one level further down.
    if rule == "none":
        return None, [], None
    parents = [name.rpartition("/")[0] for name in names]
    parts = {parent: PurePosixPath(parent).parts for parent in dict.fromkeys(parents)}
    levels = enumerate(zip(*parts.values(), strict=False))
    common = next((i for i, level in levels if len(set(level)) > 1), 0)
    inside = all(len(p) > common for p in parts.values())
    deeper = {parent: p[common if inside else 0 :] for parent, p in parts.items()}
    by_folder = {parent: p[0] if p else None for parent, p in deeper.items()}
    folders = [by_folder[parent] for parent in parents]
    keys, form = folders, "class/image.png"
    if rule == "adm" or (rule == "auto" and not (None not in folders and len(set(folders)) > 1)):
        prefixes = [_prefix(name) for name in names]
        suits = None not in prefixes and 1 < len(set(prefixes)) <= len(names) // 2
        if rule == "auto" and not suits:
            return None, [], _stray(names, folders) or _stray(names, prefixes)
        rule, keys, form = "adm", prefixes, "ClassID_anything.jpg"
    if None in keys:
        name = shown(names[keys.index(None)])
        raise UsageError(
            f"data.labels is '{rule}', but {spec} holds {name}, which is not of the form {form}"
        )
    found = sorted({k for k in keys if k is not None})
    index = {c: i for i, c in enumerate(found)}
    labels = np.array([index[k] for k in keys if k is not None], dtype=np.int64)
    return labels, [shown(name) for name in found], None


def _prefix(name: str) -> str | None:
    """The ClassID of ClassID_anything.jpg."""
    found = re.match(r"[^_]+(?=_)", name.rpartition("/")[2])
    return found.group() if found else None


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
