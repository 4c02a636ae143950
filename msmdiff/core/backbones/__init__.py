"""The networks. A new one is a file here or in a plugin, its class under `@family(name, sizes)`;
its constructor's keyword arguments are the keys of the `model` section.
"""

from typing import Any

from pydantic import ValidationError

from msmdiff.core import registry
from msmdiff.core.backbones.family import ALIASES
from msmdiff.core.errors import UsageError, nearest
from msmdiff.core.sections import ModelConfig


def sizes() -> dict[str, dict[str, Any]]:
    """Every named size: its family and constructor arguments."""
    return {name: entry.make for name, entry in registry.entries("size").items()}


def resolve(config: ModelConfig) -> ModelConfig:
    """Fill in a named size, check every key against the family's network, and return the complete
    section.

    Raises UsageError for an unknown name, family or key (with the nearest valid one), a wrong type
    or a missing key.
    """
    given = {k: v for k, v in config.model_dump().items() if v is not None}
    known = sizes()
    name = given.pop("name", None)
    name = ALIASES.get(name, name)
    if name is not None and name not in known:
        raise UsageError(
            f"model.name '{name}' is not a known size{nearest(name, list(known))}; "
            f"sizes: {', '.join(known)}"
        )
    fields = {**known.get(name, {}), **given}
    num_classes = fields.pop("num_classes")
    family = fields.pop("family", None)
    entry = registry.entries("backbone").get(family)
    if entry is None:
        families = ", ".join(registry.entries("backbone"))
        raise UsageError(
            f"model.family must be one of {families} (or give model.name), not {family!r}"
        )
    if unknown := [key for key in fields if key not in entry.options.model_fields]:
        near = nearest(unknown[0], list(entry.options.model_fields))
        raise UsageError(
            f"unknown configuration key 'model.{unknown[0]}' for family {family}{near}"
        )
    try:
        complete = entry.options.model_validate(fields).model_dump()
    except ValidationError as error:
        raise UsageError("; ".join(map(_explain, error.errors()))) from None
    return ModelConfig(name=name, family=family, num_classes=num_classes, **complete)


def _explain(problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    where = f"model.{problem['loc'][0]}"
    # What is missing has no value: there the library gives all the others.
    value = "" if problem["type"] == "missing" else f" = {problem['input']!r}"
    return f"{where}{value}: {message[0].lower()}{message[1:]}"


def network_class(config: ModelConfig) -> Any:
    """The class of a resolved section's network."""
    return registry.find("backbone", str(config.family), "model.family").make


def build(config: ModelConfig, shape: tuple[int, int, int]) -> Any:
    """A freshly initialised network for inputs [B, *shape], from a resolved section.

    Raises UsageError for one of a plugin that lacks what every network has.
    """
    apart = {"name", "family", "num_classes"}
    fields = {k: v for k, v in config.model_dump().items() if k not in apart}
    network = network_class(config)(shape, config.num_classes, **fields)
    needed = ("patch_size", "grid", "num_classes", "gradient_checkpointing")
    if missing := [name for name in needed if not hasattr(network, name)]:
        raise UsageError(
            f"a network of model.family {config.family} lacks the attribute {missing[0]}: see "
            "Backbone in msmdiff.core.backbones.family"
        )
    return network
