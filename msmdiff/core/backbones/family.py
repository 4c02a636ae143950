"""How a network enters the registry: its family, with its constructor's arguments as options, and
its published sizes.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

from pydantic import Field, create_model
from torch import Tensor

from msmdiff.core.backbones.routes import Route
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import Options, register

ALIASES: dict[str, str] = {}
"""What the published code calls sizes, where a paper's name differs."""

Network = TypeVar("Network", bound=type)


class Backbone(Protocol):
    """What the objectives and samplers ask of a network: made of its input's shape (C, H, W), the
    number of classes, and its own keyword arguments, it maps x [B, C, H, W] and network times t [B]
    to an output of x's shape, or of twice the channels with a learned variance; along a route that
    fills no gaps, to the kept patches [B, K, p*p*C].

    Keyword arguments called `hidden_size` and `patch_size` are used where there are any: the first
    for the derived learning rate and the precision, the second to check the size of images.

    Attributes:
        patch_size, grid: side of a patch, and (rows, columns) of patches.
        num_classes: 0 without labels.
        fills: the fillings of gaps that it knows (`routes.Route.fill`); empty: it drops no tokens.
        published_objective: the objective that it was published with, if one of its own.
        gradient_checkpointing: set by the trainer.
    """

    patch_size: int
    grid: tuple[int, int]
    num_classes: int
    gradient_checkpointing: bool
    fills: ClassVar[frozenset[str]]
    published_objective: ClassVar[str | None]

    def __call__(
        self, x: Tensor, t: Tensor, condition: Tensor | None = None, route: Route | None = None
    ) -> Tensor: ...


def family(
    name: str,
    sizes: Mapping[str, dict[str, Any]],
    aliases: Mapping[str, str] | None = None,
    *,
    options: type[Options] = Options,
) -> Callable[[Network], Network]:
    """Register a network under a family's name, and its sizes: tables of constructor arguments.

    Args:
        options: declares keyword arguments that the constructor takes beside its own.
    """

    def enter(network: Network) -> Network:
        if missing := [
            key for key in ("fills", "published_objective") if not hasattr(network, key)
        ]:
            raise UsageError(
                f"the backbone '{name}' lacks the class attribute {missing[0]}: see Backbone in "
                "msmdiff.core.backbones.family"
            )
        register("backbone", name, _options(network, options))(network)
        for size, fields in sizes.items():
            summary = ", ".join(f"{key} {value}" for key, value in fields.items())
            register("size", size, summary=f"{name}: {summary}")({"family": name, **fields})
        ALIASES.update(aliases or {})
        return network

    return enter


def _options(network: type, base: type[Options]) -> type[Options]:
    """The keyword arguments of a constructor as a typed model; its docstring describes them, and
    `base` declares more.
    """
    about: dict[str, str] = {}
    for ancestor in reversed(network.__mro__):
        about |= _described(vars(ancestor).get("__doc__") or "")
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(network).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            default = ... if parameter.default is parameter.empty else parameter.default
            kind, text = _bounded(parameter), about.get(parameter.name, "")
            sentence = text[:1].upper() + text[1:]
            fields[parameter.name] = (kind, Field(default, description=sentence))
    fields |= {name: (field.annotation, field) for name, field in base.model_fields.items()}
    return create_model(network.__name__, __base__=Options, **fields)


def _bounded(parameter: inspect.Parameter) -> Any:
    """The annotation of an argument; where it is a bare number, with bounds within which a network
    can be laid out: numbers of blocks to 1,000, widths and all else to 65,536; 0 only where it is
    the default.
    """
    most = 1000 if "depth" in parameter.name or "layers" in parameter.name else 65_536
    whole = Annotated[int, Field(ge=0 if parameter.default == 0 else 1, le=most)]
    known: dict[Any, Any] = {
        int: whole,
        float: Annotated[float, Field(ge=0, le=1024)],
        list[int]: list[whole],
    }
    if parameter.annotation is parameter.empty:  # of a plugin: anything goes
        return Any
    return known.get(parameter.annotation, parameter.annotation)


def _described(docstring: str) -> dict[str, str]:
    """The lines `name: text` of a docstring's Args."""
    found: dict[str, str] = {}
    last = ""
    arguments = inspect.cleandoc(docstring).partition("Args:")[2].partition("\n")[2]
    for line in arguments.splitlines():
        if not line.strip():
            continue
        if not line.startswith("    "):  # what follows the arguments
            break
        name, colon, text = line.strip().partition(": ")
        if colon and line.startswith("    ") and not line.startswith("     ") and " " not in name:
            found[name], last = text, name
        elif last:
            found[last] += " " + line.strip()
    return found
