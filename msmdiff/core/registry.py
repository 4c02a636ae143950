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
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, field_validator

from msmdiff.core.errors import MsmdiffError, UsageError, nearest

ENTRY_POINTS = "msmdiff.plugins"
"""The group under which installed packages offer plugins by name."""

OR_A_PLUGINS = "(or those of a plugin: --plugin FILE.py)"
"""Behind what there is to choose from, in messages."""

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
        call: what it is called with before its own options, which are keywords: "a, b, *, c" gives
            c by its name. None: it is not called, or in more than one way.
        base: the class that it must be of, as module:name; "" where a protocol is enough.
    """

    title: str
    home: str
    call: str | None = None
    base: str = ""


DIFFUSION, SAMPLERS = "msmdiff.core.diffusion", "msmdiff.core.samplers"
BACKBONES, CODECS = "msmdiff.core.backbones", "msmdiff.core.diffusion.codecs"
METRICS, DATA = "msmdiff.core.metrics", "msmdiff.core.data"
OPTIMISERS, WEIGHTS = "msmdiff.core.training.optim", "msmdiff.core.weights"

KINDS: dict[str, Kind] = {
    "backbone": Kind("backbones", BACKBONES, "input_shape, num_classes"),
    "size": Kind("models", BACKBONES),
    "mask": Kind("masks", DIFFUSION, "grid, ratio"),
    "route": Kind("routes", DIFFUSION, "section, mask, network"),
    "schedule": Kind("schedules", DIFFUSION, "timesteps"),
    "prediction": Kind("predictions", DIFFUSION, "schedule"),
    "weighting": Kind("weightings", DIFFUSION, ""),
    "time_sampling": Kind("time samplings", DIFFUSION, "schedule"),
    "objective": Kind("objectives", DIFFUSION, ""),
    "alignment": Kind("alignments", DIFFUSION, "around"),
    "codec": Kind("codecs", CODECS, "image_size", f"{CODECS}:Codec"),
    "sampler": Kind("samplers", SAMPLERS, "denoise, schedule, x, times, noise"),
    "times": Kind("sampling times", SAMPLERS),
    "guidance": Kind("guidance schedules", SAMPLERS, "scale"),
    "optimiser": Kind("optimisers", OPTIMISERS, "parameters, *, lr, eps, weight_decay"),
    "metric": Kind("metrics", METRICS, "", f"{METRICS}.scores:Metric"),
    "features": Kind(
        "feature networks", METRICS, "weights, device, *, spatial", f"{METRICS}.features:Features"
    ),
    "source": Kind("sources", DATA, "spec", f"{DATA}.source:Source"),
    "layout": Kind("checkpoint layouts", WEIGHTS),
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
_places: dict[str, str] = {}
"""Where the code of plugins lies: a file, or a package's folder -> the plugin's name."""
_taken: dict[str, frozenset[str]] = {}
"""The keys that a kind's section has already: no choice may call an option so."""
_automatic: set[str] = set()
"""The kinds whose choice may be left open: then a section has the options of all of them."""


def register(
    kind: str, name: str, options: type[Options] = Options, summary: str | None = None
) -> Callable[[T], T]:
    """Register what is decorated (or called on) under a kind and a name.

    Args:
        options: the typed model of its own options.
        summary: one line for people; by default the first paragraph of its docstring.

    Raises UsageError for an unknown kind, for a name that the package or another plugin has taken,
    and for something from a plugin that could not be called.
    """
    if kind not in KINDS:
        raise UsageError(
            f"{_who()} registers the kind '{kind}'{nearest(str(kind), list(KINDS))}; "
            f"the kinds are {', '.join(KINDS)}"
        )

    def enter(make: T) -> T:
        plugin = _loading[-1] if _loading else None
        taken = _entries[kind].get(name)
        if taken is not None and taken.plugin != plugin:
            owner = f"the plugin {taken.plugin}" if taken.plugin else "msmdiff itself"
            raise UsageError(
                f"the plugin {plugin} registers the {kind} '{name}', which {owner} has already"
            )
        if plugin is not None:
            _check(kind, name, make, options)
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


def reserve(kind: str, keys: Iterable[str], automatic: bool = False) -> None:
    """Reserve the keys of a kind's section: no choice may have an option of that name.

    `automatic` says that the choice may be left open.
    """
    _taken[kind] = frozenset(keys)
    if automatic:
        _automatic.add(kind)


def find(kind: str, name: str, where: str) -> Entry:
    """The entry of a name; `where` is the key or option that asked, for the message.

    Raises UsageError with the nearest name, and all of them, where there is none.
    """
    known = entries(kind)
    if not isinstance(name, str) or name not in known:
        raise UsageError(
            f"{where} '{name}' is none of the "
            f"{KINDS[kind].title}{nearest(str(name), list(known))}; "
            f"there are {', '.join(known)} {OR_A_PLUGINS}"
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


# ------------------------------------------------------------------ what plugins register


def _who() -> str:
    return f"the plugin {_loading[-1]}" if _loading else "msmdiff"


def _check(kind: str, name: str, make: Any, options: type[Options]) -> None:
    """Raise UsageError for what a plugin registers and that would fail when it is used."""
    problem = (
        _wrong_options(kind, options) or _wrong_base(kind, make) or _wrong_call(kind, make, options)
    )
    if problem:
        raise UsageError(f"{_who()}: the {kind} '{name}' {problem}")


def _wrong_options(kind: str, options: Any) -> str:
    if not (isinstance(options, type) and issubclass(options, Options)):
        return f"has options {getattr(options, '__name__', options)}, not a subclass of Options"
    if clash := sorted(set(options.model_fields) & _taken.get(kind, frozenset())):
        return f"has an option {clash[0]}, which is a key of its section already: rename it"
    open_ones = [key for key, field in options.model_fields.items() if field.is_required()]
    if kind in _automatic and open_ones:
        return f"has an option {open_ones[0]} without a default, which it needs: give it one"
    return ""


def _wrong_base(kind: str, make: Any) -> str:
    module, _, base = KINDS[kind].base.partition(":")
    if not base:
        return ""
    wanted = getattr(importlib.import_module(module), base)
    if isinstance(make, type) and issubclass(make, wanted):
        return ""
    return f"must be a subclass of {base} (from {module} import {base})"


def _wrong_call(kind: str, make: Any, options: type[Options]) -> str:
    """Why it cannot be called with what its kind gives and its options."""
    call = KINDS[kind].call
    if call is None:
        return ""
    if not callable(make):
        return f"must be a function or a class, not {type(make).__name__}"
    try:
        signature = inspect.signature(make)
    except ValueError:  # written in C
        return ""
    places, _, keywords = call.partition("*")
    given = [word.strip() for word in places.split(",") if word.strip()]
    if kind == "source" and not make.brings_labels:
        given.append("labels")
    named = [word.strip() for word in keywords.split(",") if word.strip()]
    own = list(options.model_fields)
    try:
        signature.bind(*given, **dict.fromkeys([*named, *own]))
    except TypeError as error:
        keys = ", ".join([*named, *own])
        shown = ", ".join([*given, *(["*", keys] if keys else [])])
        return f"must take the arguments ({shown}), its options behind the *: {error}"
    return ""


# ------------------------------------------------------------------ plugins


def plugins() -> dict[str, str]:
    """The plugins loaded so far: name -> file or entry point."""
    return dict(_plugins)


def load_plugin(spec: str, where: str = "--plugin") -> str:
    """Import a plugin that the user named: a Python file, or the name of an installed entry point.

    `where` is the option or key that named it. Loading one again does nothing. Returns the plugin's
    name. Raises UsageError where there is none, and MsmdiffError where it cannot be imported.
    """
    path = Path(spec)
    name = path.stem if path.suffix == ".py" else spec
    if name in _plugins:
        there = _plugins[name]
        if path.suffix == ".py" and path.is_file() and there != str(path.resolve()):
            raise UsageError(
                f"{where} {spec}: a plugin called {name} was loaded from {there} already"
            )
        return name
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    if path.suffix == ".py":
        if not path.is_file():
            raise UsageError(f"{where} {spec}: there is no such file")
    elif name not in points.names:
        offered = ", ".join(sorted(points.names)) or "none"
        raise UsageError(
            f"{where} {spec} is neither a .py file nor an installed plugin (installed: {offered})"
        )
    for kind in KINDS.values():  # what the plugin imports of the package is not the plugin's own
        _import_home(kind.home)
    _loading.append(name)
    try:
        if path.suffix == ".py":
            _import_file(name, path)
        else:
            points[name].load()
            _remember_place(name, sys.modules[points[name].module])
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
    _places[str(path.resolve())] = name
    spec.loader.exec_module(module)


def _remember_place(name: str, module: Any) -> None:
    file = Path(module.__file__ or "").resolve()
    _places[str(file.parent if file.name == "__init__.py" else file)] = name


def blame(error: BaseException) -> str | None:
    """A sentence that names the plugin whose code raised or caused an error, and the line.

    None if no plugin did.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename).resolve()
        for place in (file, *file.parents):
            if name := _places.get(str(place)):
                reason = " ".join(str(error).split()) or "no message"
                return (
                    f"the plugin {name} failed: {type(error).__name__}: {reason} "
                    f"({file.name}, line {frame.lineno})"
                )
    return None


def require_plugins(names: list[str], where: str) -> None:
    """Raise UsageError unless the plugins that a stored file needs are loaded.

    They are never loaded without being named by the user.
    """
    if missing := [name for name in names if name not in _plugins]:
        raise UsageError(
            f"{where} needs the plugin{'s' if len(missing) > 1 else ''} {', '.join(missing)}: "
            "name the file with --plugin FILE.py (in Python: plugins=[FILE.py])"
        )


def installed() -> list[str]:
    """The names of plugins that installed packages offer; none of them is imported."""
    return sorted(importlib.metadata.entry_points(group=ENTRY_POINTS).names)
