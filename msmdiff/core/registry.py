"""Names to things: the one way anything is added, from inside the package or from outside.

    @register("sampler", "ddim", DdimOptions)
    def sample(denoise, schedule, x, times, noise, *, eta=0.0): ...

An entry is what was registered, under a kind and a name, with a typed model of the options that
this choice takes. The options are keys of the configuration's section of that kind: they are
validated, listed, stored, and refused where another choice is made.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, field_validator

from msmdiff.core.errors import MsmdiffError, UsageError, nearest

ENTRY_POINTS = "msmdiff.plugins"
"""The group under which installed packages offer plugins by name."""

T = TypeVar("T")


class Checked(BaseModel):
    """Unknown keys are refused, and so are numbers that no computation has a use for: infinite
    ones, NaN, and integers of more than 63 bits. Keys whose cost grows have bounds of their own.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _of_63_bits(cls, value: Any) -> Any:
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) >= 2**63:
                raise ValueError("the number is too large: give one below 2^63")
        return value


class Options(Checked):
    """What one choice takes beside the keys that all of its kind have; by itself: nothing."""


@dataclass(frozen=True)
class Kind:
    """What can be registered.

    Attributes:
        title: for people, in the plural.
        home: the package or module whose import registers the built-in ones.
    """

    title: str
    home: str


KINDS: dict[str, Kind] = {
    "backbone": Kind("backbones", "msmdiff.core.backbones"),
    "size": Kind("models", "msmdiff.core.backbones"),
    "mask": Kind("masks", "msmdiff.core.diffusion"),
    "route": Kind("routes", "msmdiff.core.diffusion"),
    "schedule": Kind("schedules", "msmdiff.core.diffusion"),
    "prediction": Kind("predictions", "msmdiff.core.diffusion"),
    "weighting": Kind("weightings", "msmdiff.core.diffusion"),
    "time_sampling": Kind("time samplings", "msmdiff.core.diffusion"),
    "objective": Kind("objectives", "msmdiff.core.diffusion"),
    "codec": Kind("codecs", "msmdiff.core.diffusion.codecs"),
    "sampler": Kind("samplers", "msmdiff.core.samplers"),
    "times": Kind("sampling times", "msmdiff.core.samplers"),
    "guidance": Kind("guidance schedules", "msmdiff.core.samplers"),
    "optimiser": Kind("optimisers", "msmdiff.core.training.optim"),
    "metric": Kind("metrics", "msmdiff.core.metrics"),
    "features": Kind("feature networks", "msmdiff.core.metrics"),
    "source": Kind("sources", "msmdiff.core.data"),
    "layout": Kind("checkpoint layouts", "msmdiff.core.weights"),
}


@dataclass(frozen=True)
class Entry:
    """One registered thing.

    Attributes:
        make: what was registered: a function, a class, or a table.
        options: the typed model of its own options.
        summary: one line for people.
        plugin: the plugin that brought it; None for a built-in one.
    """

    kind: str
    name: str
    make: Any
    options: type[Options]
    summary: str
    plugin: str | None = None

    def takes(self, section: Any) -> dict[str, Any]:
        """This choice's options out of a configuration section, as keyword arguments."""
        return {name: getattr(section, name) for name in self.options.model_fields}


_entries: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
_plugins: dict[str, str] = {}
"""Loaded plugins: name -> where it came from."""
_loading: list[str] = []
"""The plugin that is being imported, if one is."""


def register(
    kind: str, name: str, options: type[Options] = Options, summary: str | None = None
) -> Callable[[T], T]:
    """Decorate (or call on) what `name` stands for among its `kind`; `summary` is else the
    docstring's first paragraph, in one line.

    Raises UsageError for a name that another plugin, or the package itself, has already taken.
    """

    def enter(make: T) -> T:
        plugin = _loading[-1] if _loading else None
        taken = _entries[kind].get(name)
        if taken is not None and taken.plugin != plugin:
            owner = f"the plugin {taken.plugin}" if taken.plugin else "msmdiff itself"
            raise UsageError(
                f"the plugin {plugin} registers the {kind} '{name}', which {owner} has already"
            )
        paragraph = inspect.cleandoc(summary or make.__doc__ or "").partition("\n\n")[0]
        _entries[kind][name] = Entry(
            kind=kind,
            name=name,
            make=make,
            options=options,
            summary=" ".join(paragraph.split()),
            plugin=plugin,
        )
        return make

    return enter


def find(kind: str, name: str, where: str) -> Entry:
    """The entry of a name; `where` is the key or option that asked, for the message.

    Raises UsageError with the nearest name, and all of them, where there is none.
    """
    known = entries(kind)
    if not isinstance(name, str) or name not in known:
        raise UsageError(
            f"{where} '{name}' is none of the "
            f"{KINDS[kind].title}{nearest(str(name), list(known))}; "
            f"there are {', '.join(known)}"
        )
    return known[name]


def entries(kind: str) -> dict[str, Entry]:
    """Everything of a kind by name, built-in and from the plugins that were loaded."""
    _import_home(KINDS[kind].home)
    return _entries[kind]


@cache
def _import_home(home: str) -> None:
    """Import a module, or all modules of a package, so that what they hold is registered."""
    module = importlib.import_module(home)
    for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
        importlib.import_module(f"{home}.{found.name}")


# ------------------------------------------------------------------ plugins


def plugins() -> dict[str, str]:
    """The plugins loaded so far: name -> file or entry point."""
    return dict(_plugins)


def load_plugin(spec: str) -> str:
    """Import a plugin that the user named: a Python file, or the name of an installed entry point.

    Loading one again does nothing. Returns the plugin's name. Raises UsageError where there is
    none, and MsmdiffError where it cannot be imported.
    """
    path = Path(spec)
    name = path.stem if path.suffix == ".py" else spec
    if name in _plugins:
        there = _plugins[name]
        if path.suffix == ".py" and path.is_file() and there != str(path.resolve()):
            raise UsageError(
                f"--plugin {spec}: a plugin called {name} was loaded from {there} already"
            )
        return name
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    if path.suffix == ".py":
        if not path.is_file():
            raise UsageError(f"--plugin {spec}: there is no such file")
    elif name not in points.names:
        offered = ", ".join(sorted(points.names)) or "none"
        raise UsageError(
            f"--plugin {spec} is neither a .py file nor an installed plugin (installed: {offered})"
        )
    for kind in KINDS.values():  # what the plugin imports of the package is not the plugin's own
        _import_home(kind.home)
    _loading.append(name)
    try:
        if path.suffix == ".py":
            _import_file(name, path)
        else:
            points[name].load()
    except MsmdiffError:
        raise
    except Exception as error:  # a user's file can raise anything
        reason = " ".join(str(error).split()) or "no message"
        raise MsmdiffError(
            f"the plugin {spec} cannot be imported: {type(error).__name__}: {reason}"
        ) from error
    finally:
        _loading.pop()
    _plugins[name] = str(path.resolve()) if path.suffix == ".py" else f"entry point {name}"
    return name


def _import_file(name: str, path: Path) -> None:
    module_name = f"msmdiff_plugin_{name}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # pickled classes and worker processes look it up here
    spec.loader.exec_module(module)


def require_plugins(names: list[str], where: str) -> None:
    """Raises UsageError unless the plugins that a stored file needs were loaded: nothing loads them
    unasked.
    """
    if missing := [name for name in names if name not in _plugins]:
        raise UsageError(
            f"{where} needs the plugin{'s' if len(missing) > 1 else ''} {', '.join(missing)}: "
            "name the file with --plugin FILE.py"
        )


def installed() -> list[str]:
    """The names of plugins that installed packages offer; none of them is imported."""
    return sorted(importlib.metadata.entry_points(group=ENTRY_POINTS).names)
