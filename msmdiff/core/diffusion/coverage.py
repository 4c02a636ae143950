"""What a training sees of each image, and where its loss counts, by its configuration alone."""

from typing import Any

from msmdiff.core import registry
from msmdiff.core.config import Config
from msmdiff.core.diffusion import masking
from msmdiff.core.sections import AUTO


def route_of(config: Config) -> Any:
    """The class of the route that hides tokens in a training with one pass; None where no token is
    hidden, and for an objective that chooses its routes itself.
    """
    name = config.mask.route
    if name == AUTO and config.objective.name == "msm":
        name = "visible"
    route = registry.entries("route").get(name)
    hidden = any(_hides(config, ratio) for _, ratio in masking.over_training(config.mask))
    return route.make if route is not None and hidden else None


def scores_kept(config: Config) -> bool:
    """Whether the loss of a training with one pass counts on the tokens that are kept alone."""
    route = route_of(config)
    return route is not None and (
        getattr(route, "scored", "kept" if route.fill == "none" else "all") == "kept"
    )


def is_primer(config: Config) -> bool:
    """Whether a training ends without a whole image seen: its network gives the visible tokens
    only, and draws nothing before it is fine-tuned.
    """
    route = route_of(config)
    return (
        route is not None
        and route.fill == "none"
        and _hides(config, masking.over_training(config.mask)[-1][1])
    )


def _hides(config: Config, ratio: float) -> bool:
    return masking.hides(config.mask.model_copy(update={"ratio": ratio}))
