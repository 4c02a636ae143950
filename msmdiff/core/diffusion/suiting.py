"""Which routes and objectives suit which networks."""

from typing import Any

from msmdiff.core import registry
from msmdiff.core.config import Config
from msmdiff.core.sections import AUTO


def settle_route(config: Config, backbone: Any) -> list[str]:
    """Choose the route that suits the network's sparse part where it is left open, or the part that
    the route needs, and say what does not go together.
    """
    model: Any = config.model
    part = getattr(model, "sparse", None)  # None: a family that can have none
    if config.mask.route == AUTO and part not in (None, "none"):
        config.mask.route = next(
            name
            for name, entry in registry.entries("route").items()
            if getattr(entry.make, "sparse", None) == part
        )
    name = "visible" if config.mask.route == AUTO else config.mask.route
    route = registry.find("route", name, "mask.route").make
    needed = getattr(route, "sparse", None)
    if needed is None:
        return [] if route.fill in backbone.fills else [_knows_no_route(config, backbone, name)]
    if part is None:
        return [f"mask.route {name} is not for model.family {config.model.family}: use uvit or dit"]
    if part == "none":
        model.sparse = needed
    elif part != needed:
        return [f"mask.route {name} needs model.sparse {needed}, not {part}"]
    return []


def _knows_no_route(config: Config, backbone: Any, name: str) -> str:
    """Why a network cannot take the route `name`, and which ones it can."""
    family, objective = config.model.family, config.objective.name
    if backbone.published_objective:
        return does_not_suit(config, backbone)
    if not backbone.fills:
        return (
            f"objective.name '{objective}' hides tokens, and a network of model.family {family} "
            "drops none: use 'dsm' and mask.ratio 0"
        )
    known = [
        entry.name
        for entry in registry.entries("route").values()
        if entry.make.fill in backbone.fills and getattr(entry.make, "sparse", None) is None
    ]
    fits = ", ".join(known)
    return f"mask.route {name} is not for model.family {family}, which takes {fits}"


def does_not_suit(config: Config, backbone: Any) -> str:
    fits = f"'{backbone.published_objective or 'msm'}' or 'dsm'"
    name, family = config.objective.name, config.model.family
    return f"objective.name '{name}' does not suit model.family {family}: use {fits}"
